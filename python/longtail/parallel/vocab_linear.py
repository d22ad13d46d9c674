"""Projection and loss in one where each rank holds the weights of its own classes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype, check_choice, check_local, check_tensors
from ..errors import ArgumentValueError
from ..linear.autograd import Setting, kept_gradients
from ..linear.chunks import Chunking, chunk_rows, spared
from ..linear.loss import (
    GRADIENTS,
    Data,
    check_gathered,
    check_one_loss,
    logits_dtype,
    needs_gradients,
)
from ..linear.shapes import rows_first, targets_of
from ..ops.autograd import SIGNATURE
from ..ops.gradient import gradient_divisor, guarded, reduce_loss, rows_of, shares
from ..ops.vmap import refuse_vmap
from ..options import Request, SoftmaxOptions
from ..softmax.loss import check
from ..softmax.statistics import record
from .collectives import process_group, untraced
from .handshake import Handshake, refuse
from .hierarchical import TreeArguments, shard_of
from .shard import Part, Shard, begin, compared, with_vectors
from .stats import Gathered
from .sweep import sweep


class Work(NamedTuple):
    """A linear problem over shared-out classes, checked."""

    data: Data
    """input [n, D], linear_weight, linear_bias, target [N] int64"""
    shape: torch.Size
    """Of the targets, as users give them."""
    options: SoftmaxOptions
    """Checked, with vectors."""
    dtype: torch.dtype
    """Of the logits."""
    total_dtype: torch.dtype
    needs: tuple[bool, bool, bool]
    """Whether input, weight and bias need a gradient."""

    def setting(self, chunking: Chunking, request: Request, shard: Shard) -> Setting:
        """With chunks that are as many on each rank."""
        input, linear_weight, _, target = self.data
        any_needs = any(self.needs)
        most = -(-shard.total // shard.handshake.world)  # what every rank computes alike
        spares = spared(most * input.shape[1], self.dtype, self.total_dtype, linear_weight.dtype) if any_needs else 0
        size = chunking.size or chunk_rows(len(target), most, self.dtype.itemsize, input.device.type, spares)
        keeps = any_needs and request.reduction != "none" and request.gradient != "backward"
        mode = "forward" if keeps else "backward"
        return Setting(request.reduction, mode, size, self.dtype, self.total_dtype, self.needs)


def begin_linear(
    data: Data,
    options: SoftmaxOptions,
    request: Request,
    chunking: Chunking,
    part: Part,
    sequence_parallel: bool,
    shift: bool,
    same: dict[str, Any],
) -> tuple[Work, Handshake]:
    """What is to be computed, and its handshake. ``options``: checked; ``same``: as of :func:`begin`."""
    input, linear_weight, linear_bias, target = data
    rows = _check_data(*data, torch.distributed.get_world_size(part.group) if sequence_parallel else 1)
    target, options = targets_of(input, target, rows, options, shift)
    dtype = logits_dtype(input, linear_weight, linear_bias)
    total_dtype = chunking.check(dtype)
    options = with_vectors(options, input, rows, arithmetic_dtype(dtype))
    needs = needs_gradients(input, linear_weight, linear_bias)
    same = {"dtype of the logits": dtype, "dtype of input": input.dtype, **same}
    same |= {"dtype of linear_weight": linear_weight.dtype}
    same |= {"rows": target.numel(), "features": input.shape[-1], "accumulate_dtype": total_dtype}
    same |= compared(options, request)
    same |= {"sequence_parallel": bool(sequence_parallel), "chunk_size": chunking.int_size}
    same |= {
        "whether sample_weight is given": options.sample_weight is not None,
        "whether linear_bias is given": linear_bias is not None,
    }
    same |= {"whether input requires grad": needs[0], "whether anything requires grad": any(needs)}
    same |= {"shape of target": tuple(rows), "shift": shift}
    g, handshake = begin(linear_weight.shape[0], part, input, target.reshape(-1), options, request, same)
    flat = (rows_first(input), linear_weight, linear_bias, g)
    return Work(flat, rows, options, dtype, total_dtype, needs), handshake


@untraced
def linear_cross_entropy(
    data: Data,
    options: SoftmaxOptions,
    request: Request,
    chunking: Chunking,
    part: Part,
    sequence_parallel: bool,
    shift: bool = False,
    of_tree: TreeArguments | None = None,
) -> Any:
    """See :func:`longtail.vocab_parallel_linear_cross_entropy`; with ``of_tree`` it is hierarchical cross-entropy."""
    input, linear_weight, linear_bias, target = data
    same: dict[str, Any] = {}
    tree, part = None, part._replace(group=process_group(part.group))
    try:
        check_choice("gradient", request.gradient, GRADIENTS)
        options = check(input, target, options, request.of_logits())
        check_one_loss(request)
        if of_tree is not None:
            _check_parameters(linear_weight, linear_bias)
            dtype = arithmetic_dtype(logits_dtype(input, linear_weight, linear_bias))
            tree, part, of_both = of_tree.checked(dtype, part)
            same |= of_both
        work, handshake = begin_linear(data, options, request, chunking, part, sequence_parallel, shift, same)
    except Exception as error:
        refuse(error, part.group, input)
    with handshake:
        g, shape = work.data[3], work.shape
        like = input.device, arithmetic_dtype(work.dtype)
        shard = shard_of(handshake, work.options, request.return_stats, tree, like)
        denominator = shard.denominator(request, g)
        if denominator is not None:
            denominator = denominator.to(arithmetic_dtype(work.dtype))
        setting = work.setting(chunking, request, shard)
        inputs = (*work.data, denominator, setting, shard, sequence_parallel)
        loss, stats, *_ = VocabParallelLinearLoss.apply(*inputs)
    if request.reduction == "none":
        loss = loss.reshape(shape)
    return (loss, record(stats, g, options.ignore_index, shape)) if request.return_stats else loss


def _check_parameters(linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    check_tensors(linear_weight=linear_weight)
    if linear_bias is not None:
        check_tensors(linear_bias=linear_bias)


def _check_data(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, row_ranks: int
) -> torch.Size:
    """The shape that the targets have to have."""
    _check_parameters(linear_weight, linear_bias)
    check_local(input=input, linear_weight=linear_weight, target=target, linear_bias=linear_bias)
    check_gathered("linear_weight", linear_weight)
    if input.dim() < 2 or linear_weight.dim() != 2 or input.shape[-1] != linear_weight.shape[1]:
        raise ArgumentValueError(
            f"input has shape {list(input.shape)} and linear_weight {list(linear_weight.shape)}, expected (N, D) and "
            "(C_local, D)"
        )
    rows = torch.Size((input.shape[0] * row_ranks, *input.shape[1:-1]))
    if row_ranks > 1 and target.shape != rows:
        raise ArgumentValueError(
            f"target has shape {list(target.shape)}, expected {list(rows)}: {row_ranks} ranks with "
            f"{input.shape[0]} rows of input each"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        check_gathered("linear_bias", linear_bias)
        raise ArgumentValueError(
            f"linear_bias has shape {list(linear_bias.shape)}, expected {list(linear_weight.shape[:1])}"
        )
    return rows


class VocabParallelLinearLoss(torch.autograd.Function):
    """(input, linear_weight, linear_bias, target, denominator, setting, shard, sequence_parallel) -> (loss, stats, ...)

    For the context alone follow the divisor of the upstream gradient and, in mode "backward" the rest of what ranks
    gather, in mode "forward" the gradients of the first three.
    """

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        *data, denominator, setting, shard, sequence_parallel = inputs
        rows, target, wide = len(data[3]), data[3], arithmetic_dtype(setting.dtype)
        divisor, upstream = gradient_divisor(denominator), None
        if setting.gradient == "forward":
            size = shard.size_ahead(target, setting.dtype)
            factor, divisor = shares(divisor, size, wide, data[0].device)
            assert factor is not None
            upstream = factor.expand(rows)
        loss, found, grads = sweep(data, setting, shard, sequence_parallel, upstream, None)
        if setting.reduction == "mean" and denominator is None:
            assert found.w_g is not None
            ignored = target == shard.options.ignore_index
            denominator = found.w_g.masked_fill(ignored, 0.0).sum(dtype=torch.float64).to(loss.dtype)
            late = gradient_divisor(denominator)
            assert late is not None
            divisor = late if divisor is None else divisor * late
        loss = reduce_loss(loss, denominator, setting.reduction)
        kept = (found.w_g, found.weight_sum, found.terms) if grads is None else grads
        return loss, found.stats, divisor, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *data, _, ctx.setting, shard, ctx.sequence_parallel = inputs
        ctx.shard, constants = shard.parted()
        _, stats, divisor, *rest = output
        ctx.gradient, ctx.dtypes = ctx.setting.gradient, (data[0].dtype, data[1].dtype)
        ctx.rows = ctx.shard.local_rows(len(data[3])) if ctx.sequence_parallel else slice(None)
        ctx.set_materialize_grads(False)
        if ctx.gradient == "forward":
            ctx.mark_non_differentiable(*(x for x in (stats, divisor) if x is not None))
            ctx.save_for_backward(data[3], divisor, *rest)
        else:
            ctx.mark_non_differentiable(*(x for x in (stats, divisor, *rest) if x is not None))
            ctx.save_for_backward(*data, divisor, stats, *rest, *constants)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        rest = (None,) * 5
        if grad_output is None or not any(ctx.needs_input_grad):
            return (None, None, None, *rest)
        if ctx.gradient == "forward":
            return (*kept_gradients(ctx, grad_output, ctx.shard.options.ignore_index), *rest)
        saved = ctx.saved_tensors  # of a checkpoint they are there once
        *data, divisor, stats, w_g, weight_sum, terms = saved[:9]
        shard = ctx.shard.joined(saved[9:])
        shard.handshake.check_turn()
        upstream = rows_of(grad_output, divisor, ctx.setting.reduction, len(data[3]))
        known = Gathered(stats, w_g, weight_sum, terms)
        grads = sweep(data, ctx.setting, shard, ctx.sequence_parallel, upstream, known).grads
        assert grads is not None
        needs = ctx.needs_input_grad[:3]
        found = [guarded(x, grad_output, *data[:3]) if need else None for x, need in zip(grads, needs, strict=True)]
        return (*found, *rest)


VocabParallelLinearLoss.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]
