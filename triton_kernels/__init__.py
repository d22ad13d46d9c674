"""Triton kernels of longtail. Importing this package does not import Triton; the modules below do."""

OPERATORS = {
    "softmax_loss": "softmax_loss",
    "softmax_loss_backward": "softmax_loss",
    "softmax_loss_and_grad": "softmax_loss",
    "softmax_loss_and_grad_": "softmax_loss",
    "softmax_loss_accumulate": "softmax_shard",
    "softmax_loss_apply": "softmax_shard",
    "softmax_loss_apply_": "softmax_shard",
    "sigmoid_loss": "sigmoid_loss",
    "sigmoid_loss_backward": "sigmoid_loss",
    "sigmoid_loss_and_grad": "sigmoid_loss",
    "sigmoid_loss_and_grad_": "sigmoid_loss",
    "hierarchical_loss": "hierarchical_loss",
    "hierarchical_loss_backward": "hierarchical_loss",
    "hierarchical_loss_backward_": "hierarchical_loss",
    "hierarchical_loss_and_grad": "hierarchical_loss",
    "hierarchical_loss_and_grad_": "hierarchical_loss",
    "two_way_loss": "two_way_loss",
    "two_way_loss_backward": "two_way_loss",
    "two_way_loss_and_grad": "two_way_loss",
    "two_way_loss_and_grad_": "two_way_loss",
    "scale_grad_": "scale_grad",
    "mean_denominator": "means",
    "mean_loss": "means",
}
"""Operator -> the module that launches it."""
