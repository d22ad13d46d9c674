"""The softmax family as modules."""

from __future__ import annotations

from .. import functional
from .base import Loss


class CrossEntropyLoss(Loss):
    """:func:`longtail.cross_entropy` as a module; a drop-in for :class:`torch.nn.CrossEntropyLoss`.

    Takes the options of the function. Each is an attribute, of this and of every other loss module: written, it is
    checked, and holds from the next call on.

    With options of classes and targets (``class_bias``, ``class_margin``, ``class_scale``, ``target_scale``,
    ``class_mitigation``, ``compensation``) it is a loss for training: predict from the raw logits, and validate by a
    plain one (``nn.CrossEntropyLoss()``, or ``loss(input, target, class_bias=None)``).

    Class vectors are buffers. ``persistent=False``, of every loss module that has any, keeps them out of the
    ``state_dict``, and those of a checkpoint are not read: that of a model with :class:`torch.nn.CrossEntropyLoss`
    loads strictly, with class weights or without. The module's own stay; one made on the meta device has to be given
    them again.
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


class PolyCrossEntropyLoss(Loss):
    """:func:`longtail.poly_cross_entropy` as a module, with its options."""

    _function = staticmethod(functional.poly_cross_entropy)


class GeneralizedCrossEntropyLoss(Loss):
    """:func:`longtail.generalized_cross_entropy` as a module, with its options."""

    _function = staticmethod(functional.generalized_cross_entropy)
