"""Several labels a row: the targets of multi-label losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST = 7
"""Labels of a row: 1 to as many, all counts alike, of which some rows draw one label twice."""

EMPTY = 64
"""One of so many rows has no label."""


class Labels(NamedTuple):
    """The labels of N rows, in two forms."""

    classes: Tensor
    """int64 [N, MOST]: a row's labels, some of them repeated; any classes where it has none."""
    hot: Tensor
    """[N, C] in the logits' dtype: 1 at the labels, else 0."""


def of_long_tail(logits: Tensor, counts: Tensor, generator: torch.Generator) -> Labels:
    """About four labels a row, drawn as often as ``counts`` [C] has them."""
    rows, device = len(logits), logits.device
    classes = torch.multinomial(counts.float(), rows * MOST, replacement=True, generator=generator).view(rows, MOST)
    found = torch.randint(1, MOST + 1, (rows, 1), generator=generator, device=device)
    classes = torch.where(torch.arange(MOST, device=device) < found, classes, classes[:, :1])
    hot = torch.zeros_like(logits).scatter_(1, classes, 1.0)
    hot[1::EMPTY] = 0.0
    return Labels(classes, hot)


def num_samples(counts: Tensor) -> int:
    """Rows that ``counts`` [C] labels belong to: four in each row, and every class missing in as many as it is in."""
    return max(int(counts.sum()) // 4, 2 * int(counts.max()))
