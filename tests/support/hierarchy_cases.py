"""Trees over classes, and hierarchical cross-entropy as its paper writes it: probabilities, products along the path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cases
from longtail import Hierarchy

Path = tuple[Any, ...]
# name -> (classes, the deepest path, whether classes are numbered along the tree). Alone; alone below a chain; two; all
# below the root; a row of less than a register; few and many classes, in blocks; as deep as kernels go, and deeper.
TREES = {
    "one": (1, 1, True),
    "one_deep": (1, 3, True),
    "two": (2, 2, False),
    "flat": (11, 1, True),
    "small": (23, 4, False),
    "ordered": (1500, 4, True),
    "shuffled": (1500, 4, False),
    "deep": (40, 8, False),
    "deep_ordered": (40, 8, True),
    "too_deep": (30, 11, False),
}


def ragged_paths(classes: int, depth: int, ordered: bool, seed: int = 0, names: int | None = None) -> list[Path]:
    """Of any length up to the depth, below nodes of one class to nearly all of them; some chains.

    ``names``: how many a level has; the fewer, the more classes are deep within the same nodes.
    """
    g, names = cases.generator(seed), names or max(8, classes // 15)

    def path(number: int) -> Path:
        length = depth if number == classes - 1 else int(torch.randint(1, depth + 1, (1,), generator=g))
        above = (names * torch.rand(length - 1, generator=g) ** 3).int().tolist()
        return (*(f"node {x}" for x in above), number)

    found = [path(number) for number in range(classes)]
    return sorted(found, key=str) if ordered else found


def paths(name: str, seed: int = 0) -> list[Path]:
    return ragged_paths(*TREES[name], seed)


def tree(name: str, seed: int = 0) -> tuple[Hierarchy, list[Path]]:
    found = paths(name, seed)
    return Hierarchy.from_paths(found), found


def row_loss(u: Tensor, g: int, names: list[Path], alpha: float) -> Tensor:
    """Bertinetto et al. 2020, section 3.1, of one row: the sum of lambda(C) * -log p(C | parent of C)."""
    p, total = u.softmax(0), u.new_zeros(())
    above = torch.ones(len(names), dtype=torch.bool)
    for depth in range(1, len(names[g]) + 1):
        below = torch.tensor([each[:depth] == names[g][:depth] for each in names])
        conditional = p[below].sum() / p[above].sum()
        total = total - torch.tensor(-alpha * depth, dtype=u.dtype).exp() * conditional.log()
        above = below
    return total


def losses(
    logits: Tensor,
    target: Tensor,
    names: list[Path],
    alpha: float,
    weight: Tensor | None = None,
    class_bias: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """[N], 0 where ignored, in the dtype of the logits."""
    found = []
    for i, g in enumerate(target.tolist()):
        if g == cases.IGNORE:
            found.append(logits.new_zeros(()))
            continue
        u = logits[i] if class_bias is None else logits[i] + class_bias.to(logits.dtype)
        loss = row_loss(u, g, names, alpha)
        loss = loss if weight is None else loss * weight[g].to(logits.dtype)
        found.append(loss if sample_weight is None else loss * sample_weight[i].to(logits.dtype))
    return torch.stack(found)


def vectors(classes: int, rows: int, dtype: torch.dtype, seed: int = 2) -> dict[str, Tensor]:
    g = cases.generator(seed)
    found = {
        "weight": torch.rand(classes, generator=g) + 0.2,
        "class_bias": torch.randn(classes, generator=g),
        "sample_weight": torch.rand(rows, generator=g) + 0.2,
    }
    return {name: x.to(cases.vector_dtype(dtype)) for name, x in found.items()}
