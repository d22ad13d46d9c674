"""The sigmoid family as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional_sigmoid
from .modules import _Loss
from .sigmoid_loss import sigmoid_loss


class SigmoidFocalLoss(_Loss):
    """:func:`longtail.sigmoid_focal_loss` as a module. ``options``: the keyword-only arguments of the function."""

    _function = staticmethod(functional_sigmoid.sigmoid_focal_loss)

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        reduction: str = "none",
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(weight=weight, pos_weight=pos_weight, alpha=alpha, gamma=gamma, reduction=reduction, **options)


class SigmoidCrossEntropyLoss(_Loss):
    """:func:`longtail.sigmoid_cross_entropy` as a module, for :class:`torch.nn.BCEWithLogitsLoss`."""

    _function = staticmethod(functional_sigmoid.sigmoid_cross_entropy)
    _passes_on_to = staticmethod(sigmoid_loss)

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            weight=weight,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            pos_weight=pos_weight,
            **options,
        )


class BinaryFocalLoss(_Loss):
    """:func:`longtail.binary_focal_loss` as a module. ``options``: the keyword-only arguments of the function."""

    _function = staticmethod(functional_sigmoid.binary_focal_loss)
    _passes_on_to = staticmethod(sigmoid_loss)
    _sets = ("class_weight_by_target",)

    def __init__(self, alpha: float | None = None, gamma: float = 2.0, reduction: str = "mean", **options: Any) -> None:
        super().__init__(alpha=alpha, gamma=gamma, reduction=reduction, **options)

    def _call_on_nothing(self, **options: Any) -> None:
        nothing = torch.empty(0, device="meta", dtype=torch.float64)
        type(self)._function(nothing, nothing, **options)
