"""The options of the losses of two sides of a row: ZLPR and the two-way loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_integer, check_number
from .vectors import checked_vectors

TWO_WAY_VECTORS = ("class_bias", "sample_weight")
_VECTORS = len(TWO_WAY_VECTORS)


class TwoWayOptions(NamedTuple):
    """What the operators of these losses take after the data, in their order; see :func:`longtail.two_way_loss`.

    As users give them, or, after :meth:`checked` and :meth:`prepared`, as the operators take them.
    """

    class_bias: Tensor | None = None
    sample_weight: Tensor | None = None
    ignore_index: int | None = None
    positive_temperature: float = 1.0
    negative_temperature: float = 1.0
    joint: bool = False
    """Whether the loss is the softplus of the two sides' sum, and a row needs a positive to count; or a sum of two."""

    def parted(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The tensors, which autograd has to see, and the rest; one after the other they are the whole."""
        return self[:_VECTORS], self[_VECTORS:]

    def checked(self, dtype: torch.dtype) -> TwoWayOptions:
        """With numbers that are floats, and that ``dtype``, of the arithmetic, holds.

        Raises:
            TypeError, ValueError: an option that is no tensor is wrong.
        """
        if self.ignore_index is not None:
            check_integer("ignore_index", self.ignore_index, expected="an int or None")
        positive = _temperature("positive_temperature", self.positive_temperature, dtype)
        negative = _temperature("negative_temperature", self.negative_temperature, dtype)
        return self._replace(positive_temperature=positive, negative_temperature=negative)

    def prepared(
        self, input: Tensor, rows: torch.Size, num_classes: int, dtype: torch.dtype, dense: bool
    ) -> TwoWayOptions:
        """As the operators take checked ones: vectors flat and in ``dtype``.

        Args:
            rows: the shape of the rows.
            dense: whether there is a target for each element, not a class for each row.

        Raises:
            TypeError, ValueError: a vector is wrong.
        """
        found = checked_vectors(TWO_WAY_VECTORS, self[:_VECTORS], input, rows, num_classes, dtype)
        ignore_index = -100 if self.ignore_index is None and not dense else self.ignore_index
        return self._replace(**dict(zip(TWO_WAY_VECTORS, found, strict=True)), ignore_index=ignore_index)


def _temperature(name: str, value: Any, dtype: torch.dtype) -> float:
    number = check_number(name, value, 0.0, dtype=dtype, vanishes=False)
    if number <= 0:
        raise ValueError(f"{name} is {number}, expected a positive number")
    return number
