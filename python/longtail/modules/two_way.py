"""ZLPR and the two-way loss as modules."""

from __future__ import annotations

from ..functional.two_way import two_way_loss, zlpr_loss
from .base import Loss


class ZLPRLoss(Loss):
    """:func:`longtail.zlpr_loss` as a module, with its options."""

    _function = staticmethod(zlpr_loss)


class TwoWayLoss(Loss):
    """:func:`longtail.two_way_loss` as a module, with its options."""

    _function = staticmethod(two_way_loss)
