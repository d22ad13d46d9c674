"""A tree and the weights of its nodes, from arguments to what the operators take."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import LIMITS, check_number, is_exporting
from ..errors import ArgumentTypeError, ArgumentValueError
from ..options import HierarchicalOptions
from ..reference.hierarchical import climb, losses
from .hierarchy import Hierarchy


class Tree(NamedTuple):
    hierarchy: Hierarchy
    alpha: float
    """lambda is exp(-alpha depth)."""
    node_weight: Tensor | None = None
    """lambda of each node, [V], where it is :meth:`placed`."""

    @classmethod
    def checked(cls, hierarchy: Any, alpha: Any, dtype: torch.dtype) -> Tree:
        """``dtype``: of the arithmetic.

        Raises:
            TypeError, ValueError: one of them is wrong, or ``dtype`` does not hold the weights with all their digits.
        """
        if not isinstance(hierarchy, Hierarchy):
            raise ArgumentTypeError(f"hierarchy is a {type(hierarchy).__name__}, expected a longtail.Hierarchy")
        tree = cls(hierarchy, check_number("alpha", alpha, 0.0, dtype=dtype))
        if type(tree.alpha) is not float or is_exporting():  # a symbol, which would have to prove it
            return tree
        most = -math.log(LIMITS[dtype][1]) / hierarchy.depth
        if tree.alpha > most:
            raise ArgumentValueError(
                f"alpha is {alpha}, expected at most {most} for a tree of depth {hierarchy.depth}: {dtype} does not "
                "hold exp(-alpha depth)"
            )
        return tree

    def options(
        self,
        device: torch.device,
        dtype: torch.dtype,
        weight: Tensor | None = None,
        class_bias: Tensor | None = None,
        sample_weight: Tensor | None = None,
        ignore_index: int = -100,
    ) -> HierarchicalOptions:
        """Of all classes; ``dtype``: of the arithmetic."""
        path, begin, end, order, position = self.hierarchy.tables(device)
        node_weight = self.hierarchy.node_weight(self.alpha, dtype, device)
        vectors = (weight, class_bias, sample_weight)
        return HierarchicalOptions(path, begin, end, node_weight, order, position, *vectors, ignore_index)

    def placed(self, device: torch.device, dtype: torch.dtype) -> Tree:
        """With the weights that what follows needs, made once; ``dtype``: of the arithmetic."""
        return self._replace(node_weight=self.hierarchy.node_weight(self.alpha, dtype, device))

    def of_shard(self, classes: slice) -> HierarchicalOptions:
        """Of some classes, with targets among all; without vectors."""
        assert self.node_weight is not None
        size, device = classes.stop - classes.start, self.node_weight.device
        path, begin, end, order, position = self.hierarchy.shard(classes.start, size, device)
        return HierarchicalOptions(path, begin, end, self.node_weight, order, position)

    def row_losses(self, stats: Tensor, target: Tensor) -> Tensor:
        """Losses [N] of statistics [N, 2 L + 1] of whole rows, without their weights."""
        assert self.node_weight is not None
        path = self.hierarchy.tables(stats.device).path
        levels, poison = climb(stats)
        return losses(levels, self.node_weight[path[target].long()], poison)
