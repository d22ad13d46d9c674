"""What an option that is a number may be."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ..arguments import LIMITS, check_number


class Number(NamedTuple):
    """What may be passed for an option that is a number."""

    name: str
    """As users pass it."""
    low: float = -math.inf
    high: float = math.inf
    off: float | None = 0.0
    """The value that does nothing. None: so does None, which operators take as 0, and others are positive."""
    vanishes: bool = True
    """Whether it may be so near 0 that the dtype of the arithmetic takes it for 0."""
    share: float = 1.0
    """Of the largest number of that dtype: how large it may be."""
    needs_class: bool = False
    """Whether it means something for one target class alone, and nothing for class probabilities."""

    def check(self, value: Any, dtype: torch.dtype) -> float:
        """``value`` as a float that ``dtype`` holds."""
        if value is None and self.off is None:
            return 0.0
        largest = math.inf if self.share == 1 else self.share * LIMITS[dtype][0]
        low, high = max(self.low, -largest), min(self.high, largest)
        number = check_number(self.name, value, low, high, dtype=dtype, vanishes=self.vanishes)
        if self.off is None and number <= 0:
            raise ValueError(f"{self.name} is {number}, expected a positive number or None")
        return number

    def given(self, value: float) -> float | None:
        """What users pass for a checked ``value``."""
        return None if self.off is None and value == 0 else value
