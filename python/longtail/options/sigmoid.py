"""The options of the sigmoid family."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_integer, check_number
from ..errors import ArgumentTypeError
from .vectors import checked_vectors

SIGMOID_VECTORS = ("weight", "pos_weight", "sample_weight")
_VECTORS = len(SIGMOID_VECTORS)


class SigmoidOptions(NamedTuple):
    """What the sigmoid operators take after the data, in their order; the meaning: :func:`longtail.sigmoid_focal_loss`.

    As users give them, or, after :meth:`checked` and :meth:`prepared`, as the operators take them.
    """

    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    sample_weight: Tensor | None = None
    class_weight_by_target: bool = False
    ignore_index: int | None = None
    alpha: float | None = None
    gamma: float = 0.0

    def parted(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The tensors, which autograd has to see, and the rest; one after the other they are the whole."""
        return self[:_VECTORS], self[_VECTORS:]

    def checked(self, dtype: torch.dtype) -> SigmoidOptions:
        """With numbers that are floats, and that ``dtype``, of the arithmetic, holds.

        Raises:
            TypeError, ValueError: an option that is no tensor is wrong.
        """
        if self.ignore_index is not None:
            check_integer("ignore_index", self.ignore_index, expected="an int or None")
        gamma, alpha = check_number("gamma", self.gamma, 0.0, dtype=dtype), self.alpha
        if alpha is not None:
            try:
                alpha = check_number("alpha", alpha, high=1.0)
            except ArgumentTypeError as error:
                way = "a per-class alpha a [C] is alpha=None, weight=1 - a, pos_weight=a / (1 - a)"
                raise ArgumentTypeError(f"{error}; {way}") from None
            alpha = None if alpha < 0 else alpha
        return self if alpha is self.alpha and gamma is self.gamma else self._replace(alpha=alpha, gamma=gamma)

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
        vectors, (by_target, ignore_index, alpha, gamma) = self.parted()
        if ignore_index is None and not dense:
            ignore_index = -100
        elif by_target is False and not [x for x in vectors if x is not None]:  # at most calls
            return self
        found = checked_vectors(SIGMOID_VECTORS, vectors, input, rows, num_classes, dtype)
        found += [bool(by_target), ignore_index, alpha, gamma]
        return SigmoidOptions(*found)
