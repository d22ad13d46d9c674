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

_OWN = ("samples_per_class", "num_samples", "kappa", "empty")  # no options of `rebalanced`
_MADE_OF = (*_OWN, "negative_scale")


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
        for name in _OWN:  # of a subclass that wrote them before
            self.__dict__.pop(name, None)
        super().__init__(*made, gamma, negative_scale, persistent=persistent, **options)
        self.__dict__ |= dict(zip(_OWN, (samples_per_class, num_samples, kappa, empty), strict=True))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _MADE_OF or _OWN[0] not in self.__dict__:
            super().__setattr__(name, value)
            return
        made = self._made({name: value})
        super().__setattr__(name, value)
        for vector, found in made.items():
            super().__setattr__(vector, found)

    def _made(self, others: dict[str, Any]) -> dict[str, Tensor]:
        """The class vectors, with ``others`` in the place of what they are made of."""
        made = rebalancing(**{name: getattr(self, name) for name in _MADE_OF} | others, dtype=self.class_bias.dtype)
        return {name: vector.to(self.class_bias) for name, vector in made._asdict().items()}

    def _call_on_nothing(self, **options: Any) -> None:
        one = torch.ones(1, device="meta", dtype=torch.float64)
        super()._call_on_nothing(**{"class_bias": one, "inverse_counts": one, **options})

    def forward(self, input: Tensor, target: Tensor, **overrides: Any) -> Any:
        """The loss of ``input`` and ``target``; keyword arguments override options (``sample_weight=`` of a batch)."""
        others = {name: overrides[name] for name in _MADE_OF if name in overrides}
        if others:
            overrides = self._made(others) | {name: x for name, x in overrides.items() if name not in _OWN}
        return super().forward(input, target, **overrides)

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}, kappa={self.kappa}, {super().extra_repr()}"
