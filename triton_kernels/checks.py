"""Checks at the boundary of the operators, as csrc/checks.h: a wrong argument is an exception, never a wild access."""

from __future__ import annotations

import torch
from torch import Tensor

from longtail import fallback

VECTORS = ("weight", "class_bias", "class_margin", "sample_weight")


def _check(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if t.shape != shape or t.dtype != dtype or t.device != device:
        got = f"shape {list(t.shape)} and dtype {t.dtype} on {t.device}"
        raise RuntimeError(f"longtail: {name} has {got}, expected {list(shape)} and {dtype} on {device}")


def _check_contiguous(name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise RuntimeError(f"longtail: {name} has strides {list(t.stride())}, expected a contiguous tensor")


def check_matrix(name: str, t: Tensor) -> None:
    """[N, C] with classes side by side and rows that do not overlap."""
    n, c = t.shape
    if (c > 1 and t.stride(1) != 1) or (n > 1 and t.stride(0) < c):
        raise RuntimeError(f"longtail: {name} has strides {list(t.stride())}, expected [at least {c}, 1]")


def check_factor(name: str, t: Tensor | None, like: Tensor) -> None:
    """One float32 per row of ``like`` [N, C], of any stride."""
    if t is not None:
        _check(name, t, (like.shape[0],), torch.float32, like.device)


def check_loss(
    logits: Tensor,
    target: Tensor,
    grad_loss: Tensor | None,
    stats: Tensor,
    vectors: tuple[Tensor | None, ...],
    ignore_index: int,
) -> None:
    """The tensors of a loss or its backward, logits [N, C]."""
    n, c = logits.shape
    check_matrix("logits", logits)
    check_factor("grad_loss", grad_loss, logits)
    _check("target", target, (n,), torch.int64, logits.device)
    _check("stats", stats, (n, 5), torch.float32, logits.device)
    for name, vector in zip(VECTORS, vectors, strict=True):
        if vector is not None:
            _check(name, vector, (n if name == "sample_weight" else c,), torch.float32, logits.device)
            _check_contiguous(name, vector)
    if logits.device.type == "cpu":  # Triton's interpreter has no assertions
        fallback._check_target(target, target != ignore_index, c, ignore_index)
