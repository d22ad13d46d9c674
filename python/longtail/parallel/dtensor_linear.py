"""The fused linear loss of DTensors; see :mod:`longtail.parallel.dtensor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..arguments import check_tensors
from ..errors import ArgumentTypeError, ArgumentValueError
from ..linear import loss, statistics
from ..linear.chunks import Chunking
from ..linear.loss import Data, logits_dtype
from ..linear.shapes import check_shift
from ..options import Request, SoftmaxOptions
from ..reference.row_statistics import RowStatistics
from . import vocab_linear, vocab_statistics
from .agreement import agreed
from .collectives import Group, untraced
from .dtensor import Problem, check_problem, checked_temperature, global_result, global_statistics, placements_of
from .dtensor_layout import Layout
from .handshake import check_turn, next_turn
from .shard import Part

SUPPORTED = (
    "on one mesh dimension linear_weight Shard(0) (classes) and input Replicate() or Shard(0) (sequence parallel), "
    "on the others linear_weight Replicate() and input Replicate() or Shard(0) (rows); of input's Shard(0) that on "
    "the mesh dimension of the classes comes last"
)


class SumGradientOverRanks(torch.autograd.Function):
    """A parameter as it is; its gradient is summed over ranks that work on different rows.

    Raises:
        RuntimeError: in backward, ranks differentiate different calls; on a GPU an assertion.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, groups: list[Group]) -> Tensor:
        ctx.groups = [(group, next_turn(group)) for group in groups]
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        grad = grad_output.clone(memory_format=torch.contiguous_format)
        for group, turn in ctx.groups:
            check_turn(turn, group, grad.device)
            torch.distributed.all_reduce(grad, group=group)
        return grad, None


def layout_of(input: DTensor, linear_weight: DTensor) -> tuple[Layout, bool]:
    """Which mesh dimensions share out rows and classes; whether that of the classes also shares out rows of input."""
    mesh = input.device_mesh
    if linear_weight.device_mesh != mesh:
        raise ArgumentValueError(f"linear_weight is on {linear_weight.device_mesh}, expected {mesh} as the input")
    classes = [i for i, p in enumerate(linear_weight.placements) if p == Shard(0)]
    sharded = [i for i, p in enumerate(input.placements) if p == Shard(0)]
    class_dim = classes[0] if classes else None
    rows = tuple(i for i in sharded if i != class_dim)
    known = all(isinstance(p, Replicate) or p == Shard(0) for x in (input, linear_weight) for p in x.placements)
    sequence_parallel = class_dim in sharded
    in_order = not sequence_parallel or class_dim == sharded[-1]
    if not known or len(classes) > 1 or not in_order:
        raise ArgumentValueError(
            f"input has placements {tuple(input.placements)} and linear_weight {tuple(linear_weight.placements)}, "
            f"expected {SUPPORTED}"
        )
    ranks = torch.Size(mesh.size(i) for i in sharded).numel()
    if sequence_parallel and input.shape[0] % ranks:
        raise ArgumentValueError(
            f"input has {input.shape[0]} rows, expected a multiple of the {ranks} ranks that share them out"
        )
    return Layout(mesh, rows, class_dim), sequence_parallel


def _local(parameter: DTensor, layout: Layout) -> Tensor:
    """A parameter's local part; its gradient has the parameter's placements."""
    local = parameter.to_local(grad_placements=parameter.placements)
    return SumGradientOverRanks.apply(local, layout.groups()) if layout.row_dims else local


def _check_parameters(input: DTensor, linear_weight: Tensor, linear_bias: Tensor | None) -> DTensor:
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and not isinstance(tensor, DTensor):
            raise ArgumentTypeError(f"{name} is a plain tensor, expected a DTensor as the input")
    assert isinstance(linear_weight, DTensor)
    if input.dim() != 2 or linear_weight.dim() != 2:
        raise ArgumentValueError(
            f"input is a DTensor of shape {list(input.shape)} and linear_weight has shape {list(linear_weight.shape)}, "
            "expected (N, D) and (C, D)"
        )
    return linear_weight


class Local(NamedTuple):
    """A linear problem of DTensors as this rank's own."""

    data: Data
    options: SoftmaxOptions
    request: Request
    layout: Layout
    part: Part | None
    """Its classes, where they are shared out."""
    sequence_parallel: bool


def localised(
    data: Data,
    options: SoftmaxOptions,
    request: Request,
    chunking: Chunking,
    shift: bool,
    check_more: Callable[[], dict[str, Any]] = dict,
) -> Local:
    """What the ranks have agreed on; ``check_more``: what else has to be the same on every rank."""
    input, linear_weight, linear_bias, target = data
    assert isinstance(input, DTensor)

    def check() -> tuple[tuple[Problem, bool], dict[str, Any]]:
        weight = _check_parameters(input, linear_weight, linear_bias)
        check_tensors(target=target)
        check_shift(shift)
        layout, sequence_parallel = layout_of(input, weight)
        dtype = logits_dtype(input, weight, linear_bias)
        problem, same = check_problem(layout, input, weight.shape[0], target, options, request)
        same |= {"accumulate_dtype": chunking.check(dtype), "chunk_size": chunking.int_size}
        same |= {"dtype of the logits": dtype, "shift": shift, **check_more()}
        placed = {"linear_weight": weight, "linear_bias": linear_bias}
        same |= {f"placements of {name}": placements_of(x) for name, x in placed.items()}
        differentiable = {"input": input} | {name: x for name, x in placed.items() if x is not None}
        trains = torch.is_grad_enabled()
        same |= {f"whether {name} requires grad": trains and x.requires_grad for name, x in differentiable.items()}
        return (problem, sequence_parallel), same

    problem, sequence_parallel = agreed(input.device_mesh, input.device, check)
    assert isinstance(linear_weight, DTensor)
    layout = problem.layout
    if shift:
        problem = problem.shifted()
    g, own, asked = problem.local(input.shape[0])
    if isinstance(linear_bias, DTensor):
        linear_bias = _local(linear_bias.redistribute(placements=linear_weight.placements), layout)
    local = (input.to_local(grad_placements=input.placements), _local(linear_weight, layout), linear_bias, g)
    part = None if layout.class_dim is None else problem.part()
    return Local(local, own, asked, layout, part, sequence_parallel)


@untraced
def linear_cross_entropy(
    data: Data, options: SoftmaxOptions, request: Request, chunking: Chunking, shift: bool = False
) -> Any:
    """:func:`longtail.linear_cross_entropy` of a DTensor input."""
    found = localised(data, options, request, chunking, shift)
    given = (found.data, found.options, found.request, chunking)
    if found.part is None:
        result = loss.linear_cross_entropy(*given)
    else:
        result = vocab_linear.linear_cross_entropy(*given, found.part, found.sequence_parallel)
    return global_result(found.layout, result, data[0].shape[0], request.reduction)


@untraced
def linear_row_statistics(
    data: Data, options: SoftmaxOptions, temperature: float, chunking: Chunking, shift: bool
) -> RowStatistics:
    """:func:`longtail.linear_row_statistics` of a DTensor input; the statistics are DTensors over the rows."""
    input, request = data[0], vocab_statistics.requested()
    assert isinstance(input, DTensor)
    found = localised(data, options, request, chunking, shift, lambda: checked_temperature(input, options, temperature))
    given = (found.data, found.options, temperature, chunking)
    if found.part is None:
        result = statistics.row_statistics(*given, shift=False)
    else:
        result = vocab_statistics.linear_row_statistics(*given, found.part, found.sequence_parallel)
    return global_statistics(found.layout, result, input.shape[0])
