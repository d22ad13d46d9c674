"""Row statistics over classes that are shared out among ranks: of local logits, and of hidden states.

    local logits --accumulate--> stats --all-gather, combine--> stats of rows --Record--> RowStatistics --any loss-->
    RowGrad --apply--> dlogits

A rank differentiates its own classes by its own copy of the loss: the same on every rank, if each writes the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype, check_choice, check_logits, check_tensors
from ..linear.chunks import Chunking
from ..linear.loss import Data
from ..ops.autograd import SIGNATURE
from ..ops.gradient import check_overwritable, guarded, take
from ..ops.layout import laid_out
from ..ops.vmap import refuse_vmap
from ..options import Request, SoftmaxOptions
from ..reference.row_statistics import RowStatistics
from ..softmax.statistics import GRADIENTS, checked_options, record
from .collectives import process_group, untraced
from .handshake import refuse
from .shard import Part, begin, check_rows, compared, make_shard, with_vectors
from .stats import Spent
from .sweep import gradients, sweep
from .vocab_linear import begin_linear


def requested(gradient: str = "backward") -> Request:
    """As of a loss of each row that also returns statistics."""
    return Request(reduction="none", gradient=gradient, return_stats=True)


@untraced
def row_statistics(
    local_logits: Tensor, target: Tensor, options: SoftmaxOptions, temperature: float, gradient: str, part: Part
) -> RowStatistics:
    """See :func:`longtail.vocab_parallel_row_statistics`."""
    part, request = part._replace(group=process_group(part.group)), requested(gradient)
    try:
        check_tensors(local_logits=local_logits, target=target)
        check_logits(local_logits)
        check_choice("gradient", gradient, GRADIENTS)
        dtype = arithmetic_dtype(local_logits.dtype)
        options = checked_options(options, temperature, dtype)
        check_overwritable(local_logits, gradient)
        check_rows("local_logits", local_logits, target)
        options = with_vectors(options, local_logits, target.shape, dtype)
        same = {"dtype": local_logits.dtype, "rows": len(target), "temperature": float(temperature)}
        same |= compared(options, request)
        g, handshake = begin(local_logits.shape[1], part, local_logits, target, options, request, same)
    except Exception as error:
        refuse(error, part.group, local_logits)
    with handshake:
        shard = make_shard(handshake, options, return_stats=True)
        stats, _ = VocabParallelRowStats.apply(laid_out(local_logits), g, gradient, shard)
    return record(stats, g, options.ignore_index, g.shape)


def _keep(ctx: Any, data: tuple[Any, ...], terms: Tensor | None, constants: tuple[Any, ...]) -> None:
    """For backward; ``terms``: the second output."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(x for x in (terms,) if x is not None))
    ctx.save_for_backward(*data, terms, *constants)


class VocabParallelRowStats(torch.autograd.Function):
    """(logits, target, gradient, shard) -> (stats [N, 5] of whole rows, terms), the latter for the context alone.

    "inplace": backward overwrites the logits.
    """

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor | None]:
        logits, target, _, shard = inputs
        found = shard.accumulate(logits, target)
        return found.stats, found.terms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        logits, target, ctx.gradient, shard = inputs
        ctx.shard, constants = shard.parted()
        _keep(ctx, (logits, target), output[1], constants)

    @staticmethod
    def backward(ctx: Any, row_grad: Tensor | None, _: None) -> tuple[Any, ...]:
        nothing = (None,) * 3
        if row_grad is None or not ctx.needs_input_grad[0]:
            return (None, *nothing)
        inplace = ctx.gradient == "inplace"
        logits, target, terms, *constants = take(ctx) if inplace else ctx.saved_tensors
        shard = ctx.shard.joined(constants)
        spent = Spent(row_grad.contiguous(), terms)
        grad = shard.apply(logits.detach() if inplace else logits, target, spent, inplace)
        if inplace:
            torch.autograd.graph.increment_version(grad)
        return (guarded(grad, row_grad, logits), *nothing)


VocabParallelRowStats.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]


@untraced
def linear_row_statistics(
    data: Data,
    options: SoftmaxOptions,
    temperature: float,
    chunking: Chunking,
    part: Part,
    sequence_parallel: bool,
    shift: bool = False,
) -> RowStatistics:
    """See :func:`longtail.vocab_parallel_linear_row_statistics`."""
    input, _, _, target = data
    part, request = part._replace(group=process_group(part.group)), requested()
    try:
        check_tensors(input=input, target=target)
        check_logits(input)
        options = checked_options(options, temperature, arithmetic_dtype(input.dtype))
        same = {"temperature": float(temperature)}
        work, handshake = begin_linear(data, options, request, chunking, part, sequence_parallel, shift, same)
    except Exception as error:
        refuse(error, part.group, input)
    with handshake:
        shard = make_shard(handshake, work.options, return_stats=True)
        setting = work.setting(chunking, request, shard)
        stats, _ = VocabParallelLinearRowStats.apply(*work.data, setting, shard, sequence_parallel)
    return record(stats, work.data[3], options.ignore_index, work.shape)


class VocabParallelLinearRowStats(torch.autograd.Function):
    """(input, linear_weight, linear_bias, target, setting, shard, sequence_parallel) -> (stats [N, 5], terms).

    Of whole rows; terms are for the context alone.
    """

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor | None]:
        *data, setting, shard, sequence_parallel = inputs
        found = sweep(data, setting, shard, sequence_parallel, None, None).found
        return found.stats, found.terms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        *data, ctx.setting, shard, ctx.sequence_parallel = inputs
        ctx.shard, constants = shard.parted()
        _keep(ctx, (*data,), output[1], constants)

    @staticmethod
    def backward(ctx: Any, row_grad: Tensor | None, _: None) -> tuple[Any, ...]:
        nothing, needs = (None,) * 4, ctx.needs_input_grad[:3]
        if row_grad is None or not any(needs):
            return (None, None, None, *nothing)
        saved = ctx.saved_tensors
        data, terms, shard = saved[:4], saved[4], ctx.shard.joined(saved[5:])
        shard.handshake.check_turn()
        grads = gradients(data, ctx.setting, shard, ctx.sequence_parallel, Spent(row_grad, terms))
        found = [guarded(x, row_grad, *data[:3]) if need else None for x, need in zip(grads, needs, strict=True)]
        return (*found, *nothing)


VocabParallelLinearRowStats.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]
