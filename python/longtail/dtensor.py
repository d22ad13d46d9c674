"""The losses of DTensors: rows sharded (data parallel), classes sharded (tensor parallel), both, or neither.

A rank works on its local tensors: :func:`longtail.vocab_parallel_cross_entropy` over the mesh dimension that shards the
classes, the plain loss otherwise. Over the mesh dimensions that shard rows, only the mean's denominator and the sum of
the losses are exchanged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from . import arguments, functional, ops, reference
from .agreement import agreed
from .distributed import Group, all_gather, sum_in_rank_order, untraced
from .errors import ArgumentTypeError, ArgumentValueError
from .kept_gradient import check_overwritable
from .softmax_loss import RowStats
from .vocab_parallel import vocab_parallel_cross_entropy
from .vocab_shard import kind_of

SUPPORTED = "on each mesh dimension Shard(0) (rows), Replicate(), or on one of them Shard(1) (classes)"


class Layout(NamedTuple):
    """How a mesh shares out rows and classes."""

    mesh: Any
    row_dims: tuple[int, ...]
    """Mesh dimensions that shard the rows, in order."""
    class_dim: int | None
    """The mesh dimension that shards the classes."""

    @classmethod
    def of(cls, logits: DTensor) -> Layout:
        """That of logits [N, C]."""
        rows: list[int] = []
        classes: list[int] = []
        for i, placement in enumerate(logits.placements):
            if isinstance(placement, Shard):
                (rows if placement.dim % logits.dim() == 0 else classes).append(i)
            elif not isinstance(placement, Replicate):
                raise ArgumentValueError(f"input has placements {tuple(logits.placements)}, expected {SUPPORTED}")
        if len(classes) > 1:
            raise ArgumentValueError(
                f"input has placements {tuple(logits.placements)}, which share out the classes over {len(classes)} "
                f"mesh dimensions, expected {SUPPORTED}"
            )
        return cls(logits.device_mesh, tuple(rows), classes[0] if classes else None)

    @property
    def row_placements(self) -> list[Any]:
        """Of a vector over the rows."""
        return [Shard(0) if i in self.row_dims else Replicate() for i in range(self.mesh.ndim)]

    def groups(self) -> list[Group]:
        """Of the mesh dimensions that shard rows."""
        return [self.mesh.get_group(i) for i in self.row_dims]

    def check_rows(self, name: str, value: Any, rows: int) -> None:
        """Checks a vector over all rows: a DTensor of any placements, or a plain tensor that is whole."""
        if value.shape != (rows,):
            raise ArgumentValueError(
                f"{name} has shape {list(value.shape)}, expected {[rows]}, one for each row of all"
            )
        if isinstance(value, DTensor) and value.device_mesh != self.mesh:
            raise ArgumentValueError(f"{name} is on {value.device_mesh}, expected {self.mesh} as the input")

    def local_rows(self, value: Any, rows: int) -> Any:
        """This rank's part of a vector over all rows."""
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, DTensor):
            return value.redistribute(placements=self.row_placements).to_local()
        begin, end = 0, rows
        for i in self.row_dims:
            start, size = local_range(end - begin, self.mesh, i)
            begin, end = begin + start, begin + start + size
        return value[begin:end]

    def wrap_rows(self, value: Tensor, rows: int) -> DTensor:
        """A vector over this rank's rows as a DTensor over all rows."""
        return DTensor.from_local(value, self.mesh, self.row_placements, shape=torch.Size((rows,)), stride=(1,))

    def total(self, value: Tensor) -> DTensor:
        """The sum of scalars over the ranks that share out the rows, known to all."""
        for group in self.groups():
            value = SumOverRanks.apply(value, group)
        return DTensor.from_local(value, self.mesh, [Replicate()] * self.mesh.ndim)


def local_range(size: int, mesh: Any, mesh_dim: int) -> tuple[int, int]:
    """(start, size) of this rank's part of ``size`` elements that a mesh dimension shards, as DTensor cuts them."""
    part = -(-size // mesh.size(mesh_dim))
    start = min(part * mesh.get_local_rank(mesh_dim), size)
    return start, min(part, size - start)


class SumOverRanks(torch.autograd.Function):
    """The sum of a scalar over a group, bitwise the same on every rank; each keeps its own gradient."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor, group: Group) -> Tensor:
        return sum_in_rank_order(all_gather(value.reshape(1), group))[0]

    @staticmethod
    def backward(_ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


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


def global_denominator(
    layout: Layout,
    target: Tensor,  # [N_local]
    num_classes: int,
    weight: Tensor | None,  # [C] of the arithmetic's dtype
    ignore_index: int,
    reduction: str,
    normalizer: str | float | Tensor | None,
) -> Tensor | None:
    """What a mean over the rows of all ranks divides by, 0-d; None where there is no mean.

    Raises:
        IndexError: on the CPU, a target of some rank is out of bounds; on every rank that shares out the rows.
    """
    fault = None
    counted = target.new_zeros(())
    try:
        counted = ops.mean_denominator(target, weight if normalizer is None else None, ignore_index, num_classes)
    except IndexError as error:
        fault = error
    packed = torch.stack([counted.double(), counted.new_tensor(float(fault is not None), dtype=torch.float64)])
    for group in layout.groups():
        packed = sum_in_rank_order(all_gather(packed, group))
    if target.device.type == "cpu" and packed[1]:
        text = f"a target of another rank is out of bounds: expected 0 <= target < {num_classes}"
        raise fault or IndexError(f"longtail: {text} or ignore_index {ignore_index}")
    if reduction != "mean":
        return None
    given = arguments.given_normalizer(normalizer, target.device)
    if given is not None:
        return given
    return packed[0] if normalizer is None else packed[0].clamp(min=1)


class Problem(NamedTuple):
    """A loss of DTensors, checked."""

    layout: Layout
    target: Tensor
    vectors: dict[str, Any]
    options: dict[str, Any]

    def local(self, rows: int, num_classes: int, normalizer: Any) -> tuple[Tensor, dict[str, Any]]:
        """The targets of this rank's rows, and the options that make the loss's mean one over the rows of all ranks.

        Raises:
            IndexError: on the CPU, a target is out of bounds; on every rank that shares out the rows.
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
) -> tuple[Problem, dict[str, Any]]:
    """The problem, and what of it has to be the same on every rank.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
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
    same = {"dtype": input.dtype, "shape": (rows, num_classes), **options, "normalizer": kind_of(normalizer)}
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
        )
        check_overwritable(input, gradient)
        return problem, same | {"return_stats": bool(return_stats)}

    layout, *_ = problem = agreed(input.device_mesh, check)
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
