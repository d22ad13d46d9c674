"""The operators of ZLPR and the two-way loss in plain PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..options import TwoWayOptions
from ..reference import two_way
from .fallback import check_lengths, check_target


def _checked(logits: Tensor, target: Tensor, *values: Any) -> TwoWayOptions:
    options, one_class = TwoWayOptions(*values), target.dtype == torch.int64
    known = one_class or target.is_floating_point()
    if not known or logits.dim() != 2 or target.shape != (logits.shape[:1] if one_class else logits.shape):
        raise RuntimeError(
            f"longtail: logits of shape {list(logits.shape)} and {target.dtype} target of shape {list(target.shape)}, "
            "expected [N, C] and int64 [N] or floating point [N, C]"
        )
    n, num_classes = logits.shape
    check_lengths({"class_bias": (options.class_bias, num_classes), "sample_weight": (options.sample_weight, n)})
    if one_class:
        ignored = options.ignore_index
        counted = torch.ones_like(target, dtype=torch.bool) if ignored is None else target != ignored
        check_target(target, counted, num_classes, ignored)
    return options


class _Batch(NamedTuple):
    logits: Tensor
    rows: two_way.Rows | None
    """None: of no logits."""

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, *values: Any) -> _Batch:
        options = _checked(logits, target, *values)
        return cls(logits, two_way.Rows.of(logits, target, options) if logits.numel() else None)

    def loss(self) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            dtype = arithmetic_dtype(self.logits.dtype)
            n = len(self.logits)
            return self.logits.new_zeros(n, dtype=dtype), self.logits.new_zeros((n, 4), dtype=dtype)
        stats = self.rows.stats()
        return self.rows.losses(stats), torch.stack(stats, 1).masked_fill(~self.rows.counted[:, None], 0.0)

    def grad(self, stats: Tensor, grad_loss: Tensor) -> Tensor:
        if self.rows is None:
            return torch.zeros_like(self.logits)
        m_n, d_n, m_p, d_p = stats.unbind(1)
        return self.rows.grad((m_n, d_n, m_p, d_p), grad_loss).to(self.logits.dtype)


def two_way_loss(logits: Tensor, target: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
    return _Batch.of(logits, target, *values).loss()


def two_way_loss_backward(grad_loss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, *values: Any) -> Tensor:
    return _Batch.of(logits, target, *values).grad(stats, grad_loss)


def two_way_loss_and_grad(
    grad_loss: Tensor, logits: Tensor, target: Tensor, *values: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch = _Batch.of(logits, target, *values)
    loss, stats = batch.loss()
    return loss, stats, batch.grad(stats, grad_loss)


def two_way_loss_and_grad_(grad_loss: Tensor, logits: Tensor, target: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
    loss, stats, grad = two_way_loss_and_grad(grad_loss, logits, target, *values)
    logits.copy_(grad)
    return loss, stats
