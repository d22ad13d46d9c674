"""What bounds a gradient that float16 has to hold."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_HALF = 65504.0

Size = Tensor | float
"""A bound of the elements of the gradient of the losses' sum; a number where it does not depend on the data."""


def largest(values: Tensor, counted: Tensor) -> Tensor:
    """The largest finite one of ``values`` among ``counted``, which broadcast; 0 of none."""
    values, counted = torch.broadcast_tensors(values, counted)
    return values.new_zeros(()) if values.numel() == 0 else values.where(counted & values.isfinite(), 0.0).amax()
