"""Projection and loss in one where each rank holds the weights of its own classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments
from .autograd import SIGNATURE, reduce_loss, rows_of
from .distributed import Group, process_group, untraced
from .errors import ArgumentValueError
from .functional import check_options
from .handshake import Handshake, refuse
from .kept_gradient import gradient_divisor, shares
from .linear_autograd import Setting, guarded, kept_gradients
from .linear_chunks import arithmetic_dtype, chunk_rows
from .linear_cross_entropy import GRADIENTS, check_chunks, check_gathered, logits_dtype
from .no_vmap import refuse as refuse_vmap
from .softmax_loss import row_stats
from .vocab_parallel_sweep import sweep
from .vocab_shard import check_rows, check_targets, class_vectors, compared, make_shard, propose
from .vocab_stats import Gathered


@untraced
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: Group = None,
    class_start: int | None = None,
    num_classes: int | None = None,
    sequence_parallel: bool = False,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    complement_gamma: float = 0.0,
    class_bias: Tensor | None = None,
    class_margin: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: str | float | Tensor | None = None,
    gradient: str = "auto",
    chunk_size: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    return_stats: bool = False,
) -> Any:
    r""":func:`longtail.linear_cross_entropy` with the rows of the weight shared out over the ranks of a process group.

    Every rank passes the same input and targets and its own classes, and gets the same loss, bit for bit. A rank holds
    one chunk of local logits. Each chunk exchanges 3 to 6 numbers per row, and sums the gradient of its input over the
    ranks once, while the next chunk is computed.

    Args:
        input: (N, D), the same on every rank; with ``sequence_parallel``, this rank's N / P of the N rows.
        linear_weight: (C_local, D), this rank's classes; ``linear_bias`` (C_local,).
        target: (N,) class indices of all rows, in the order of the ranks; the same on every rank.
        sequence_parallel: the rows of ``input`` are shared out: they are gathered a chunk at a time, and their gradient
            is reduced and scattered.
        group, class_start, num_classes: as in :func:`longtail.vocab_parallel_cross_entropy`; so are all options of the
            loss, ``sample_weight`` (N,) and class vectors (of all classes or of this rank's), and what ranks compare.
        gradient, chunk_size, accumulate_dtype: as in :func:`longtail.linear_cross_entropy`. The default chunk_size is
            that for C / P classes; with ``sequence_parallel`` it is rounded to a multiple of P.

    The gradient of the input is summed over the ranks in the input's dtype (float16 that is kept for backward: in
    ``accumulate_dtype``), by torch.distributed: it is the same on every rank, but its last bits depend on how the
    backend orders the sum.

    With ``gradient="backward"`` the backward passes of several losses run in the same order on every rank.

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.vocab_parallel_cross_entropy`, on every rank.
        RuntimeError: in backward, ranks differentiate different calls; on a GPU an assertion.
    """
    group = process_group(group)
    world = torch.distributed.get_world_size(group)
    options: dict[str, Any] = {
        "label_smoothing": label_smoothing,
        "focal_gamma": focal_gamma,
        "complement_gamma": complement_gamma,
        "scale": scale,
        "softcap": softcap,
        "z_loss": z_loss,
    }
    try:
        arguments.check_choice("gradient", gradient, GRADIENTS)
        mode = "backward" if gradient == "auto" else gradient
        numbers = check_options(input, target, ignore_index, reduction, normalizer, mode, **options)
        if gradient in ("forward", "inplace") and reduction == "none":
            raise ValueError(f'gradient={gradient!r} needs one scalar loss, expected reduction "mean" or "sum"')
        _check_data(input, linear_weight, linear_bias, target, world if sequence_parallel else 1)
        dtype = logits_dtype(input, linear_weight, linear_bias)
        total_dtype = check_chunks(chunk_size, accumulate_dtype, dtype)
        vectors = class_vectors(input, weight, class_bias, class_margin)
        v = arguments.vector("sample_weight", sample_weight, target.shape, input, arithmetic_dtype(dtype))
        bias_trains = linear_bias is not None and linear_bias.requires_grad
        trains = torch.is_grad_enabled()
        needs = (trains and input.requires_grad, trains and linear_weight.requires_grad, trains and bias_trains)
        same: dict[str, Any] = {"dtype of the logits": dtype, "dtype of input": input.dtype}
        same |= {"rows": len(target), "features": input.shape[1], "accumulate_dtype": total_dtype}
        same |= compared(numbers, ignore_index, reduction, normalizer, gradient, return_stats)
        same |= {"sequence_parallel": bool(sequence_parallel)}
        same |= {"chunk_size": None if chunk_size is None else int(chunk_size)}
        same |= {
            "whether sample_weight is given": v is not None,
            "whether linear_bias is given": linear_bias is not None,
        }
        same |= {"whether input requires grad": needs[0], "whether anything requires grad": any(needs)}
        proposal = propose(linear_weight.shape[0], class_start, num_classes, group, vectors, same)
        g = arguments.class_indices(target, input)
        check_targets(g, ignore_index, proposal.total)
        handshake = Handshake(proposal, group, g, normalizer)
    except Exception as error:
        refuse(error, group, input)
    with handshake:
        shard = make_shard(handshake, numbers, ignore_index, vectors, v, return_stats)
        denominator = shard.denominator(reduction, normalizer, g)
        if denominator is not None:
            denominator = denominator.to(arithmetic_dtype(dtype))
        size = chunk_size or chunk_rows(len(g), -(-shard.total // world), dtype.itemsize, input.device.type)
        keeps = any(needs) and reduction != "none" and gradient != "backward"
        setting = Setting(reduction, "forward" if keeps else "backward", size, dtype, total_dtype, needs)
        data = (input, linear_weight, linear_bias, g, denominator)
        loss, stats, *_ = VocabParallelLinearSoftmaxLoss.apply(*data, setting, shard, sequence_parallel)
    return (loss, row_stats(stats, g, ignore_index, g.shape)) if return_stats else loss


def _check_data(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, row_ranks: int
) -> None:
    arguments.check_tensors(linear_weight=linear_weight)
    check_gathered("linear_weight", linear_weight)
    if input.dim() != 2 or linear_weight.dim() != 2 or input.shape[1] != linear_weight.shape[1]:
        raise ArgumentValueError(
            f"input has shape {list(input.shape)} and linear_weight {list(linear_weight.shape)}, expected (N, D) and "
            "(C_local, D)"
        )
    if row_ranks == 1:
        check_rows("input", input, target)
    elif target.shape != (input.shape[0] * row_ranks,):
        raise ArgumentValueError(
            f"target has shape {list(target.shape)}, expected {[input.shape[0] * row_ranks]}: {row_ranks} ranks with "
            f"{input.shape[0]} rows of input each"
        )
    else:
        arguments.class_indices(target, input)
    if linear_bias is not None:
        arguments.check_tensors(linear_bias=linear_bias)
        if linear_bias.shape != linear_weight.shape[:1]:
            check_gathered("linear_bias", linear_bias)
            raise ArgumentValueError(
                f"linear_bias has shape {list(linear_bias.shape)}, expected {list(linear_weight.shape[:1])}"
            )


class VocabParallelLinearSoftmaxLoss(torch.autograd.Function):
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
            ignored = target == shard.ignore_index
            denominator = found.w_g.masked_fill(ignored, 0.0).sum(dtype=torch.float64).to(loss.dtype)
            late = gradient_divisor(denominator)
            assert late is not None
            divisor = late if divisor is None else divisor * late
        loss = reduce_loss(loss, denominator, setting.reduction)
        kept = (found.w_g, found.weight_sum) if grads is None else grads
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
            return (*kept_gradients(ctx, grad_output, ctx.shard.ignore_index), *rest)
        saved = ctx.saved_tensors  # of a checkpoint they are there once
        *data, divisor, stats, w_g, weight_sum = saved[:8]
        shard = ctx.shard.joined(saved[8:])
        shard.handshake.check_turn()
        upstream = rows_of(grad_output, divisor, ctx.setting.reduction, len(data[3]))
        known = Gathered(stats, w_g, weight_sum)
        grads = sweep(data, ctx.setting, shard, ctx.sequence_parallel, upstream, known).grads
        assert grads is not None
        needs = ctx.needs_input_grad[:3]
        found = [guarded(x, grad_output, *data[:3]) if need else None for x, need in zip(grads, needs, strict=True)]
        return (*found, *rest)


VocabParallelLinearSoftmaxLoss.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]
