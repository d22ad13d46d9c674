"""The losses as modules, made from the functions."""

from .class_balanced import ClassBalancedLoss
from .distribution_balanced import DistributionBalancedLoss
from .hierarchical import HierarchicalCrossEntropyLoss
from .linear import LinearCrossEntropyLoss
from .seesaw import SeesawLoss
from .sigmoid import (
    AsymmetricLoss,
    BinaryFocalLoss,
    SigmoidCrossEntropyLoss,
    SigmoidFocalLoss,
)
from .softmax import (
    ComplementCrossEntropyLoss,
    ComplementEntropyLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    PolyCrossEntropyLoss,
)
from .two_way import TwoWayLoss, ZLPRLoss

__all__ = [
    "AsymmetricLoss",
    "BinaryFocalLoss",
    "ClassBalancedLoss",
    "ComplementCrossEntropyLoss",
    "ComplementEntropyLoss",
    "CrossEntropyLoss",
    "DistributionBalancedLoss",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "HierarchicalCrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "PolyCrossEntropyLoss",
    "SeesawLoss",
    "SigmoidCrossEntropyLoss",
    "SigmoidFocalLoss",
    "TwoWayLoss",
    "ZLPRLoss",
]
