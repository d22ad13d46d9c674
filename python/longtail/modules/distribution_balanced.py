"""The distribution-balanced loss as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..class_balance.counts import Counts
from ..class_balance.rebalancing import rebalancing
from ..class_balance.scales import Clamp
from ..functional.multi_label import distribution_balanced_loss, rebalanced
from ..signatures import with_options_of
from .base import Loss

_MADE_OF = ("samples_per_class", "num_samples", "kappa", "empty")  # the class vectors, and negative_scale


class DistributionBalancedLoss(Loss):
    """:func:`longtail.distribution_balanced_loss`, its class vectors computed once: buffers.

    Args:
        samples_per_class, num_samples, gamma, kappa, negative_scale, empty: as in that function. They can be written
            too: the class vectors are computed anew, where they lie and in their dtype. Write a new object: a list
            changed in place is not seen.
        persistent: as in :class:`longtail.CrossEntropyLoss`.
        options: further ones of :func:`longtail.distribution_balanced_loss`.
    """

    _function = staticmethod(rebalanced)
    class_bias: Tensor
    inverse_counts: Tensor
    samples_per_class: Counts
    num_samples: int
    kappa: float
    empty: Clamp

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
        for name in ("class_bias", "inverse_counts"):
            if name in options:
                raise TypeError(f"DistributionBalancedLoss makes {name} itself (from samples_per_class)")
        made = rebalancing(samples_per_class, num_samples, kappa, negative_scale, empty)
        for name in _MADE_OF:  # of a subclass that wrote them before
            self.__dict__.pop(name, None)
        super().__init__(*made, gamma, negative_scale, persistent=persistent, **options)
        self.__dict__ |= dict(zip(_MADE_OF, (samples_per_class, num_samples, kappa, empty), strict=True))

    def __setattr__(self, name: str, value: Any) -> None:
        made_of = {other: self.__dict__[other] for other in (*_MADE_OF, "negative_scale") if other in self.__dict__}
        if name not in (*_MADE_OF, "negative_scale") or len(made_of) <= len(_MADE_OF):
            super().__setattr__(name, value)
            return
        made_of[name] = value
        made = rebalancing(**made_of, dtype=self.class_bias.dtype)
        super().__setattr__(name, value)
        for vector, found in made._asdict().items():
            super().__setattr__(vector, found.to(self.class_bias))

    def _call_on_nothing(self, **options: Any) -> None:
        one = torch.ones(1, device="meta", dtype=torch.float64)
        super()._call_on_nothing(**{"class_bias": one, "inverse_counts": one, **options})
