"""Counts of one chunk of targets, which names the place of what is wrong in the whole."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..arguments import ROUNDING
from .arrays import integer_labels


def count_indices(
    targets: Tensor,
    num_classes: int,
    ignore_index: int | None,
    starts: tuple[int, ...] = (),
    kept: Tensor | None = None,
) -> Tensor:
    """Counts of class indices, at ``starts`` of the targets; of those that are ``kept``, default all."""
    labels = integer_labels(targets)
    if kept is None:
        kept = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        kept = kept & (labels != ignore_index)
    wrong = kept & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        raise IndexError(f"{_first(wrong, labels, starts)} is out of range, expected 0 to {num_classes - 1}")
    return torch.bincount(labels[kept], minlength=num_classes)


def sum_chunk(
    targets: Tensor, ignore_index: int | None, starts: tuple[int, ...], kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums over everything but the classes, int64 of bools and float64 of floats, at ``starts`` of the targets.

    And the number of targets that are summed.
    """
    values = targets if targets.dtype == torch.bool else targets.double()
    beside = [d for d in range(values.dim()) if d != 1]
    if ignore_index is not None:
        known = targets != ignore_index
        kept = known if kept is None else kept & known
    if kept is not None:
        values = values.masked_fill(~kept, 0)
    wrong = ~((values >= -ROUNDING) & (values <= 1 + ROUNDING))
    if wrong.any():
        raise ValueError(f"{_first(wrong, values, starts)} is no multi-hot target, expected a number in [0, 1]")
    if values.is_floating_point():
        values = values.clamp(0, 1)
    sums = values.sum(beside)
    if kept is not None:
        return sums, kept.sum(beside)
    return sums, torch.full_like(sums, math.prod(values.shape[d] for d in beside), dtype=torch.int64)


def _first(wrong: Tensor, values: Tensor, starts: tuple[int, ...]) -> str:
    """The first wrong value and its place, in targets of which ``values`` are those from ``starts`` on."""
    position = tuple(wrong.nonzero()[0].tolist())
    value = values[position].item()
    if not position:
        return f"targets = {value}"
    place = (start + offset for start, offset in itertools.zip_longest(starts, position, fillvalue=0))
    return f"targets[{', '.join(map(str, place))}] = {value}"
