"""The losses in plain PyTorch: the truth that kernels are tested against, and what runs where there are none."""

from . import hierarchical as hierarchical
from . import sigmoid as sigmoid
from . import softmax as softmax
from . import two_way as two_way
from .hierarchical import hierarchical_loss
from .row_statistics import row_statistics
from .sigmoid import sigmoid_elements, sigmoid_loss
from .softmax_rows import cross_entropy, softmax_loss
from .two_way import two_way_loss

__all__ = [
    "cross_entropy",
    "hierarchical_loss",
    "row_statistics",
    "sigmoid_elements",
    "sigmoid_loss",
    "softmax_loss",
    "two_way_loss",
]
