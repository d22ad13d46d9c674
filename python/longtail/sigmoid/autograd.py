"""The sigmoid family under autograd; see :mod:`longtail.ops.autograd`. Losses of elements: reduction "elements"."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import autograd, operators
from ..ops.vmap import refuse_vmap

SIGMOID = autograd.Family(
    operators.sigmoid_loss,
    operators.sigmoid_loss_and_grad,
    operators.sigmoid_loss_and_grad_,
    operators.sigmoid_loss_backward,
    operators.sigmoid_mean,
    statistics=0,
)


class SigmoidLoss(torch.autograd.Function):
    """(logits, target, denominator, divisor, factor, *vectors, constants) -> (loss[, grad])."""

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return autograd.forward(SIGMOID, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        autograd.setup_context(SIGMOID, ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return autograd.backward(SIGMOID, ctx, grad_output)


SigmoidLoss.forward.__signature__ = autograd.SIGNATURE  # type: ignore[attr-defined]
