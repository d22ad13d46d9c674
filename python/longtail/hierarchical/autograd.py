"""Hierarchical cross-entropy under autograd; see :mod:`longtail.ops.autograd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import autograd, operators
from ..ops.vmap import refuse_vmap

HIERARCHICAL = autograd.Family(
    operators.hierarchical_loss,
    operators.hierarchical_loss_and_grad,
    operators.hierarchical_loss_and_grad_,
    operators.hierarchical_loss_backward,
    None,
    statistics=1,
)


class HierarchicalLoss(torch.autograd.Function):
    """(logits, target, denominator, divisor, factor, *vectors, constants) -> (loss, stats[, grad])."""

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return autograd.forward(HIERARCHICAL, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        autograd.setup_context(HIERARCHICAL, ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return autograd.backward(HIERARCHICAL, ctx, grad_output)


HierarchicalLoss.forward.__signature__ = autograd.SIGNATURE  # type: ignore[attr-defined]
