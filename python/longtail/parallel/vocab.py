"""Losses over classes that are shared out among ranks: tensor parallelism of the classifier.

    local logits --accumulate--> stats --all-gather, combine--> stats of rows --finish--> RowGrad --apply--> dlogits

Three passes over the local logits, one collective of a few numbers per row in forward, none in backward. Where only the
rank of a row's target knows what that brings to the logits of all classes, it says so in a collective before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..ops.autograd import SIGNATURE
from ..ops.gradient import (
    check_overwritable,
    gradient_divisor,
    guarded,
    reduce_loss,
    rows_of,
    scaled_gradient,
    shares,
)
from ..ops.layout import laid_out
from ..ops.vmap import refuse_vmap
from ..options import Request, SoftmaxOptions
from ..softmax.loss import check
from ..softmax.statistics import record
from .collectives import process_group, untraced
from .handshake import refuse
from .hierarchical import TreeArguments, shard_of
from .shard import Part, begin, check_rows, compared, with_vectors
from .stats import Gathered


@untraced
def cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    options: SoftmaxOptions,
    request: Request,
    part: Part,
    of_tree: TreeArguments | None = None,
) -> Any:
    """See :func:`longtail.vocab_parallel_cross_entropy`; with ``of_tree`` it is hierarchical cross-entropy."""
    tree, part = None, part._replace(group=process_group(part.group))
    try:
        options = check(local_logits, target, options, request)
        check_overwritable(local_logits, request.gradient)
        check_rows("local_logits", local_logits, target)
        dtype = arithmetic_dtype(local_logits.dtype)
        options = with_vectors(options, local_logits, target.shape, dtype)
        same: dict[str, Any] = {"dtype": local_logits.dtype, "rows": len(target), **compared(options, request)}
        if of_tree is not None:
            tree, part, of_both = of_tree.checked(dtype, part)
            same |= of_both
        same |= {"whether sample_weight is given": options.sample_weight is not None}
        g, handshake = begin(local_logits.shape[1], part, local_logits, target, options, request, same)
    except Exception as error:
        refuse(error, part.group, local_logits)
    with handshake:
        shard = shard_of(handshake, options, request.return_stats, tree, (local_logits.device, dtype))
        denominator = shard.denominator(request, g)
        wants_grad = torch.is_grad_enabled() and local_logits.requires_grad
        mode = request.gradient if wants_grad else "backward"  # nothing may be overwritten that nobody wants
        data = (laid_out(local_logits), g, denominator)
        loss, stats, *_ = VocabParallelLoss.apply(*data, request.reduction, mode, shard)
    return (loss, record(stats, g, options.ignore_index, g.shape)) if request.return_stats else loss


class VocabParallelLoss(torch.autograd.Function):
    """(logits, target, denominator, reduction, gradient, shard) -> (loss, stats, divisor, ...).

    What follows is for the context alone: in mode "backward" the rest of what ranks gather, in mode "forward" the
    gradient.
    """

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        logits, target, denominator, reduction, gradient, shard = inputs
        found = shard.accumulate(logits, target)
        loss, row_grad = shard.finish(found, target)
        ignored = target == shard.options.ignore_index
        if reduction == "mean":
            if denominator is None:
                assert found.w_g is not None
                denominator = found.w_g.masked_fill(ignored, 0.0).sum(dtype=torch.float64)
            denominator = denominator.to(loss.dtype)
        loss = reduce_loss(loss.masked_fill(ignored, 0.0), denominator, reduction)
        divisor = gradient_divisor(denominator)
        if gradient == "backward":
            return loss, found.stats, divisor, found.w_g, found.weight_sum, found.terms
        size = shard.size(target, logits.dtype, found.w_g, found.weight_sum, found.scales)
        factor, divisor = shares(divisor, size, loss.dtype, logits.device)
        assert factor is not None
        spent = shard.spent(row_grad, factor.expand(logits.shape[0]), found.terms)
        grad = shard.apply(logits, target, spent, gradient == "inplace")
        if gradient == "inplace":
            torch.autograd.graph.increment_version(logits)
            return loss, found.stats, divisor
        return loss, found.stats, divisor, grad  # an output, so that differentiating through it meets the refusal

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        logits, target, _, ctx.reduction, ctx.gradient, shard = inputs
        ctx.shard, constants = shard.parted()
        _, stats, divisor, *rest = output
        ctx.set_materialize_grads(False)
        if ctx.gradient == "backward":
            ctx.mark_non_differentiable(*(x for x in (stats, divisor, *rest) if x is not None))
            ctx.save_for_backward(logits, target, divisor, stats, *rest, *constants)
        else:
            ctx.mark_non_differentiable(*(x for x in (stats, divisor) if x is not None))
            ctx.save_for_backward(*(rest or [logits]), target, divisor)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_output is None:
            return (None,) * 6
        if ctx.gradient != "backward":
            return (scaled_gradient(ctx, grad_output, ctx.shard.options.ignore_index), *(None,) * 5)
        logits, target, divisor, stats, w_g, weight_sum, terms, *constants = ctx.saved_tensors
        shard = ctx.shard.joined(constants)
        _, row_grad = shard.finish(Gathered(stats, w_g, weight_sum), target)
        upstream = rows_of(grad_output, divisor, ctx.reduction, logits.shape[0])
        grad = shard.apply(logits, target, shard.spent(row_grad, upstream, terms), inplace=False)
        return (guarded(grad, grad_output, logits), *(None,) * 5)


VocabParallelLoss.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]
