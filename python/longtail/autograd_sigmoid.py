"""The sigmoid family under autograd: one Function over its operators, for the gradient modes of the softmax family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import images, ops
from .autograd import (
    SIGNATURE,
    RefuseSecondDerivative,
    reduce_loss,
    rows_of,
    scaled_gradient,
)
from .no_vmap import refuse


class SigmoidLoss(torch.autograd.Function):
    """(logits, target, denominator, divisor, factor, *vectors, constants) -> (loss[, grad]).

    As in SoftmaxLoss, with three vectors. ``reduction``: "elements", "rows", "sum" or "mean".
    """

    vmap = staticmethod(refuse)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        logits, target, denominator, _, factor, *vectors, (reduction, gradient, *options) = inputs
        options = vectors + options
        elementwise = reduction == "elements"
        with ops.below_autograd():
            if gradient == "backward":
                outputs: tuple[Tensor, ...] = (ops.sigmoid_loss(logits, target, *options, elementwise),)
            else:
                data = (factor.expand(images.row_count(logits)), logits, target, *options, elementwise)
                if gradient == "forward":
                    outputs = ops.sigmoid_loss_and_grad(*data)
                else:
                    outputs = (ops.sigmoid_loss_and_grad_(*data),)
        if gradient == "inplace" and not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(logits)
        return (reduce_loss(outputs[0], denominator, reduction), *outputs[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, denominator, divisor, _, *vectors, (ctx.reduction, ctx.gradient, *ctx.options) = inputs
        if torch.compiler.is_compiling():
            ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        if ctx.gradient == "backward":
            divisor = denominator if divisor is None else divisor
            ctx.save_for_backward(logits, target, divisor, *vectors)
        else:
            ctx.save_for_backward(output[1] if ctx.gradient == "forward" else logits, target, divisor)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_output is None or not ctx.needs_input_grad[0]:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.gradient == "backward":
            logits, target, divisor, *vectors = ctx.saved_tensors
            upstream = rows_of(grad_output, divisor, ctx.reduction, images.row_count(logits))
            if ctx.reduction == "elements":
                upstream = upstream.contiguous()
            grad = ops.sigmoid_loss_backward(upstream, logits, target, *vectors, *ctx.options)
            if torch.is_grad_enabled() and (grad_output.requires_grad or logits.requires_grad):
                grad = RefuseSecondDerivative.apply(grad, grad_output, logits)
        else:
            grad = scaled_gradient(ctx, grad_output, ignore_index=ctx.options[1])
        return (grad, *(None,) * (len(ctx.needs_input_grad) - 1))


SigmoidLoss.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]
