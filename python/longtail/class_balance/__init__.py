"""What is known of the classes: weights, biases, margins and scales from their counts, counting."""

from .counting import class_counts
from .scales import adjusted_logits, cdt_scale, immax_scale, seesaw_mitigation, vector_scaling
from .weights import (
    effective_number,
    effective_number_weight,
    inverse_frequency_weight,
    ldam_margin,
    logit_adjustment,
    positive_weight,
)

__all__ = [
    "adjusted_logits",
    "cdt_scale",
    "class_counts",
    "effective_number",
    "effective_number_weight",
    "immax_scale",
    "inverse_frequency_weight",
    "ldam_margin",
    "logit_adjustment",
    "positive_weight",
    "seesaw_mitigation",
    "vector_scaling",
]
