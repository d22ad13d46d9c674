"""What bounds a gradient that float16 has to hold."""

from __future__ import annotations

from torch import Tensor

LARGEST_HALF = 65504.0

Size = Tensor | float
"""A bound of the elements of the gradient of the losses' sum; a number where it does not depend on the data."""


def largest(values: Tensor, counted: Tensor) -> Tensor:
    """The largest finite one of ``values``, none negative, among ``counted``, which broadcast; 0 of none."""
    finite = values.nan_to_num(0.0, 0.0, 0.0) * counted
    return values.new_zeros(()) if finite.numel() == 0 else finite.amax()
