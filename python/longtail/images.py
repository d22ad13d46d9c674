"""Logits [N, C, P], pixels contiguous and classes strided, on backends whose kernels know rows [N, C] alone.

Such a backend pays a transposing copy; the operators' results lie as those of a kernel that walks the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def row_count(logits: Tensor) -> int:
    """How many losses logits [N, C] or [N, C, P] make: N, or N * P."""
    return logits.shape[0] if logits.dim() == 2 else logits.shape[0] * logits.shape[2]


def stats_like(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised statistics [rows, 5]; column by column for [N, C, P], where kernels write a register of each."""
    rows = row_count(logits)
    if logits.dim() == 2:
        return logits.new_empty((rows, 5), dtype=dtype)
    return logits.new_empty((5, rows), dtype=dtype).t()


def to_rows(images: Tensor) -> Tensor:
    """[N, C, P] as [N * P, C], a copy."""
    return images.movedim(1, 2).reshape(row_count(images), images.shape[1]).contiguous()


def to_images(rows: Tensor, shape: torch.Size) -> Tensor:
    """[N * P, C] as [N, C, P] of ``shape``, contiguous."""
    n, c, p = shape
    return rows.reshape(n, p, c).movedim(2, 1).contiguous()


def logits_position(op: str) -> int:
    """Which argument of operator ``op`` is the logits, or the gradient that has their shape."""
    return 1 if "backward" in op or "and_grad" in op else 0


def through_rows(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of operator ``op``, made to accept [N, C, P] where it knows [N, C]."""
    if op in ("mean_denominator", "softmax_loss_accumulate", "softmax_loss_apply", "softmax_loss_apply_"):
        return kernel  # knows no logits, or refuses images
    position = logits_position(op)

    def call(*args: Any) -> Any:
        logits = args[position]
        if logits.dim() != 3:
            return kernel(*args)
        inner = [to_rows(x) if isinstance(x, Tensor) and x.dim() == 3 else x for x in args]
        result = kernel(*inner)
        if op.endswith("_"):
            logits.copy_(to_images(inner[position], logits.shape))
        if result is None:
            return None
        several = isinstance(result, tuple)
        restored = [_restored(x, logits) for x in (result if several else (result,))]
        if op.startswith("softmax_loss") and several:
            restored[1] = result[1].t().contiguous().t()
        return tuple(restored) if several else restored[0]

    return call


def _restored(result: Tensor, logits: Tensor) -> Tensor:
    return to_images(result, logits.shape) if result.dim() == 2 and result.shape[1] == logits.shape[1] else result
