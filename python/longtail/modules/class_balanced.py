"""The class-balanced losses as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_choice
from ..class_balance.counts import Counts, PerClass, is_number
from ..class_balance.weights import effective_number_weight
from ..functional.class_balanced import CLASS_BALANCED, SETS, balanced, class_balanced_loss
from ..functional.sigmoid import sigmoid_focal_loss
from ..functional.softmax import cross_entropy
from ..signatures import with_options_of
from .base import LEGACY, Loss, differ, options_of

_MADE_OF = ("samples_per_class", "beta", "volume", "empty")  # the weights


def _balanced_options(loss: str) -> dict[str, Any]:
    family = cross_entropy if loss in ("softmax", "softmax_focal") else sigmoid_focal_loss
    passed_on = {name: x for name, x in options_of(family).items() if name not in (*SETS, *LEGACY, "alpha")}
    if family is sigmoid_focal_loss:
        passed_on |= {"alpha": None, "multi_label": "column"}
    own = options_of(balanced)
    return own | {name: default for name, default in passed_on.items() if name not in own}


_OPTIONS = _balanced_options("softmax") | _balanced_options("focal")  # of either family
_NO_WEIGHT = "weight is None, expected a Tensor [C]; beta = 0 is the unweighted loss"


class ClassBalancedLoss(Loss):
    """Class-balanced losses (Cui et al. 2019, eq. 11-13): :func:`longtail.class_balanced_loss`, weights computed once.

    Each row's loss is weighted by ``effective_number_weight(samples_per_class, beta)`` of its class, or, with a target
    for each element of "sigmoid" and "focal", each column by its class, as ``multi_label`` says; the mean is over the
    counted rows, as the paper's code has it, not over the sum of the weights.

    Args:
        samples_per_class: training samples of each class, [C].
        beta: in [0, 1], a number or one for each class; 0 is the unweighted loss, 1 inverse frequency. There is no
            default: what helps depends on the data (the paper tries 0.9, 0.99, 0.999, 0.9999).
        loss: "softmax", "softmax_focal", "sigmoid" or "focal".
        gamma: of the two focal losses.
        volume: instead of beta, N >= 1 of ``beta = (N - 1) / N``, a number or [C].
        empty: what to do with classes without samples, as in ``effective_number_weight``.
        persistent: whether the weights stand in the ``state_dict``, as in :class:`longtail.CrossEntropyLoss`.
        options: further arguments of :func:`longtail.class_balanced_loss`, the options of that loss among them.

    ``samples_per_class``, ``beta``, ``volume`` and ``empty`` can be written too: the weights are computed anew, where
    they lie and in their dtype (writing beta unsets volume, and the other way round). Write a new object: a list
    changed in place is not seen. ``loss`` can be written where no option is set that the new one lacks.

    Raises:
        TypeError: also when an option is written that the other losses have, and this one has not.
    """

    _function = staticmethod(balanced)
    weight: Tensor
    samples_per_class: Counts
    beta: PerClass | None
    volume: PerClass | None
    empty: str
    loss: str

    @with_options_of(class_balanced_loss, without=["input", "target"])
    def __init__(
        self,
        samples_per_class: Counts,
        beta: PerClass | None = None,
        loss: str = "softmax",
        gamma: float = 2.0,
        *,
        volume: PerClass | None = None,
        empty: str = "error",
        persistent: bool = True,
        **options: Any,
    ) -> None:
        check_choice("loss", loss, CLASS_BALANCED)
        for name in SETS:
            if name in options:
                raise TypeError(f"ClassBalancedLoss sets {name} itself (from samples_per_class, beta, loss and gamma)")
        made_of = {"samples_per_class": samples_per_class, "beta": beta, "volume": volume, "empty": empty}
        weight = effective_number_weight(**made_of)  # type: ignore[arg-type]
        for name in (*_MADE_OF, "loss"):  # of a subclass that wrote them before
            self.__dict__.pop(name, None)
        super().__init__(weight=weight, loss=loss, gamma=gamma, persistent=persistent, **options)
        self.__dict__ |= made_of

    def _accepted(self, options: dict[str, Any]) -> dict[str, Any]:
        return _balanced_options(options["loss"])

    def __setattr__(self, name: str, value: Any) -> None:
        if "loss" not in self.__dict__ or "_defaults" not in self.__dict__:  # not initialised yet
            super().__setattr__(name, value)
        elif name in _MADE_OF:
            self._make_weight(name, value)
        elif name == "loss":
            self._change_loss(value)
        elif name not in self._defaults and (name in SETS or name in _OPTIONS):
            raise TypeError(f"ClassBalancedLoss has no option {name} with loss={self.loss!r}")
        else:
            super().__setattr__(name, value)

    def _check(self, name: str, value: Any) -> None:
        if name == "weight" and value is None:
            raise TypeError(_NO_WEIGHT)
        super()._check(name, value)

    def _make_weight(self, name: str, value: Any) -> None:
        made_of = {other: getattr(self, other) for other in _MADE_OF} | {name: value}
        if name in ("beta", "volume") and value is not None:
            made_of["volume" if name == "beta" else "beta"] = None
        self.weight = effective_number_weight(**made_of, dtype=self.weight.dtype).to(self.weight)
        self.__dict__ |= made_of

    def _change_loss(self, loss: str) -> None:
        """Each family has options of its own: the set ones are kept, where the other takes them."""
        options = self._changed_options()
        del options["weight"]
        made_of = {name: getattr(self, name) for name in _MADE_OF}
        ClassBalancedLoss(**made_of, **{**options, "loss": loss})  # raises what does not go together
        options |= {"weight": self.weight, "loss": loss}
        for name in self._defaults:
            delattr(self, name)
        self._set_options(_balanced_options(loss), options)

    def _changed_options(self) -> dict[str, Any]:
        return {name: value for name, value in self._options().items() if differ(value, self._defaults[name])}

    def _call_on_nothing(self, **options: Any) -> None:
        weight = torch.ones(1, device="meta", dtype=torch.float64)
        super()._call_on_nothing(**{"weight": weight, "loss": self.__dict__.get("loss", "softmax"), **options})

    def forward(self, input: Tensor, target: Tensor, **overrides: Any) -> Any:
        """The loss of ``input`` and ``target``; keyword arguments override options (``sample_weight=`` of a batch)."""
        for name in _MADE_OF:
            if name in overrides:
                raise TypeError(f"{name} makes the weights, once: write it to the module, or pass weight=")
        if overrides.get("weight", self.weight) is None:
            raise TypeError(_NO_WEIGHT)
        other = overrides.get("loss", self.loss) != self.loss  # of which not every option may be known
        options = self._changed_options() if other else self._options()
        return balanced(input, target, **{**options, **overrides})

    def extra_repr(self) -> str:
        given = "beta" if self.volume is None else "volume"
        value = getattr(self, given)
        shown = repr(getattr(value, "item", lambda: value)()) if is_number(value) else "[C]"
        return f"{given}={shown}, {super().extra_repr()}"
