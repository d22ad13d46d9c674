"""Hierarchical cross-entropy over classes that are shared out among ranks: a rank's part of it.

The ranks exchange the maximum and the sum of each ring of a target's path; the rest is as of the softmax family.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..hierarchical import shards
from ..hierarchical.tree import Tree
from ..options import HierarchicalOptions, SoftmaxOptions
from ..reference.hierarchical import gradient_size
from ..reference.sizes import Size
from .handshake import Handshake
from .shard import Part, Shard, make_shard
from .stats import Gathered


class TreeArguments(NamedTuple):
    """As users pass them."""

    hierarchy: Any
    alpha: Any

    def checked(self, dtype: torch.dtype, part: Part) -> tuple[Tree, Part, dict[str, Any]]:
        """The tree, ``part`` with the tree's classes, and what has to be the same on every rank.

        ``dtype``: of the arithmetic.
        """
        tree = Tree.checked(self.hierarchy, self.alpha, dtype)
        same = {"hierarchy (by a fingerprint)": tree.hierarchy.fingerprint(), "alpha": tree.alpha}
        return tree, part._replace(num_classes=tree.hierarchy.num_classes), same


class SpentRings(NamedTuple):
    """What of rows makes the gradient of their logits."""

    factor: Tensor
    """v w_g, [N]; of :meth:`HierarchicalShard.spent` times the upstream gradients of the rows."""
    stats: Tensor
    """[N, 2 L + 1], of whole rows."""


class HierarchicalShard(Shard):
    """``options``: weight, class_bias, sample_weight and ignore_index."""

    @property
    def _tree(self) -> Tree:
        assert self.tree is not None
        return self.tree

    @property
    def statistics(self) -> int:
        return 2 * self._tree.hierarchy.depth + 1

    def _of_operators(self) -> HierarchicalOptions:
        classes = slice(self.handshake.start, self.handshake.start + self.handshake.proposal.size)
        found = self._tree.of_shard(classes)
        return found._replace(class_bias=self.own.class_bias, ignore_index=self.options.ignore_index)

    def _local_columns(self, logits: Tensor, target: Tensor) -> Tensor:
        """What travels: the statistics, and the target's class weight where every rank knows only its own."""
        stats = shards.accumulate(logits, target, self._of_operators())
        if self.traffic.weight:
            stats = torch.cat([stats, self._local_weights(self.local_target(target))[:, None]], 1)
        return stats.t().contiguous()

    def accumulate(self, logits: Tensor, target: Tensor) -> Gathered:
        columns = self.handshake.gather(lambda: self._local_columns(logits, target))  # [P, columns, N]
        owner = self.handshake.owners(target)
        stats = shards.combine_shards(columns[:, : self.statistics], owner)
        w_g = columns[:, -1].gather(0, owner[None])[0] if self.traffic.weight else None
        if self.whole_weight is not None:
            w_g = self._whole_weights(target)
        return Gathered(stats, w_g, stats.new_full((), float(self.total)))

    def finish(self, found: Gathered, target: Tensor) -> tuple[Tensor, Any]:
        g = target.masked_fill(target == self.options.ignore_index, 0)
        loss = self._tree.row_losses(found.stats, g)
        factor = torch.ones_like(loss) if found.w_g is None else found.w_g
        if self.options.sample_weight is not None:
            factor = factor * self.options.sample_weight
        return factor * loss, SpentRings(factor, found.stats)

    def spent(self, row_grad: SpentRings, upstream: Tensor, _terms: Tensor | None) -> SpentRings:
        return row_grad._replace(factor=row_grad.factor * upstream)

    def apply(self, logits: Tensor, target: Tensor, spent: SpentRings, inplace: bool) -> Tensor:
        return shards.apply(logits, target, *spent, self._of_operators(), inplace)

    def size(
        self, target: Tensor, dtype: torch.dtype, w_g: Tensor | None, _weight_sum: Tensor, _scales: Tensor | None
    ) -> Size | None:
        if dtype != torch.float16:
            return None
        counted = target != self.options.ignore_index
        return gradient_size(counted, self._tree.alpha, w_g, self.options.sample_weight)


def shard_of(
    handshake: Handshake, options: SoftmaxOptions, return_stats: bool, tree: Tree | None, like: tuple[Any, torch.dtype]
) -> Shard:
    """This rank's part of a loss of the softmax family, or of ``tree``; ``options`` checked, with vectors.

    ``like``: the device, and the dtype of the arithmetic.
    """
    shard = make_shard(handshake, options, return_stats)
    return shard if tree is None else HierarchicalShard(*shard)._replace(tree=tree.placed(*like))
