"""The softmax family under autograd: one Function over the operators, for the three gradient modes.

"backward": forward reads the logits once; backward reads them once and writes the gradient once (3 passes).
"forward": loss and gradient in one sweep (2 passes); backward multiplies by the upstream gradient, which costs a scalar
read when it is 1 (of float16 logits always a pass more). "inplace": as "forward", written over the logits.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from . import images, ops
from .kept_gradient import own, scale_rows_, take
from .no_vmap import refuse

# What Function.apply binds arguments against at every call: building it anew costs as much as a small loss.
SIGNATURE = inspect.Signature([inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)])


class RefuseSecondDerivative(torch.autograd.Function):
    """Passes a gradient on; differentiating it again raises instead of giving silent zeros."""

    @staticmethod
    def forward(grad: Tensor, *_inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: the backward only raises."""

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> Any:
        raise RuntimeError(
            "longtail: second derivatives of the fused losses are not implemented; longtail.reference.cross_entropy "
            "and longtail.reference.sigmoid_loss are plain PyTorch and differentiable twice"
        )


class SoftmaxLoss(torch.autograd.Function):
    """(logits, target, denominator, divisor, factor, *vectors, constants) -> (loss, stats[, grad]).

    ``denominator``: 0-d divisor of the sum of the row losses, or None; ``factor``: of the gradient that forward makes;
    ``divisor``: of the upstream gradient in backward, where None is what is left to divide by: nothing if forward made
    the gradient, else ``denominator``. ``vectors``: the operators' four. ``constants``: (reduction, gradient, *the rest
    of the operators' options), one argument, for each costs time. stats and grad are for the context alone.
    """

    vmap = staticmethod(refuse)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        logits, target, denominator, _, factor, *vectors, (reduction, gradient, *options) = inputs
        options = vectors + options
        if gradient == "backward":
            with ops.below_autograd():
                loss, *rest = ops.softmax_loss(logits, target, *options)
        else:
            one_sweep = ops.softmax_loss_and_grad if gradient == "forward" else ops.softmax_loss_and_grad_
            with ops.below_autograd():
                loss, *rest = one_sweep(factor.expand(images.row_count(logits)), logits, target, *options)
            if gradient == "inplace" and not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version(logits)
        return (reduce_loss(loss, denominator, reduction), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, denominator, divisor, _, *vectors, (ctx.reduction, ctx.gradient, *ctx.options) = inputs
        # The gradient stays differentiable in name, so that differentiating through it meets the refusal below; under
        # torch.compile, which refuses by itself, an unused differentiable output would cost a tangent of its size.
        kept = 3 if torch.compiler.is_compiling() else 2
        ctx.mark_non_differentiable(*output[1:kept])
        ctx.set_materialize_grads(False)
        if ctx.gradient == "backward":
            divisor = denominator if divisor is None else divisor
            ctx.save_for_backward(logits, target, divisor, output[1], *vectors)
        else:
            ctx.save_for_backward(output[2] if ctx.gradient == "forward" else logits, target, divisor)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_output is None or not ctx.needs_input_grad[0]:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.gradient == "backward":
            logits, target, divisor, stats, *vectors = ctx.saved_tensors
            upstream = rows_of(grad_output, divisor, ctx.reduction, images.row_count(logits))
            grad = ops.softmax_loss_backward(upstream, logits, target, stats, *vectors, *ctx.options)
            if torch.is_grad_enabled() and (grad_output.requires_grad or logits.requires_grad):
                grad = RefuseSecondDerivative.apply(grad, grad_output, logits)
        else:
            grad = scaled_gradient(ctx, grad_output, ignore_index=ctx.options[0])
        return (grad, *(None,) * (len(ctx.needs_input_grad) - 1))


SoftmaxLoss.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]


def reduce_loss(loss: Tensor, denominator: Tensor | None, reduction: str) -> Tensor:
    """Losses as they are, or for "sum" and "mean" their sum, over ``denominator`` where there is one."""
    if reduction not in ("sum", "mean"):
        return loss
    return loss.sum() if denominator is None else loss.sum() / denominator


def differentiable_reduction(loss: Tensor, denominator: Tensor | None, reduction: str) -> Tensor:
    """:func:`reduce_loss` for autograd to differentiate: a mean over nothing has the gradient 0, not 0 / 0."""
    if denominator is None:
        return reduce_loss(loss, None, reduction)
    total, empty = loss.sum(), denominator == 0
    return torch.where(empty, total.detach() / denominator, total / denominator.masked_fill(empty, 1))


def rows_of(grad_output: Tensor, divisor: Tensor | None, reduction: str, rows: int) -> Tensor:
    """The upstream gradient of each row loss, [N]; of stride 0 where the loss was reduced."""
    upstream = grad_output if divisor is None else grad_output / divisor
    return upstream.expand(rows) if reduction in ("sum", "mean") else upstream


def scaled_gradient(ctx: Any, grad_output: Tensor, ignore_index: int | None) -> Tensor:
    """The gradient made in forward, times the upstream gradient, in place."""
    buffer, target, divisor = take(ctx)
    grad = own(buffer)
    upstream = rows_of(grad_output, divisor, ctx.reduction, images.row_count(grad))
    scale_rows_(grad, upstream, target, ignore_index)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(grad)
    if torch.is_grad_enabled() and (grad_output.requires_grad or buffer.requires_grad):
        grad = RefuseSecondDerivative.apply(grad, grad_output, buffer)
    return grad
