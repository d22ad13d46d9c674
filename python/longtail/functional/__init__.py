"""The losses as functions: what users call, and what it means. The work is done in the rooms below."""

from .class_balanced import class_balanced_loss
from .hierarchical import (
    hierarchical_cross_entropy,
    linear_hierarchical_cross_entropy,
    vocab_parallel_hierarchical_cross_entropy,
    vocab_parallel_linear_hierarchical_cross_entropy,
)
from .linear import linear_cross_entropy
from .multi_label import asymmetric_loss, distribution_balanced_loss
from .row_losses import generalized_cross_entropy, poly_cross_entropy, token_weighting
from .seesaw import seesaw_loss
from .sigmoid import binary_focal_loss, sigmoid_cross_entropy, sigmoid_focal_loss
from .softmax import complement_cross_entropy, complement_entropy, cross_entropy, focal_loss
from .statistics import linear_row_statistics, row_statistics
from .two_way import two_way_loss, zlpr_loss
from .vocab_parallel import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_linear_row_statistics,
    vocab_parallel_row_statistics,
)

__all__ = [
    "asymmetric_loss",
    "binary_focal_loss",
    "class_balanced_loss",
    "complement_cross_entropy",
    "complement_entropy",
    "cross_entropy",
    "distribution_balanced_loss",
    "focal_loss",
    "generalized_cross_entropy",
    "hierarchical_cross_entropy",
    "linear_cross_entropy",
    "linear_hierarchical_cross_entropy",
    "linear_row_statistics",
    "poly_cross_entropy",
    "row_statistics",
    "seesaw_loss",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "token_weighting",
    "two_way_loss",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_hierarchical_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_linear_hierarchical_cross_entropy",
    "vocab_parallel_linear_row_statistics",
    "vocab_parallel_row_statistics",
    "zlpr_loss",
]
