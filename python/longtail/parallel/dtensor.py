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

from .. import arguments
from ..arguments import arithmetic_dtype
from ..errors import ArgumentTypeError, ArgumentValueError
from ..linear.shapes import shifted
from ..ops.gradient import check_overwritable
from ..options import Request, SoftmaxOptions
from ..reference.row_statistics import RowStatistics
from ..softmax import loss, statistics
from . import vocab, vocab_statistics
from .agreement import agreed
from .collectives import untraced
from .dtensor_layout import Layout, global_denominator, local_range
from .shard import Part, compared


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
    num_classes: int
    target: Tensor
    options: SoftmaxOptions
    request: Request

    def shifted(self) -> Problem:
        """With the targets of the next row, which may be another rank's."""
        options = self.options._replace(sample_weight=whole(self.options.sample_weight))
        target, options = shifted(whole(self.target), options)
        return self._replace(target=target, options=options)

    def local(self, rows: int) -> tuple[Tensor, SoftmaxOptions, Request]:
        """Of this rank's rows: the targets, the options, and a request whose mean is one over the rows of all ranks.

        Raises:
            IndexError, ValueError: see :func:`longtail.parallel.dtensor_layout.global_denominator`.
        """
        layout, options, request = self.layout, self.options, self.request
        g = layout.local_rows(self.target, rows)
        vectors = {name: whole(x) for name, x in options.vectors.items() if name != "sample_weight"}
        options = options._replace(**vectors, sample_weight=layout.local_rows(options.sample_weight, rows))
        request = request._replace(normalizer=whole(request.normalizer))
        denominator = global_denominator(layout, g, self.num_classes, options, request)
        return g, options, request._replace(normalizer=denominator)

    def part(self) -> Part:
        """The classes that this rank holds, where the layout shards them."""
        layout = self.layout
        assert layout.class_dim is not None
        start, _ = local_range(self.num_classes, layout.mesh, layout.class_dim)
        return Part(layout.mesh.get_group(layout.class_dim), start, self.num_classes)


def check_problem(
    layout: Layout, input: DTensor, num_classes: int, target: Tensor, options: SoftmaxOptions, request: Request
) -> tuple[Problem, dict[str, Any]]:
    """The problem, and what of it has to be the same on every rank. ``request``: that of a loss of logits, but for
    gradients that are "auto".

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    if input.device.type != input.device_mesh.device_type:
        raise ArgumentValueError(
            f"input is on {input.device}, expected {input.device_mesh.device_type} as its device mesh"
        )
    rows, dtype, normalizer = torch.Size((input.shape[0],)), arithmetic_dtype(input.dtype), request.normalizer
    checked = loss.check(input, target, options, request.of_logits())
    if target.is_floating_point():
        raise ArgumentTypeError(f"target has dtype {target.dtype}, expected class indices with a DTensor input")
    target = arguments.class_indices(target, input)
    layout.check_rows("target", target, *rows)
    options = options.with_vectors(input, rows, num_classes, dtype)
    if options.sample_weight is not None:
        layout.check_rows("sample_weight", options.sample_weight, *rows)
    same = {"dtype": input.dtype, "shape": (*rows, num_classes)}
    same |= compared(checked, request)
    same |= {f"whether {name} is given": x is not None for name, x in options.vectors.items()}
    placed = {"input": input, "target": target, **options.vectors, "normalizer": normalizer}
    same |= {f"placements of {name}": placements_of(x) for name, x in placed.items()}
    return Problem(layout, num_classes, target, options, request), same


def placements_of(x: object) -> str | None:
    """Of a DTensor; None of anything else."""
    return str(tuple(x.placements)) if isinstance(x, DTensor) else None


def global_result(layout: Layout, result: Any, rows: int, reduction: str) -> Any:
    """What a loss of this rank's rows, or a pair of it and statistics, is of all rows."""
    loss, stats = result if isinstance(result, tuple) else (result, None)
    loss = layout.wrap_rows(loss, rows) if reduction == "none" else layout.total(loss)
    return loss if stats is None else (loss, global_statistics(layout, stats, rows))


def global_statistics(layout: Layout, stats: RowStatistics, rows: int) -> RowStatistics:
    """DTensors over all rows, from what is known of this rank's."""
    return RowStatistics(*(layout.wrap_rows(x, rows) for x in stats))


def _as_dtensor(input: Tensor) -> DTensor:
    if not isinstance(input, DTensor):
        raise ArgumentTypeError("target is a DTensor, expected a plain tensor as the input, or input a DTensor too")
    return input


def _check_logits(
    input: DTensor, target: Tensor, options: SoftmaxOptions, request: Request
) -> tuple[Problem, dict[str, Any]]:
    arguments.check_tensors(target=target)
    if input.dim() != 2:
        text = f"input is a DTensor of shape {list(input.shape)}, expected (N, C): flatten it first"
        raise ArgumentValueError(text)
    return check_problem(Layout.of(input), input, input.shape[1], target, options, request)


@untraced
def cross_entropy(input: Tensor, target: Tensor, options: SoftmaxOptions, request: Request) -> Any:
    """:func:`longtail.cross_entropy` of DTensors. The loss is a DTensor, replicated if reduced."""
    input = _as_dtensor(input)

    def check() -> tuple[Problem, dict[str, Any]]:
        found = _check_logits(input, target, options, request)
        check_overwritable(input, request.gradient)
        return found

    problem = agreed(input.device_mesh, input.device, check)
    g, own, asked = problem.local(input.shape[0])
    if request.gradient == "inplace" and torch.is_grad_enabled() and input.requires_grad:
        local = OverwritableLocal.apply(input)
    else:
        local = input.to_local(grad_placements=input.placements)
    if problem.layout.class_dim is None:
        result = loss.cross_entropy(local, g, own, asked)
    else:
        result = vocab.cross_entropy(local, g, own, asked, problem.part())
    return global_result(problem.layout, result, input.shape[0], request.reduction)


@untraced
def row_statistics(
    input: Tensor, target: Tensor, options: SoftmaxOptions, temperature: float, gradient: str
) -> RowStatistics:
    """:func:`longtail.row_statistics` of DTensors; the statistics are DTensors over the rows."""
    input = _as_dtensor(input)

    def check() -> tuple[Problem, dict[str, Any]]:
        arguments.check_choice("gradient", gradient, statistics.GRADIENTS)
        if gradient == "inplace":
            raise ArgumentValueError('gradient is "inplace", expected "backward" with a DTensor input')
        problem, same = _check_logits(input, target, options, vocab_statistics.requested())
        return problem, same | checked_temperature(input, options, temperature)

    problem = agreed(input.device_mesh, input.device, check)
    g, own, _ = problem.local(input.shape[0])
    local = input.to_local(grad_placements=input.placements)
    if problem.layout.class_dim is None:
        found = statistics.row_statistics(local, g, own, temperature, gradient)
    else:
        found = vocab_statistics.row_statistics(local, g, own, temperature, gradient, problem.part())
    return global_statistics(problem.layout, found, input.shape[0])


def checked_temperature(input: DTensor, options: SoftmaxOptions, temperature: float) -> dict[str, Any]:
    """What ranks compare of it. ``options``: as users give them."""
    statistics.checked_options(options, temperature, arithmetic_dtype(input.dtype))
    return {"temperature": float(temperature)}
