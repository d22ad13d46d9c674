"""The softmax family under autograd; see :mod:`longtail.ops.autograd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import autograd, operators
from ..ops.gradient import guarded
from ..ops.layout import row_count
from ..ops.vmap import refuse_vmap
from ..options import SoftmaxOptions

SOFTMAX = autograd.Family(
    operators.softmax_loss,
    operators.softmax_loss_and_grad,
    operators.softmax_loss_and_grad_,
    operators.softmax_loss_backward,
    statistics=1,
)


class SoftmaxLoss(torch.autograd.Function):
    """(logits, target, denominator, divisor, factor, *vectors, constants) -> (loss, stats[, grad])."""

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return autograd.forward(SOFTMAX, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        autograd.setup_context(SOFTMAX, ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return autograd.backward(SOFTMAX, ctx, grad_output)


def softmax_mean(logits: Tensor, target: Tensor, options: SoftmaxOptions, count: bool) -> Any:
    """The mean alone, where :func:`longtail.ops.operators.mean_at_once` says so, as that operator has it."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return autograd.apply(SoftmaxMean, logits, target, options, count)
    mean, *_ = operators.softmax_mean(logits, target, *options, count)
    return mean


class SoftmaxMean(torch.autograd.Function):
    """(logits, target, options, count) -> mean."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, options: SoftmaxOptions, count: bool) -> Tensor:
        mean, stats, divisor = operators.softmax_mean(logits, target, *options, count)
        vectors, ctx.options = options.parted()
        ctx.save_for_backward(logits, target, divisor, stats, *vectors)
        ctx.set_materialize_grads(False)
        return mean

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
        if grad_output is None:
            return None, None, None, None
        logits, target, divisor, *rest = ctx.saved_tensors
        upstream = (grad_output / divisor).expand(row_count(logits))
        grad = operators.softmax_loss_backward(upstream, logits, target, *rest, *ctx.options)
        return guarded(grad, grad_output, logits), None, None, None


SoftmaxLoss.forward.__signature__ = autograd.SIGNATURE  # type: ignore[attr-defined]
