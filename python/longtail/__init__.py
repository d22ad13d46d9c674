"""Fused losses for long-tailed and large-vocabulary training in PyTorch.

``longtail.cross_entropy`` is a superset of ``torch.nn.functional.cross_entropy``: class-balanced and focal weighting,
complement entropy, logit adjustment, margins, softcap and z-loss in the same sweeps over the logits.
"""

from . import reference, training
from .class_balance import (
    class_counts,
    effective_number,
    effective_number_weight,
    inverse_frequency_weight,
    ldam_margin,
    logit_adjustment,
)
from .functional import (
    binary_focal_loss,
    class_balanced_loss,
    complement_cross_entropy,
    complement_entropy,
    cross_entropy,
    focal_loss,
    generalized_cross_entropy,
    linear_cross_entropy,
    linear_row_statistics,
    poly_cross_entropy,
    row_statistics,
    sigmoid_cross_entropy,
    sigmoid_focal_loss,
    token_weighting,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_linear_row_statistics,
    vocab_parallel_row_statistics,
)
from .modules import (
    BinaryFocalLoss,
    ClassBalancedLoss,
    ComplementCrossEntropyLoss,
    ComplementEntropyLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    LinearCrossEntropyLoss,
    PolyCrossEntropyLoss,
    SigmoidCrossEntropyLoss,
    SigmoidFocalLoss,
)
from .ops.backends import backends
from .ops.dispatch import use_backend
from .reference.row_statistics import RowStatistics
from .version import __version__ as __version__

__all__ = [
    "BinaryFocalLoss",
    "ClassBalancedLoss",
    "ComplementCrossEntropyLoss",
    "ComplementEntropyLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "PolyCrossEntropyLoss",
    "RowStatistics",
    "SigmoidCrossEntropyLoss",
    "SigmoidFocalLoss",
    "backends",
    "binary_focal_loss",
    "class_balanced_loss",
    "class_counts",
    "complement_cross_entropy",
    "complement_entropy",
    "cross_entropy",
    "effective_number",
    "effective_number_weight",
    "focal_loss",
    "generalized_cross_entropy",
    "inverse_frequency_weight",
    "ldam_margin",
    "linear_cross_entropy",
    "linear_row_statistics",
    "logit_adjustment",
    "poly_cross_entropy",
    "reference",
    "row_statistics",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "token_weighting",
    "training",
    "use_backend",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_linear_row_statistics",
    "vocab_parallel_row_statistics",
]
