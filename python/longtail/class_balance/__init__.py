"""What follows from the number of training samples per class: weights, biases and margins; and counting them."""

from .counting import class_counts
from .weights import (
    effective_number,
    effective_number_weight,
    inverse_frequency_weight,
    ldam_margin,
    logit_adjustment,
)

__all__ = [
    "class_counts",
    "effective_number",
    "effective_number_weight",
    "inverse_frequency_weight",
    "ldam_margin",
    "logit_adjustment",
]
