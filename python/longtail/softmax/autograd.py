"""The softmax family under autograd; see :mod:`longtail.ops.autograd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import autograd, operators
from ..ops.vmap import refuse_vmap

SOFTMAX = autograd.Family(
    operators.softmax_loss,
    operators.softmax_loss_and_grad,
    operators.softmax_loss_and_grad_,
    operators.softmax_loss_backward,
    operators.softmax_mean,
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


SoftmaxLoss.forward.__signature__ = autograd.SIGNATURE  # type: ignore[attr-defined]
