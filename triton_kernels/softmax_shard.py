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
    logits: Tensor, target: Tensor, target_terms: Tensor | None, row_grad: Tensor | None, stats: Tensor | None,
    grad: Tensor | None, options: SoftmaxOptions,
) -> None:  # fmt: skip
    check_shard(logits, target, target_terms, row_grad, options)
    if logits.numel() == 0:  # no rows, or none of the classes
        if stats is not None:
            stats.zero_()[:, 0] = torch.where(target == options.ignore_index, 0.0, -torch.inf)
        return
    row_grad = None if row_grad is None else row_grad.contiguous()
    tensors = (logits, target, None, target_terms, row_grad, None, stats, grad)
    x, o = Vectors(*options.parted()[0]), loss_options(options)
    with on(logits.device):
        launch_rows(tensors, options.ignore_index, x, o, heavy=False, shard=True)


def softmax_loss_accumulate(
    logits: Tensor, target: Tensor, weight: Tensor | None, class_bias: Tensor | None, class_margin: Tensor | None,
    class_scale: Tensor | None, target_scale: Tensor | None, class_mitigation: Tensor | None,
    target_terms: Tensor | None, ignore_index: int, label_smoothing: bool, scale: float, softcap: float,
    compensation: float,
) -> Tensor:  # fmt: skip
    options = SoftmaxOptions(
        *(weight, class_bias, class_margin, class_scale, target_scale, class_mitigation),
        ignore_index=ignore_index,
        label_smoothing=float(label_smoothing),
        scale=scale,
        softcap=softcap,
        compensation=compensation,
    )
    stats = logits.new_empty((logits.shape[0], 5), dtype=torch.float32)
    _launch(logits, target, target_terms, None, stats, None, options)
    return stats


def _apply(
    logits: Tensor, grad: Tensor, target: Tensor, row_grad: Tensor, weight: Tensor | None, class_bias: Tensor | None,
    class_scale: Tensor | None, target_scale: Tensor | None, class_mitigation: Tensor | None,
    target_terms: Tensor | None, ignore_index: int, scale: float, softcap: float, compensation: float,
) -> None:  # fmt: skip
    options = SoftmaxOptions(
        *(weight, class_bias, None, class_scale, target_scale, class_mitigation),
        ignore_index=ignore_index,
        label_smoothing=1.0,  # a row's S says whether there is some
        scale=scale,
        softcap=softcap,
        compensation=compensation,
    )
    _launch(logits, target, target_terms, row_grad, None, grad, options)


def softmax_loss_apply(logits: Tensor, *rest: Any) -> Tensor:
    grad = logits.new_empty(logits.shape)
    _apply(logits, grad, *rest)
    return grad


def softmax_loss_apply_(logits: Tensor, *rest: Any) -> None:
    _apply(logits, logits, *rest)
