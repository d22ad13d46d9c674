"""The sigmoid family as modules."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .. import functional
from .base import Loss


class SigmoidFocalLoss(Loss):
    """:func:`longtail.sigmoid_focal_loss` as a module, with its options.

    ``reduction`` is "mean" by default, as in every other module; the function keeps torchvision's "none".
    """

    _function = staticmethod(functional.sigmoid_focal_loss)
    _own_defaults: ClassVar = {"reduction": "mean"}


class SigmoidCrossEntropyLoss(Loss):
    """:func:`longtail.sigmoid_cross_entropy` as a module, with its options, for :class:`torch.nn.BCEWithLogitsLoss`."""

    _function = staticmethod(functional.sigmoid_cross_entropy)


class BinaryFocalLoss(Loss):
    """:func:`longtail.binary_focal_loss` as a module, with its options."""

    _function = staticmethod(functional.binary_focal_loss)

    def _call_on_nothing(self, **options: Any) -> None:
        nothing = torch.empty(0, device="meta", dtype=torch.float64)
        functional.binary_focal_loss(nothing, nothing, **options)


class AsymmetricLoss(Loss):
    """:func:`longtail.asymmetric_loss` as a module, with its options."""

    _function = staticmethod(functional.asymmetric_loss)
