"""The options of the sigmoid family."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_integer, check_number
from ..errors import ArgumentTypeError, ArgumentValueError
from .number import Number
from .vectors import checked_vectors

SIGMOID_VECTORS = (
    "weight",
    "pos_weight",
    "sample_weight",
    "class_bias",
    "class_alpha",
    "class_gamma",
    "inverse_counts",
)
_VECTORS = len(SIGMOID_VECTORS)
_GIVEN_AS = {"class_alpha": "alpha", "class_gamma": "gamma"}
"""What users call the vectors that have another name here."""

SIGMOID_NUMBERS = {
    number.name: number
    for number in (
        Number("gamma", low=0.0),
        Number("clip", low=0.0, high=1.0, vanishes=False),
        Number("negative_scale", low=0.0, off=1.0, vanishes=False),
        Number("label_smoothing", low=0.0, high=1.0),
        Number("rebalance_alpha", low=0.0),
        Number("rebalance_beta", low=0.0, vanishes=False),
        Number("rebalance_mu"),
    )
}
SIGMOID_INNER = (
    *_GIVEN_AS,
    "inverse_counts",
    "rebalance_alpha",
    "rebalance_beta",
    "rebalance_mu",
)
"""What users do not pass under these names: vectors, and what :func:`longtail.distribution_balanced_loss` makes."""


class SigmoidOptions(NamedTuple):
    """What the sigmoid operators take after the data, in their order; the meaning: :func:`longtail.sigmoid_focal_loss`.

    As users give them, or, after :meth:`checked` and :meth:`prepared`, as the operators take them: where users give a
    tensor for alpha or gamma, there ``class_alpha`` or ``class_gamma`` stands in the place of the number.
    """

    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    sample_weight: Tensor | None = None
    class_bias: Tensor | None = None
    class_alpha: Tensor | None = None
    class_gamma: Tensor | None = None
    inverse_counts: Tensor | None = None
    class_weight_by_target: bool = False
    ignore_index: int | None = None
    alpha: float | None = None
    gamma: float = 0.0
    gamma_negative: float | None = None
    clip: float = 0.0
    detach: bool = False
    negative_scale: float = 1.0
    label_smoothing: float = 0.0
    rebalance_alpha: float = 0.0
    rebalance_beta: float = 0.0
    rebalance_mu: float = 0.0

    def parted(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The tensors, which autograd has to see, and the rest; one after the other they are the whole."""
        return self[:_VECTORS], self[_VECTORS:]

    @property
    def is_plain(self) -> bool:
        """Whether the elements are those of a focal loss with one exponent: nothing else is asked of them."""
        vectors = (self.class_bias, self.class_alpha, self.class_gamma, self.inverse_counts)
        own_exponent = self.gamma_negative is not None and self.gamma_negative != self.gamma
        unmoved = self.clip == 0 and self.negative_scale == 1 and self.label_smoothing == 0
        return all(x is None for x in vectors) and unmoved and not own_exponent and not (self.detach and self.gamma)

    def checked(self, dtype: torch.dtype) -> SigmoidOptions:
        """With numbers that are floats, and that ``dtype``, of the arithmetic, holds.

        Raises:
            TypeError, ValueError: an option that is no tensor is wrong.
        """
        if self.ignore_index is not None:
            check_integer("ignore_index", self.ignore_index, expected="an int or None")
        found: dict[str, Any] = {}
        for name, given in (("alpha", self.alpha), ("gamma", self.gamma)):
            if type(given) is not float and given is not None:
                found |= _of_each_class(name, given)
        # What is off needs no check: time at every call.
        for value, number in zip(self[_FIRST_NUMBER:], _NUMBERS, strict=True):
            if number is None or (type(value) is float and value == number.off) or number.name in found:
                continue
            if (checked := number.check(value, dtype)) is not value:
                found[number.name] = checked
        if self.alpha is not None and "alpha" not in found:
            alpha = check_number("alpha", self.alpha, high=1.0)
            if alpha < 0 or alpha is not self.alpha:
                found["alpha"] = None if alpha < 0 else alpha
        if self.gamma_negative is not None:
            found["gamma_negative"] = check_number("gamma_negative", self.gamma_negative, 0.0, dtype=dtype)
        if type(self.detach) is not bool:
            raise ArgumentTypeError(f"detach is a {type(self.detach).__name__}, expected a bool")
        if self.clip == 1:
            raise ArgumentValueError("clip is 1, expected a number below it")
        if self.negative_scale == 0:
            raise ArgumentValueError("negative_scale is 0, expected a positive number")
        return self._replace(**found) if found else self

    def prepared(
        self, input: Tensor, rows: torch.Size, num_classes: int, dtype: torch.dtype, dense: bool
    ) -> SigmoidOptions:
        """As the operators take checked ones: vectors flat and in ``dtype``.

        Args:
            rows: the shape of the rows.
            dense: whether there is a target for each element, not a class for each row.

        Raises:
            TypeError, ValueError: a vector is wrong, or does not go with the targets.
        """
        if self.class_weight_by_target and (dense or self.weight is None):
            raise ValueError("class_weight_by_target needs class indices as targets, and weight")
        vectors, (by_target, ignore_index, *numbers) = self.parted()
        if ignore_index is None and not dense:
            ignore_index = -100
        elif by_target is False and not [x for x in vectors if x is not None]:  # at most calls
            return self
        if any(x is not None for x in vectors):
            vectors = tuple(checked_vectors(_GIVEN_NAMES, vectors, input, rows, num_classes, dtype))
        options = SigmoidOptions(*(*vectors, bool(by_target), ignore_index, *numbers))
        _check_values("alpha", options.class_alpha, 1.0)
        _check_values("gamma", options.class_gamma, torch.inf)
        return options._rebalanced_evenly() if options.rebalance_beta == 0 else options

    def _rebalanced_evenly(self) -> SigmoidOptions:
        """Re-balanced with a beta of 0: by one weight, while kernels would multiply it by an infinite ratio."""
        if self.inverse_counts is None:
            return self
        weight = torch.ones_like(self.inverse_counts) if self.weight is None else self.weight
        return self._replace(weight=weight * (self.rebalance_alpha + 0.5), inverse_counts=None)


_FIRST_NUMBER = SigmoidOptions._fields.index("gamma")
_NUMBERS = [SIGMOID_NUMBERS.get(name) for name in SigmoidOptions._fields[_FIRST_NUMBER:]]
_GIVEN_NAMES = tuple(_GIVEN_AS.get(name, name) for name in SIGMOID_VECTORS)


def _of_each_class(name: str, value: Any) -> dict[str, Any]:
    """The fields that say what was given for ``name``, alpha or gamma, if that is a tensor [C]."""
    if isinstance(value, list | tuple):
        raise ArgumentTypeError(f"{name} is a {type(value).__name__}, expected a number, or a tensor [C]")
    if not isinstance(value, Tensor) or value.dim() == 0:
        return {}
    return {f"class_{name}": value, name: SigmoidOptions._field_defaults[name]}


def _check_values(name: str, value: Tensor | None, high: float) -> None:
    """On the CPU: every element is a finite number in [0, ``high``]."""
    if value is None or value.device.type != "cpu" or torch.compiler.is_compiling() or value.numel() == 0:
        return
    bad = ~((value >= 0) & (value <= high) & (value < torch.inf))
    try:
        if not bad.any():
            return
    except RuntimeError:  # what is traced has no values
        return
    place = int(bad.nonzero()[0])
    raise ArgumentValueError(
        f"{name} is {value[place].item():g} at index {place}, expected finite numbers in [0, {high:g}]"
    )
