"""The losses of DTensors: rows sharded (data parallel), classes sharded (tensor parallel), both, or neither.

A rank works on its local tensors: :func:`longtail.vocab_parallel_cross_entropy` over the mesh dimension that shards the
classes, the plain loss otherwise. Over the mesh dimensions that shard rows, the mean's denominator and the sum of the
losses are exchanged; over all of them, first, what has to be alike on every rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import arguments, functional, reference
from .agreement import agreed
from .distributed import untraced
from .dtensor_layout import Layout, global_denominator, local_range
from .errors import ArgumentTypeError, ArgumentValueError
from .kept_gradient import check_overwritable
from .softmax_loss import RowStats
from .vocab_parallel import vocab_parallel_cross_entropy
from .vocab_shard import compared


class OverwritableLocal(torch.autograd.Function):
    """``to_local`` for one who will write to the result: autograd refuses that of its view."""

    @staticmethod
    def forward(ctx: Any, input: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = input.device_mesh, input.placements
        ctx.shape, ctx.stride = input.shape, input.stride()
        torch.autograd.graph.increment_version(input)  # whoever saved the DTensor has to learn that it changes
        return input.to_local().data

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> DTensor:
        return DTensor.from_local(grad_output, ctx.mesh, ctx.placements, shape=ctx.shape, stride=ctx.stride)


def whole(x: Any) -> Any:
    """A class vector with all its classes, or a scalar, as every rank's own tensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x


class Problem(NamedTuple):
    """A loss of DTensors, checked."""

    layout: Layout
    target: Tensor
    vectors: dict[str, Any]
    options: dict[str, Any]

    def local(self, rows: int, num_classes: int, normalizer: Any) -> tuple[Tensor, dict[str, Any]]:
        """The targets of this rank's rows, and the options that make the loss's mean one over the rows of all ranks.

        Raises:
            IndexError, ValueError: see :func:`longtail.dtensor_layout.global_denominator`.
        """
        layout, ignore_index, reduction = self.layout, self.options["ignore_index"], self.options["reduction"]
        g = layout.local_rows(self.target, rows)
        given = {name: whole(x) for name, x in self.vectors.items() if name != "sample_weight"}
        given["sample_weight"] = layout.local_rows(self.vectors["sample_weight"], rows)
        weight, normalizer = given["weight"], whole(normalizer)
        denominator = global_denominator(layout, g, num_classes, weight, ignore_index, reduction, normalizer)
        return g, {**given, **self.options, "normalizer": denominator}


def check_problem(
    layout: Layout,
    input: DTensor,
    num_classes: int,
    target: Tensor,
    vectors: dict[str, Any],
    numbers: dict[str, Any],
    *,
    ignore_index: int,
    reduction: str,
    normalizer: str | float | Tensor | None,
    gradient: str,
    return_stats: bool,
) -> tuple[Problem, dict[str, Any]]:
    """The problem, and what of it has to be the same on every rank.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    if input.device.type != input.device_mesh.device_type:
        raise ArgumentValueError(
            f"input is on {input.device}, expected {input.device_mesh.device_type} as its device mesh"
        )
    rows, per_class, dtype = input.shape[0], torch.Size((num_classes,)), reference.accumulate_dtype(input)
    mode = "backward" if gradient == "auto" else gradient
    numbers = functional.check_options(input, target, ignore_index, reduction, normalizer, mode, **numbers)
    if target.is_floating_point():
        raise ArgumentTypeError(f"target has dtype {target.dtype}, expected class indices with a DTensor input")
    target = arguments.class_indices(target, input)
    layout.check_rows("target", target, rows)
    given: dict[str, Any] = {
        name: arguments.vector(name, value, torch.Size((rows,)) if name == "sample_weight" else per_class, input, dtype)
        for name, value in vectors.items()
    }
    if given["sample_weight"] is not None:
        layout.check_rows("sample_weight", given["sample_weight"], rows)
    options = {**numbers, "ignore_index": int(ignore_index), "reduction": reduction, "gradient": gradient}
    same = {"dtype": input.dtype, "shape": (rows, num_classes)}
    same |= compared(numbers, ignore_index, reduction, normalizer, gradient, return_stats)
    same |= {f"whether {name} is given": value is not None for name, value in given.items()}
    placed = {"input": input, "target": target, **given, "normalizer": normalizer}
    same |= {f"placements of {name}": placements_of(x) for name, x in placed.items()}
    return Problem(layout, target, given, options), same


def placements_of(x: object) -> str | None:
    """Of a DTensor; None of anything else."""
    return str(tuple(x.placements)) if isinstance(x, DTensor) else None


def global_result(layout: Layout, result: Any, rows: int, reduction: str) -> Any:
    """What a loss of this rank's rows, or a pair of it and statistics, is of all rows."""
    loss, stats = result if isinstance(result, tuple) else (result, None)
    loss = layout.wrap_rows(loss, rows) if reduction == "none" else layout.total(loss)
    return loss if stats is None else (loss, RowStats(*(layout.wrap_rows(x, rows) for x in stats)))


@untraced
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    *,
    class_bias: Tensor | None,
    class_margin: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: str | float | Tensor | None,
    gradient: str,
    return_stats: bool,
    **numbers: Any,
) -> Any:
    """:func:`longtail.cross_entropy` of DTensors; arguments as there. The loss is a DTensor, replicated if reduced."""
    if not isinstance(input, DTensor):
        raise ArgumentTypeError("target is a DTensor, expected a plain tensor as the input, or input a DTensor too")
    vectors = {
        "weight": weight,
        "class_bias": class_bias,
        "class_margin": class_margin,
        "sample_weight": sample_weight,
    }

    def check() -> tuple[Problem, dict[str, Any]]:
        arguments.check_tensors(target=target)
        if input.dim() != 2:
            text = f"input is a DTensor of shape {list(input.shape)}, expected (N, C): flatten it first"
            raise ArgumentValueError(text)
        problem, same = check_problem(
            *(Layout.of(input), input, input.shape[1], target, vectors, numbers),
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            gradient=gradient,
            return_stats=return_stats,
        )
        check_overwritable(input, gradient)
        return problem, same

    layout, *_ = problem = agreed(input.device_mesh, input.device, check)
    num_classes = input.shape[1]
    g, given = problem.local(input.shape[0], num_classes, normalizer)
    given["return_stats"] = return_stats
    if gradient == "inplace" and torch.is_grad_enabled() and input.requires_grad:
        local = OverwritableLocal.apply(input)
    else:
        local = input.to_local(grad_placements=input.placements)
    if layout.class_dim is None:
        result = functional.cross_entropy(local, g, **given)
    else:
        start, _ = local_range(num_classes, layout.mesh, layout.class_dim)
        given |= {"class_start": start, "num_classes": num_classes}
        result = vocab_parallel_cross_entropy(local, g, group=layout.mesh.get_group(layout.class_dim), **given)
    return global_result(layout, result, input.shape[0], reduction)
