"""Weights of rows with several labels, from those of the classes: in memory of the rows, not of their elements."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 18  # elements that are weighted at a time: 1 MiB as float32, which caches hold
LAUNCHES = 64  # times as many where each step is a launch


def row_weights(target: Tensor, weight: Tensor, mode: str, ignore_index: int | None = None) -> Tensor:
    """Weights of rows of multi-hot or soft ``target`` (N, C) or (N, C, d1, ...), in their shape; ``weight``: [C].

    With targets y of a row, "row_mean" is ``sum_j y_j w_j / sum_j y_j`` and "row_max" ``max_j y_j w_j / max_j y_j``: of
    multi-hot rows the mean and the largest weight of the labels. A row without labels weighs as the most frequent class
    does, the smallest weight that is not 0: negatives alone are no rare thing.
    """
    positive = weight > 0
    bare = torch.where(positive, weight, torch.inf).amin()
    bare = torch.where(positive.any(), bare, 0.0)
    found = []
    for rows in target.split(_step(target, 0)):
        weighted, plain = _joined(rows, weight, mode, ignore_index)
        found.append(torch.where(plain == 0, bare, weighted / torch.where(plain == 0, 1.0, plain)))
    return torch.cat(found)


def _step(target: Tensor, dim: int) -> int:
    """How much of a dimension a chunk holds; all of it where a compiler fuses the steps."""
    if torch.compiler.is_compiling():
        return max(1, target.shape[dim])
    chunk = CHUNK if target.device.type == "cpu" else LAUNCHES * CHUNK
    return max(1, chunk // max(1, target.narrow(dim, 0, min(1, target.shape[dim])).numel()))


def _joined(rows: Tensor, weight: Tensor, mode: str, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """The sum or largest of ``y_j w_j``, and of ``y_j``, over the classes, a chunk of them at a time."""
    step = _step(rows, 1)
    shape = (1, -1, *(1,) * (rows.dim() - 2))
    weighted = plain = None
    for y, w in zip(rows.split(step, 1), weight.split(step), strict=True):
        if ignore_index is not None:
            y = y.masked_fill(y == ignore_index, 0)
        y = y.to(weight.dtype).clamp(0, 1)  # what rounding puts beside is no label
        w = y * w.view(shape)
        if mode == "row_mean":
            w, y = w.sum(1), y.sum(1)
        else:
            w, y = w.amax(1), y.amax(1)
        if weighted is None or plain is None:
            weighted, plain = w, y
        elif mode == "row_mean":
            weighted, plain = weighted + w, plain + y
        else:
            weighted, plain = torch.maximum(weighted, w), torch.maximum(plain, y)
    assert weighted is not None
    assert plain is not None
    return weighted, plain
