"""The losses in plain PyTorch: the truth that kernels are tested against, and what runs where there are none."""

from . import sigmoid as sigmoid
from . import softmax as softmax
from .sigmoid import sigmoid_elements, sigmoid_loss
from .softmax import cross_entropy, softmax_loss

__all__ = ["cross_entropy", "sigmoid_elements", "sigmoid_loss", "softmax_loss"]
