"""The softmax family over classes that are shared out among ranks: tensor parallelism of the classifier.

    local logits --accumulate--> stats --all-gather, combine--> stats of rows --finish--> RowGrad --apply--> dlogits

Three passes over the local logits, one collective of a few numbers per row in forward, none in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arguments, reference
from .autograd import SIGNATURE, RefuseSecondDerivative, reduce_loss, rows_of, scaled_gradient
from .distributed import Group, process_group, untraced
from .functional import check_options
from .handshake import Handshake, refuse
from .kept_gradient import check_overwritable, gradient_divisor, shares
from .no_vmap import refuse as refuse_vmap
from .softmax_loss import row_stats
from .vocab_shard import check_rows, check_targets, class_vectors, compared, make_shard, propose
from .vocab_stats import Gathered


@untraced
def vocab_parallel_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    group: Group = None,
    class_start: int | None = None,
    num_classes: int | None = None,
    focal_gamma: float = 0.0,
    complement_gamma: float = 0.0,
    class_bias: Tensor | None = None,
    class_margin: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: str | float | Tensor | None = None,
    gradient: str = "backward",
    return_stats: bool = False,
) -> Any:
    r""":func:`longtail.cross_entropy` of logits whose classes are shared out over the ranks of a process group.

    Every rank calls it with its own classes and the same targets, and gets the same loss, bit for bit. Forward reads
    the local logits once and exchanges 3 to 6 numbers per row in one all-gather; backward reads them once, writes their
    gradient and exchanges nothing. The gradient is that of the local logits: a row-parallel layer before them has to
    sum the gradients of its input over the group, as tensor parallelism does.

    Args:
        local_logits: (N, C_local), this rank's classes, any number of them, 0 included; float64, float32, bfloat16 or
            float16, the same on every rank.
        target: class indices in [0, C) or ``ignore_index``, (N,), int64 or uint8; the same on every rank.
        weight, class_bias, class_margin: of all classes, (C,), or of this rank's, (C_local,); each vector is given the
            same way on every rank (and of all classes where one rank holds them all).
        group: a ``torch.distributed`` process group, or a 1-D DeviceMesh. Default: the default group.
        class_start: this rank's first class. Default: ranks hold consecutive classes in rank order.
        num_classes: C, the sum of the C_local. Required where the group has more than one rank: ranks that each pass
            the logits of all classes would otherwise get a wrong loss, about log(world size) too large, without a word.
        gradient: "backward"; "forward" makes the gradient with the loss, and "inplace" writes it over
            ``local_logits``. They pass over the logits three times as "backward" does, and save memory only.
        ignore_index, reduction, label_smoothing, focal_gamma, complement_gamma, scale, softcap, z_loss, sample_weight,
            normalizer, return_stats: as in :func:`longtail.cross_entropy`, the same on every rank. Label smoothing and
            complement_gamma count all C classes.

    Every call compares dtypes, shapes, ranges of classes, options and a checksum of the targets inside that all-gather.
    On the CPU what is wrong is raised on every rank. On a GPU it is where the rank meets a head (C_local, class_start,
    num_classes) for the first time; later calls compare on the device, without a host sync, and assert. A second
    all-gather is made by a message longer than those of the group's last calls, by arguments that a rank refuses, and
    where ranges without ``class_start`` are neither an even split nor those of the last such head: the CPU then finds
    the right ones, and so does a GPU if all ranks meet the head for the first time. torch.compile breaks its graph
    at this call.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a shape, device or value does not fit; the ranks' classes overlap, leave some out or are not
            num_classes, or their options differ: on every rank, with the same text; no process group.
        IndexError: on the CPU, a target is out of bounds; names the row and the value.
        torch.distributed.DistBackendError, RuntimeError: another rank is gone (torch.distributed's own error, at the
            latest after the group's timeout).
    """
    options: dict[str, Any] = {
        "label_smoothing": label_smoothing,
        "focal_gamma": focal_gamma,
        "complement_gamma": complement_gamma,
        "scale": scale,
        "softcap": softcap,
        "z_loss": z_loss,
    }
    group = process_group(group)
    try:
        numbers = check_options(local_logits, target, ignore_index, reduction, normalizer, gradient, **options)
        check_overwritable(local_logits, gradient)
        check_rows("local_logits", local_logits, target)
        vectors = class_vectors(local_logits, weight, class_bias, class_margin)
        wide = reference.accumulate_dtype(local_logits)
        v = arguments.vector("sample_weight", sample_weight, target.shape, local_logits, wide)
        same: dict[str, Any] = {"dtype": local_logits.dtype, "rows": len(target)}
        same |= compared(numbers, ignore_index, reduction, normalizer, gradient, return_stats)
        same |= {"whether sample_weight is given": v is not None}
        proposal = propose(local_logits.shape[1], class_start, num_classes, group, vectors, same)
        g = arguments.class_indices(target, local_logits)
        check_targets(g, ignore_index, proposal.total)
        handshake = Handshake(proposal, group, g, normalizer)
    except Exception as error:
        refuse(error, group, local_logits)
    with handshake:
        shard = make_shard(handshake, numbers, ignore_index, vectors, v, return_stats)
        denominator = shard.denominator(reduction, normalizer, g)
        wants_grad = torch.is_grad_enabled() and local_logits.requires_grad
        mode = gradient if wants_grad else "backward"  # nothing may be overwritten by a gradient that nobody wants
        data = (arguments.laid_out(local_logits), g, denominator)
        loss, stats, *_ = VocabParallelSoftmaxLoss.apply(*data, reduction, mode, shard)
    return (loss, row_stats(stats, g, ignore_index, g.shape)) if return_stats else loss


class VocabParallelSoftmaxLoss(torch.autograd.Function):
    """(logits, target, denominator, reduction, gradient, shard) -> (loss, stats, divisor, ...).

    What follows is for the context alone: in mode "backward" the rest of what ranks gather, in mode "forward" the
    gradient.
    """

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        logits, target, denominator, reduction, gradient, shard = inputs
        found = shard.accumulate(logits, target)
        loss, row_grad = shard.loss_and_row_grad(found)
        ignored = target == shard.ignore_index
        if reduction == "mean":
            if denominator is None:
                assert found.w_g is not None
                denominator = found.w_g.masked_fill(ignored, 0.0).sum(dtype=torch.float64)
            denominator = denominator.to(loss.dtype)
        loss = reduce_loss(loss.masked_fill(ignored, 0.0), denominator, reduction)
        divisor = gradient_divisor(denominator)
        if gradient == "backward":
            return loss, found.stats, divisor, found.w_g, found.weight_sum
        size = shard.size(target, logits.dtype, found.w_g, found.weight_sum)
        factor, divisor = shares(divisor, size, loss.dtype, logits.device)
        assert factor is not None
        upstream = factor.expand(logits.shape[0])
        grad = shard.apply(logits, target, row_grad, upstream, gradient == "inplace")
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
            return (scaled_gradient(ctx, grad_output, ctx.shard.ignore_index), *(None,) * 5)
        logits, target, divisor, stats, w_g, weight_sum, *constants = ctx.saved_tensors
        shard = ctx.shard.joined(constants)
        _, row_grad = shard.loss_and_row_grad(Gathered(stats, w_g, weight_sum))
        upstream = rows_of(grad_output, divisor, ctx.reduction, logits.shape[0])
        grad = shard.apply(logits, target, row_grad, upstream, inplace=False)
        if torch.is_grad_enabled() and (grad_output.requires_grad or logits.requires_grad):
            grad = RefuseSecondDerivative.apply(grad, grad_output, logits)
        return (grad, *(None,) * 5)


VocabParallelSoftmaxLoss.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]
