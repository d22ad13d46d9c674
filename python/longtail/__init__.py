"""Fused losses for long-tailed and large-vocabulary training in PyTorch.

``longtail.cross_entropy`` is a superset of ``torch.nn.functional.cross_entropy``: class-balanced and focal weighting,
complement entropy, logit adjustment, margins, softcap and z-loss in the same single pass over the logits.
"""

from . import operator_autograd as operator_autograd
from . import reference, training
from .class_balance import (
    class_counts,
    effective_number,
    effective_number_weight,
    inverse_frequency_weight,
    ldam_margin,
    logit_adjustment,
)
from .class_balanced_module import ClassBalancedLoss
from .dispatch import backends, use_backend
from .functional import complement_cross_entropy, complement_entropy, cross_entropy, focal_loss
from .functional_sigmoid import binary_focal_loss, class_balanced_loss, sigmoid_cross_entropy, sigmoid_focal_loss
from .linear_cross_entropy import linear_cross_entropy
from .linear_modules import LinearCrossEntropyLoss
from .modules import ComplementCrossEntropyLoss, ComplementEntropyLoss, CrossEntropyLoss, FocalLoss
from .modules_sigmoid import BinaryFocalLoss, SigmoidCrossEntropyLoss, SigmoidFocalLoss
from .no_vmap import refuse_vmap as _refuse_vmap
from .softmax_loss import RowStats
from .vocab_parallel import vocab_parallel_cross_entropy
from .vocab_parallel_linear import vocab_parallel_linear_cross_entropy

_refuse_vmap()

__version__ = "0.1.0"

__all__ = [
    "BinaryFocalLoss",
    "ClassBalancedLoss",
    "ComplementCrossEntropyLoss",
    "ComplementEntropyLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "LinearCrossEntropyLoss",
    "RowStats",
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
    "inverse_frequency_weight",
    "ldam_margin",
    "linear_cross_entropy",
    "logit_adjustment",
    "reference",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "training",
    "use_backend",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
