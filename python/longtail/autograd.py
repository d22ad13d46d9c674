"""The softmax family under autograd: one Function over the operators, for the three gradient modes.

"backward": forward reads the logits once; backward reads them once and writes the gradient once (3 passes).
"forward": loss and gradient in one sweep (2 passes); backward multiplies by the upstream gradient, which costs a scalar
read when it is 1. "inplace": as "forward", written over the logits.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from . import images, ops
from .reference import accumulate_dtype

# Inputs of SoftmaxLoss that precede the options of the operators.
_LEADING = 5


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
    """(logits, target, denominator, reduction, gradient, *options) -> (loss, stats[, grad]).

    ``denominator``: 0-d divisor of the sum of the row losses, or None. ``options``: those of the operators, in order.
    stats and grad are for the context alone and not differentiable.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        logits, target, denominator, reduction, gradient, *options = inputs
        if gradient == "backward":
            loss, *rest = ops.softmax_loss(logits, target, *options)
        else:
            factor = first_factor(logits, denominator)
            one_sweep = ops.softmax_loss_and_grad if gradient == "forward" else ops.softmax_loss_and_grad_
            loss, *rest = one_sweep(factor, logits, target, *options)
            if gradient == "inplace" and not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version(logits)
        return (reduce_loss(loss, denominator, reduction), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, denominator, ctx.reduction, ctx.gradient = inputs[:_LEADING]
        ctx.options = inputs[_LEADING + 4 :]
        ctx.folded = is_folded(logits, denominator)
        # The gradient stays differentiable in name, so that differentiating through it meets the refusal below; under
        # torch.compile, which refuses by itself, an unused differentiable output would cost a tangent of its size.
        kept = 3 if torch.compiler.is_compiling() else 2
        ctx.mark_non_differentiable(*output[1:kept])
        ctx.set_materialize_grads(False)
        if ctx.gradient == "backward":
            vectors = inputs[_LEADING : _LEADING + 4]
            ctx.save_for_backward(logits, target, denominator, output[1], *vectors)
        else:
            ctx.save_for_backward(output[2] if ctx.gradient == "forward" else logits, denominator)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_output is None or not ctx.needs_input_grad[0]:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.gradient == "backward":
            logits, target, denominator, stats, *vectors = ctx.saved_tensors
            upstream = rows_of(grad_output, denominator, ctx.reduction, images.row_count(logits))
            grad = ops.softmax_loss_backward(upstream, logits, target, stats, *vectors, *ctx.options)
            if torch.is_grad_enabled() and (grad_output.requires_grad or logits.requires_grad):
                grad = RefuseSecondDerivative.apply(grad, grad_output, logits)
        else:
            grad = scaled_gradient(ctx, grad_output)
        return (grad, *(None,) * (len(ctx.needs_input_grad) - 1))


SoftmaxLoss.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]


def is_folded(logits: Tensor, denominator: Tensor | None) -> bool:
    """Whether a gradient made in forward is divided by the mean's denominator there."""
    # In float16 it could underflow before the loss scale multiplies it.
    return denominator is not None and logits.dtype != torch.float16


def first_factor(logits: Tensor, denominator: Tensor | None) -> Tensor:
    """What multiplies the gradient of each row that is made in forward, [N] of stride 0."""
    factor = torch.ones((), dtype=accumulate_dtype(logits), device=logits.device)
    if denominator is not None and is_folded(logits, denominator):
        factor = factor / denominator
    return factor.expand(images.row_count(logits))


def reduce_loss(loss: Tensor, denominator: Tensor | None, reduction: str) -> Tensor:
    """Losses as they are, or for "sum" and "mean" their sum, over ``denominator`` where there is one."""
    if reduction not in ("sum", "mean"):
        return loss
    return loss.sum() if denominator is None else loss.sum() / denominator


def rows_of(grad_output: Tensor, denominator: Tensor | None, reduction: str, rows: int) -> Tensor:
    """The upstream gradient of each row loss, [N]; of stride 0 where the loss was reduced."""
    if reduction not in ("sum", "mean"):
        return grad_output
    return (grad_output if denominator is None else grad_output / denominator).expand(rows)


def scaled_gradient(ctx: Any, grad_output: Tensor) -> Tensor:
    """The gradient made in forward, times the upstream gradient, in place."""
    try:
        buffer, denominator = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            f"longtail: gradient={ctx.gradient!r} keeps one gradient buffer, which has been handed out or overwritten: "
            "backward can run once, and logits overwritten in place can not be changed before it. Use "
            'gradient="backward" to keep the graph'
        ) from error
    grad = buffer.detach()  # in place, the buffer is the logits themselves, with their history
    upstream = rows_of(grad_output, None if ctx.folded else denominator, ctx.reduction, images.row_count(grad))
    if upstream.dim() == grad.dim():
        grad.mul_(upstream)
    else:
        ops.scale_grad_(grad, upstream, None, -100)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(grad)
    if torch.is_grad_enabled() and (grad_output.requires_grad or buffer.requires_grad):
        grad = RefuseSecondDerivative.apply(grad, grad_output, buffer)
    return grad
