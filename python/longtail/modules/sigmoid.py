"""The sigmoid family as modules."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import functional
from ..class_balance.rebalancing import rebalancing
from ..class_balance.scales import Clamp
from ..class_balance.weights import Counts
from ..functional.multi_label import SETS, distribution_balanced_loss, rebalanced
from ..signatures import with_options_of
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


class DistributionBalancedLoss(Loss):
    """:func:`longtail.distribution_balanced_loss`, its class vectors computed once: buffers.

    Args:
        samples_per_class, num_samples, gamma, kappa, negative_scale, empty: as in that function. Of these gamma and
            negative_scale can be written afterwards; the vectors stay as they are made.
        persistent: as in :class:`longtail.CrossEntropyLoss`.
        options: further ones of :func:`longtail.distribution_balanced_loss`.
    """

    _function = staticmethod(rebalanced)
    class_bias: Tensor
    inverse_counts: Tensor

    @with_options_of(distribution_balanced_loss, without=["input", "target"])
    def __init__(
        self,
        samples_per_class: Counts,
        num_samples: int,
        gamma: float | Tensor = 2.0,
        *,
        kappa: float = 0.05,
        negative_scale: float = 2.0,
        empty: Clamp = "error",
        persistent: bool = True,
        **options: Any,
    ) -> None:
        for name in SETS:
            if name in options:
                raise TypeError(f"DistributionBalancedLoss sets {name} itself (from samples_per_class and num_samples)")
        made = rebalancing(samples_per_class, num_samples, kappa, negative_scale, empty)
        super().__init__(*made, gamma, negative_scale, persistent=persistent, **options)

    def _call_on_nothing(self, **options: Any) -> None:
        one = torch.ones(1, device="meta", dtype=torch.float64)
        super()._call_on_nothing(**{"class_bias": one, "inverse_counts": one, **options})
