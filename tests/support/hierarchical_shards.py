"""Batches of hierarchical cross-entropy whose classes are shared out: statistics of each shard, then its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

import cases
from batches import random_case
from hierarchical_batches import HierarchicalBatch, HierarchicalKernels, operator_options, tree
from layouts import assert_padding_untouched
from longtail import Hierarchy
from longtail.options import HierarchicalOptions
from tolerances import assert_same


class ShardKernels(HierarchicalKernels, Protocol):
    def hierarchical_stats(self, shard: HierarchicalBatch, otherwise: bool = False) -> None:
        """Fills z and stats."""

    def hierarchical_grads(self, shard: HierarchicalBatch, stats: Tensor, otherwise: bool = False) -> None:
        """From the statistics of all shards together: fills z and grads, of which the last is made in place."""


def shard_options(hierarchy: Hierarchy, tail: list[Any], start: int, size: int) -> list[Any]:
    """What the operators take of the classes [start, start + size); tail: what they take of all."""
    tables = hierarchy.shard(start, size, tail[0].device)._asdict()
    options = HierarchicalOptions(*tail)
    bias = options.class_bias
    own = None if bias is None else bias[start : start + size].clone()
    return list(options._replace(**tables, class_bias=own))


def combined(pieces: list[Tensor]) -> Tensor:
    """[N, 2 L + 1] of all classes, from those of shards."""
    each = torch.stack(pieces)
    m, d = each[..., :-1:2], each[..., 1::2]
    top = m.amax(0)
    d = torch.where(m == -torch.inf, d, d * (m - top).exp()).sum(0)
    return torch.cat([torch.stack([top, d], 2).flatten(1), each[..., -1].amax(0)[:, None]], 1)


class ShardedBatch(HierarchicalBatch):
    """Of which the inherited check compares what the shards make together with float64 of the whole."""

    kernels: ShardKernels

    def __init__(
        self,
        kernels: ShardKernels,
        hierarchy: Hierarchy,
        sizes: Sequence[int],
        case: tuple[Tensor, Tensor],
        tail: list[Any],
        up: Tensor | None = None,
        **how: str,
    ) -> None:
        super().__init__(kernels, case, tail, up, **how)
        assert sum(sizes) == hierarchy.num_classes
        self.hierarchy, self.sizes = hierarchy, sizes

    @classmethod
    def cut(
        cls,
        kernels: ShardKernels,
        hierarchy: Hierarchy,
        sizes: Sequence[int],
        rows: int,
        dtype: torch.dtype = torch.float32,
        vectors: bool = True,
        **how: Any,
    ) -> ShardedBatch:
        tail = operator_options(hierarchy, dtype, vectors=vectors, rows=rows)
        return cls(kernels, hierarchy, sizes, random_case((rows, hierarchy.num_classes), dtype), tail, **how)

    def shards(self) -> list[HierarchicalBatch]:
        found, start = [], 0
        how = {"layout": self.layout, "grad_layout": self.grad_layout}
        for size in self.sizes:
            case = self.logits[:, start : start + size].clone(), self.target
            tail = shard_options(self.hierarchy, self.tail, start, size)
            found.append(HierarchicalBatch(self.kernels, case, tail, self.up, **how))
            start += size
        return found

    def run(self, otherwise: bool = False) -> None:
        shards = self.shards()
        for shard in shards:
            self.kernels.hierarchical_stats(shard, otherwise)
            assert_same(shard.z, shard.logits, "logits")
        self.stats = [combined(list(pieces)) for pieces in zip(*(shard.stats for shard in shards), strict=True)]
        for shard in shards:
            self.kernels.hierarchical_grads(shard, self.stats[0], otherwise)
            assert_same(shard.z, shard.logits, "logits")
            for grad in shard.grads:
                assert_padding_untouched(grad, "gradient")
            for grad in shard.grads[1:]:
                assert_same(grad, shard.grads[0], "gradient in place")
        self.z, self.losses = self.logits, []
        self.grads = [torch.cat(parts, 1) for parts in zip(*(shard.grads for shard in shards), strict=True)]


def of_targets(
    kernels: ShardKernels, logits: list[Tensor], targets: tuple[int, ...], sizes: Sequence[int], shuffled: bool
) -> ShardedBatch:
    """Some of the rows of each of the logits [C, C], of which each row has its own class for a target; depth 4."""
    chosen, hierarchy = torch.tensor(targets), tree(logits[0].shape[1], 4, shuffled)
    tail = operator_options(hierarchy, vectors=False)
    case = torch.cat([z[chosen] for z in logits]), chosen.repeat(len(logits))
    return ShardedBatch(kernels, hierarchy, sizes, case, tail)


def elsewhere(target: Tensor, start: int, size: int) -> Tensor:
    """Those of other shards as if ignored."""
    return torch.where((target >= start) & (target < start + size), target, cases.IGNORE)
