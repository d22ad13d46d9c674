"""Trees, and batches of hierarchical cross-entropy through all of its operators, against float64."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

import cases
from batches import STATS_FACTOR, Batch, Kernels, random_case
from longtail.hierarchical.hierarchy import Hierarchy
from longtail.ops import fallback_hierarchical as fallback
from tolerances import assert_close


def tree(classes: int, depth: int, shuffled: bool = False) -> Hierarchy:
    """Of that depth, or less where classes are few: with classes right below the root, and nodes of a single child."""
    branches = 1
    while branches**depth < classes:
        branches += 1
    lone = classes - classes // 8  # from here on
    paths: list[list[str]] = []
    for c in range(classes):
        digits = [str(c // branches ** (depth - 1 - k) % branches) for k in range(depth)]
        paths.append([f"class {c}"] if c >= lone else digits)
    if depth > 2:
        paths = [["0", "only", *path[2:]] if path[:2] == ["0", "0"] else path for path in paths]
    if shuffled:
        order = torch.randperm(classes, generator=cases.generator(9)).tolist()
        paths = [paths[i] for i in order]
    return Hierarchy.from_paths(paths)


def operator_options(
    hierarchy: Hierarchy, dtype: torch.dtype = torch.float32, alpha: float = 0.3, vectors: bool = True, rows: int = 0
) -> list[Any]:
    """What the operators take after the data; vectors: weight, class_bias and sample_weight."""
    tables, wide = hierarchy.tables(), cases.vector_dtype(dtype)
    found: list[Tensor | None] = [None, None, None]
    if vectors:
        g, c = cases.generator(11), hierarchy.num_classes
        weight, bias, sample = (torch.rand(n, generator=g, dtype=torch.float64) for n in (c, c, rows))
        found = [(weight + 0.5).to(wide), (3.0 * bias - 1.5).to(wide), (sample + 0.1).to(wide)]
    path, begin, end, order, position = tables
    return [path, begin, end, hierarchy.node_weight(alpha, wide), order, position, *found, cases.IGNORE]


class HierarchicalKernels(Kernels, Protocol):
    """Those that know trees."""

    def hierarchical(self, batch: HierarchicalBatch, otherwise: bool = False) -> None:
        """Fills z, losses, stats and grads."""


class HierarchicalBatch(Batch):
    kernels: HierarchicalKernels

    def __init__(
        self,
        kernels: HierarchicalKernels,
        case: tuple[Tensor, Tensor],
        tail: list[Any],
        up: Tensor | None = None,
        **how: str,
    ) -> None:
        logits, target = case
        if up is None:
            up = cases.upstreams(target.shape, cases.vector_dtype(logits.dtype))["random"]
        super().__init__(kernels, case, tail, up, **how)

    @classmethod
    def of(
        cls,
        kernels: HierarchicalKernels,
        shape: tuple[int, int],
        depth: int,
        shuffled: bool,
        dtype: torch.dtype = torch.float32,
        vectors: bool = True,
        **how: Any,
    ) -> HierarchicalBatch:
        tail = operator_options(tree(shape[1], depth, shuffled), dtype, vectors=vectors, rows=shape[0])
        return cls(kernels, random_case(shape, dtype), tail, **how)

    def run(self, otherwise: bool = False) -> None:
        self.kernels.hierarchical(self, otherwise)

    def check(self, factor: float = 1.0) -> None:
        """Every output against float64, and the ignored rows."""
        truth = fallback.hierarchical_loss_and_grad(self.up.double(), self.logits.double(), self.target, *self.wide())
        eager = fallback.hierarchical_loss_and_grad(self.up, self.logits, self.target, *self.tail)
        for loss in self.losses:
            assert_close(loss, truth[0], eager[0], what="loss", factor=factor)
        defined = ~truth[0].isnan()
        for stats in self.stats:
            parts = stats[defined], truth[1][defined], eager[1][defined]
            assert_close(*parts, what="stats", factor=STATS_FACTOR * factor)
            assert stats.is_contiguous()
        self.check_gradients(truth[2], eager[2], factor)
        ignored = self.target == cases.IGNORE
        for value in (*self.losses, *self.stats, *self.grads):
            assert (value[ignored] == 0).all(), "ignored rows are exactly 0"

    def wide(self) -> list[Any]:
        """In float64, but for the tables of integers."""
        return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in self.tail]
