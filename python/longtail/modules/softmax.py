"""The softmax family as modules."""

from __future__ import annotations

from .. import functional
from .base import Loss


class CrossEntropyLoss(Loss):
    """:func:`longtail.cross_entropy` as a module; a drop-in for :class:`torch.nn.CrossEntropyLoss`.

    Takes the options of the function. Each is an attribute, of this and of every other loss module: written, it is
    checked, and holds from the next call on.
    """

    _function = staticmethod(functional.cross_entropy)


class FocalLoss(Loss):
    """:func:`longtail.focal_loss` as a module, with its options."""

    _function = staticmethod(functional.focal_loss)


class ComplementEntropyLoss(Loss):
    """:func:`longtail.complement_entropy` as a module, with its options. COT maximises it: descend on its negative."""

    _function = staticmethod(functional.complement_entropy)


class ComplementCrossEntropyLoss(Loss):
    """:func:`longtail.complement_cross_entropy` as a module, with its options."""

    _function = staticmethod(functional.complement_cross_entropy)
