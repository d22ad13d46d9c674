"""Triton kernels of longtail. Importing this package does not import Triton; the modules below do."""

OPERATORS = {
    "softmax_loss": "softmax_loss",
    "softmax_loss_backward": "softmax_loss",
    "softmax_loss_and_grad": "softmax_loss",
    "softmax_loss_and_grad_": "softmax_loss",
    "scale_grad_": "softmax_loss",
}
"""Operator -> the module that launches it. The others run on the reference backend."""
