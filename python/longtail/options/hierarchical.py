"""The options of hierarchical cross-entropy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .vectors import checked_vectors

HIERARCHICAL_VECTORS = ("weight", "class_bias", "sample_weight")
HIERARCHY_DEPTH = 8
"""The deepest tree that kernels of hierarchical cross-entropy know."""


class HierarchicalOptions(NamedTuple):
    """What the operators of hierarchical cross-entropy take after the data, in their order.

    The first six describe the tree, see :meth:`longtail.Hierarchy.tables`; those after mean what they mean in
    :func:`longtail.hierarchical_cross_entropy`. V nodes, all but the root; L is the depth; targets are among G classes.

    Of one shard of the classes, logits [N, C] have C of the G, and positions count these alone: of a class of another
    shard, the node at the end of its path is empty here. Its u_g in the statistics is -inf then, and its loss nothing.
    """

    path: Tensor
    """int32 [G, L]: the nodes from below the root down to each class, shorter paths padded by their last node."""
    node_begin: Tensor
    """int32 [V]: the classes of a node are at the positions [node_begin, node_end)."""
    node_end: Tensor
    node_weight: Tensor
    """[V], of T: lambda of each node."""
    order: Tensor | None = None
    """int32 [C]: the class at each position; None, as ``position``, where each class is at its own."""
    position: Tensor | None = None
    """int32 [C]: the position of each class."""
    weight: Tensor | None = None
    """[G]"""
    class_bias: Tensor | None = None
    """[C]"""
    sample_weight: Tensor | None = None
    ignore_index: int = -100

    def parted(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The tensors, which autograd has to see, and the rest; one after the other they are the whole."""
        return self[:-1], self[-1:]

    def prepared(self, input: Tensor, rows: torch.Size, num_classes: int, dtype: torch.dtype) -> HierarchicalOptions:
        """As the operators take them: vectors that are checked, flat and in ``dtype``.

        Args:
            rows: the shape of the targets.

        Raises:
            TypeError, ValueError: a vector is wrong.
        """
        vectors = (self.weight, self.class_bias, self.sample_weight)
        if not [x for x in vectors if x is not None]:  # at most calls
            return self
        found = checked_vectors(HIERARCHICAL_VECTORS, vectors, input, rows, num_classes, dtype)
        return self._replace(**dict(zip(HIERARCHICAL_VECTORS, found, strict=True)))
