"""One shard of the classes of a softmax loss in Triton: its statistics, and its gradient from those of all shards.

Rows [N, C] of a vocabulary-parallel layer. The target is a class of this shard, ignore_index, or -1: in another shard.
"""

from typing import Any

import torch
from torch import Tensor

from longtail.options import SoftmaxOptions

from .checks import check_shard
from .launching import on
from .loss_math import Vectors, loss_options
from .softmax_loss import launch_rows


def _launch(
    logits: Tensor, target: Tensor, row_grad: Tensor | None, stats: Tensor | None, grad: Tensor | None,
    options: SoftmaxOptions,
) -> None:  # fmt: skip
    check_shard(logits, target, row_grad, options)
    if logits.shape[0] == 0:
        return
    x = Vectors(options.weight, options.class_bias, options.class_margin)
    tensors = (logits, target, None, None if row_grad is None else row_grad.contiguous(), None, stats, grad)
    with on(logits.device):
        launch_rows(tensors, options.ignore_index, x, loss_options(options), heavy=False, shard=True)


def softmax_loss_accumulate(
    logits: Tensor, target: Tensor, weight: Tensor | None, class_bias: Tensor | None, class_margin: Tensor | None,
    ignore_index: int, label_smoothing: bool, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    options = SoftmaxOptions(
        *(weight, class_bias, class_margin),
        ignore_index=ignore_index,
        label_smoothing=float(label_smoothing),
        scale=scale,
        softcap=softcap,
    )
    stats = logits.new_empty((logits.shape[0], 5), dtype=torch.float32)
    _launch(logits, target, None, stats, None, options)
    return stats


def _apply_options(
    weight: Tensor | None, class_bias: Tensor | None, ignore_index: int, scale: float, softcap: float
) -> SoftmaxOptions:
    """With label smoothing: a row's S says whether there is some."""
    return SoftmaxOptions(
        weight, class_bias, ignore_index=ignore_index, label_smoothing=1.0, scale=scale, softcap=softcap
    )


def softmax_loss_apply(logits: Tensor, target: Tensor, row_grad: Tensor, *options: Any) -> Tensor:
    grad = logits.new_empty(logits.shape)
    _launch(logits, target, row_grad, None, grad, _apply_options(*options))
    return grad


def softmax_loss_apply_(logits: Tensor, target: Tensor, row_grad: Tensor, *options: Any) -> None:
    _launch(logits, target, row_grad, None, logits, _apply_options(*options))
