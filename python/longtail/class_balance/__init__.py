"""What is known of the classes: weights, biases and margins from their training samples, counting; a tree over them."""

from .counting import class_counts
from .hierarchy import Hierarchy, HierarchyTables
from .weights import (
    effective_number,
    effective_number_weight,
    inverse_frequency_weight,
    ldam_margin,
    logit_adjustment,
)

__all__ = [
    "Hierarchy",
    "HierarchyTables",
    "class_counts",
    "effective_number",
    "effective_number_weight",
    "inverse_frequency_weight",
    "ldam_margin",
    "logit_adjustment",
]
