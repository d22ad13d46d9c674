"""ZLPR and the two-way loss under autograd; see :mod:`longtail.ops.autograd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import autograd, operators
from ..ops.vmap import refuse_vmap

TWO_WAY = autograd.Family(
    operators.two_way_loss,
    operators.two_way_loss_and_grad,
    operators.two_way_loss_and_grad_,
    operators.two_way_loss_backward,
    operators.two_way_mean,
    statistics=1,
)


class TwoWayLoss(torch.autograd.Function):
    """(logits, target, denominator, divisor, factor, *vectors, constants) -> (loss, stats[, grad])."""

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return autograd.forward(TWO_WAY, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        autograd.setup_context(TWO_WAY, ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return autograd.backward(TWO_WAY, ctx, grad_output)


TwoWayLoss.forward.__signature__ = autograd.SIGNATURE  # type: ignore[attr-defined]
