"""Hierarchical cross-entropy as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..functional.hierarchical import hierarchical_cross_entropy
from .base import Loss


class HierarchicalCrossEntropyLoss(Loss):
    """:func:`longtail.hierarchical_cross_entropy` as a module, with its options.

    The tree, ``hierarchy``, has no default, and does not stand in the ``state_dict``. It comes along to another device
    where the module has class vectors, which say the device; else call ``hierarchy.to(device)`` before
    ``torch.compile``, see :class:`longtail.Hierarchy`.
    """

    _function = staticmethod(hierarchical_cross_entropy)

    def _set_options(self, defaults: dict[str, Any], options: dict[str, Any]) -> None:
        if "hierarchy" not in options:
            raise TypeError("HierarchicalCrossEntropyLoss() missing 1 required argument: 'hierarchy'")
        super()._set_options(defaults, options)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        moved = super()._apply(fn, recurse)
        for name in self._class_vectors():
            vector = self._buffers[name]
            if type(vector) is torch.Tensor:
                self.hierarchy.to(vector.device)
        return moved

    def _call_on_nothing(self, **options: Any) -> None:
        hierarchy = options.pop("hierarchy", self.__dict__.get("hierarchy"))
        logits = torch.empty(0, getattr(hierarchy, "num_classes", 1), device="meta", dtype=torch.float64)
        hierarchical_cross_entropy(logits, logits[:, 0].long(), hierarchy, **options)
