"""How logits lie: [N, C] with contiguous classes, or [N, C, P] with contiguous pixels and strided classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype, class_indices
from ..errors import ArgumentValueError


class Rows(NamedTuple):
    """Logits [N, C] or [N, C, P], targets [N] or [N * P], or [N, C], and the shape that row results go back to."""

    logits: Tensor
    target: Tensor
    shape: torch.Size


def rows(input: Tensor, target: Tensor) -> Rows:
    """(C,), (N, C) or (N, C, d1, ...) logits and integer targets, as the operators take them."""
    target = class_indices(target, input)
    if input.dim() == 0:
        raise ArgumentValueError("input is 0-dimensional, expected (C,), (N, C) or (N, C, d1, ...)")
    shape = target.shape
    if input.dim() == 1:
        if target.dim() > 1 or target.numel() != 1:
            raise ArgumentValueError(f"target has shape {list(shape)}, expected [] for input of shape [C]")
        logits = input.unsqueeze(0)
    else:
        expected = input.shape[:1] + input.shape[2:]
        if shape != expected:
            raise ArgumentValueError(
                f"target has shape {list(shape)}, expected {list(expected)} for input of shape {list(input.shape)}"
            )
        logits = input
    return Rows(laid_out(logits), target if len(shape) == 1 else target.reshape(-1), shape)


def probability_rows(input: Tensor, target: Tensor) -> Rows:
    """Logits and class probabilities of one shape, (C,), (N, C) or (N, C, d1, ...), as [N, C] and [N, C]."""
    wide = arithmetic_dtype(input.dtype)
    if target.dtype not in (input.dtype, wide):
        target = target.to(wide)
    shape = input.shape[:1] + input.shape[2:]
    if input.dim() == 1:
        input, target, shape = input.unsqueeze(0), target.unsqueeze(0), torch.Size()
    elif input.dim() > 2:
        input, target = (x.movedim(1, -1).flatten(0, -2) for x in (input, target))
    return Rows(laid_out(input), laid_out(target), shape)


def laid_out(input: Tensor) -> Tensor:
    """(N, C, d1, ...) as the operators take it: [N, C] with contiguous classes, [N, C, P] with contiguous pixels.

    A view of contiguous and of channels-last tensors, a copy of others.
    """
    if input.dim() == 2 and input.is_contiguous():  # at most calls
        return input
    n, c = input.shape[:2]
    images = input.dim() > 2 and (input.stride(1) != 1 or c == 1)
    if images:
        input = input.flatten(2)
        p = input.shape[2]
        apart = (c <= 1 or input.stride(1) >= p) and (n <= 1 or input.stride(0) >= (c - 1) * input.stride(1) + p)
        if p > 1:
            return input if input.stride(2) == 1 and apart else input.contiguous()
    if input.dim() > 2:
        input = input.movedim(1, -1).flatten(0, -2)  # flatten knows the number of rows of no classes
    if (input.stride(1) != 1 and c > 1) or (input.stride(0) < c and input.shape[0] > 1):
        input = input.contiguous()
    return input


def row_count(logits: Tensor) -> int:
    """How many losses logits [N, C] or [N, C, P] make: N, or N * P."""
    return logits.shape[0] if logits.dim() == 2 else logits.shape[0] * logits.shape[2]


def stats_like(logits: Tensor, dtype: torch.dtype, numbers: int = 5) -> Tensor:
    """Uninitialised statistics [rows, numbers]; of [N, C, P] by column, where kernels write a register of each."""
    rows = row_count(logits)
    if logits.dim() == 2:
        return logits.new_empty((rows, numbers), dtype=dtype)
    return logits.new_empty((numbers, rows), dtype=dtype).t()


def to_rows(images: Tensor) -> Tensor:
    """[N, C, P] as [N * P, C], a copy."""
    return images.movedim(1, 2).flatten(0, 1).contiguous()


def to_images(rows: Tensor, shape: torch.Size) -> Tensor:
    """[N * P, C] as [N, C, P] of ``shape``, contiguous."""
    n, c, p = shape
    return rows.reshape(n, p, c).movedim(2, 1).contiguous()


DENSE_SOFTMAX = ("softmax_loss", "softmax_loss_backward")
"""The softmax operators whose target, the argument after the logits, may be a probability for each class, [N, C]."""


def logits_position(op: str) -> int | None:
    """Which argument of operator ``op`` is the logits, or the gradient that has their shape; None: it takes none."""
    if op in ("mean_denominator", "mean_loss"):
        return None
    return 1 if "backward" in op or "and_grad" in op else 0
