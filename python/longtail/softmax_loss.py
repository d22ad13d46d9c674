"""From checked arguments to the operators: rows, denominators and row statistics of the softmax family."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments, ops, reference
from .autograd import SoftmaxLoss, reduce_loss


class RowStats(NamedTuple):
    """What a loss knows about each row, at no extra pass over the logits; each of the target's shape, detached.

    Everything refers to the effective logits (scale, softcap, class_bias and class_margin applied). Rows that
    ``ignore_index`` names hold zeros and False.
    """

    lse: Tensor
    """Log-sum-exp over the classes."""
    log_prob: Tensor
    """Log-probability of the target."""
    complement_entropy: Tensor
    """Entropy of the softmax over the classes other than the target, in nats."""
    correct: Tensor
    """bool: the target's logit is above all others."""


def _row_stats(stats: Tensor, rows: arguments.Rows, ignore_index: int) -> RowStats:
    nll, _, lse, entropy = reference.posterior(stats)
    ignored = rows.target == ignore_index
    values = [x.masked_fill(ignored, 0.0) for x in (lse, -nll, entropy)]
    correct = (stats[:, 3] > stats[:, 0]) & ~ignored
    return RowStats(*(x.reshape(rows.shape) for x in (*values, correct)))


def _denominator(
    normalizer: str | float | Tensor | None, rows: arguments.Rows, weight: Tensor | None, ignore_index: int
) -> Tensor:
    if isinstance(normalizer, Tensor):
        return normalizer.to(rows.logits.device)
    if normalizer is not None and not isinstance(normalizer, str):
        return torch.full((), float(normalizer), dtype=torch.float64, device=rows.logits.device)
    counted = ops.mean_denominator(
        rows.target, weight if normalizer is None else None, ignore_index, rows.logits.shape[1]
    )
    return counted if normalizer is None else counted.clamp(min=1)


def softmax_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float = 0.0,
    *,
    focal_gamma: float = 0.0,
    complement_gamma: float = 0.0,
    balanced: bool = True,
    cross_entropy_coefficient: float = 1.0,
    class_bias: Tensor | None = None,
    class_margin: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: str | float | Tensor | None = None,
    gradient: str = "backward",
    return_stats: bool = False,
) -> Any:
    """The whole family for integer targets. ``balanced`` divides complement_gamma by C - 1."""
    rows = arguments.rows(input, target)
    num_classes, dtype = rows.logits.shape[1], reference.accumulate_dtype(input)
    per_class = torch.Size((num_classes,))
    weight = arguments.vector("weight", weight, per_class, input, dtype)
    complement = complement_gamma / max(num_classes - 1, 1) if balanced else complement_gamma
    denominator = None
    if reduction == "mean":
        denominator = _denominator(normalizer, rows, weight, ignore_index).to(dtype)
    operator_options = (
        weight,
        arguments.vector("class_bias", class_bias, per_class, input, dtype),
        arguments.vector("class_margin", class_margin, per_class, input, dtype),
        arguments.vector("sample_weight", sample_weight, target.shape, input, dtype),
        ignore_index,
        label_smoothing,
        focal_gamma,
        complement,
        cross_entropy_coefficient,
        scale,
        softcap or 0.0,
        z_loss,
    )
    wants_grad = torch.is_grad_enabled() and rows.logits.requires_grad
    if not wants_grad:
        gradient = "backward"  # nothing may be computed for a gradient, or overwritten by one
    if wants_grad or not torch.compiler.is_compiling():
        inputs = (rows.logits, rows.target, denominator, reduction, gradient, *operator_options)
        loss, stats, *_ = SoftmaxLoss.apply(*inputs)
    else:  # torch.compile passes a context to the Function's forward where nothing requires grad
        loss, stats = ops.softmax_loss(rows.logits, rows.target, *operator_options)
        loss = reduce_loss(loss, denominator, reduction)
    if reduction == "none":
        loss = loss.reshape(rows.shape)
    return (loss, _row_stats(stats, rows, ignore_index)) if return_stats else loss


def probability_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    *,
    class_bias: Tensor | None,
    sample_weight: Tensor | None,
    normalizer: str | float | Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Class-probability targets, by torch's own function over the effective logits (about 20 passes)."""
    dtype = reference.accumulate_dtype(input)
    dim = 0 if input.dim() == 1 else 1
    column = [1] * input.dim()
    column[dim] = -1
    per_class = input.shape[dim : dim + 1]
    bias = arguments.vector("class_bias", class_bias, per_class, input, dtype)
    row_shape = input.shape[:dim] + input.shape[dim + 1 :]
    v = arguments.vector("sample_weight", sample_weight, row_shape, input, dtype)
    u = reference.capped_logits(input.to(dtype), options["scale"], options["softcap"] or 0.0)
    if bias is not None:
        u = u + bias.view(column)
    if weight is not None:
        weight = weight.to(dtype)
    loss = F.cross_entropy(u, target.to(dtype), weight, None, ignore_index, None, "none", options["label_smoothing"])
    if v is not None:
        loss = loss * v.view(row_shape)
    if options["z_loss"]:
        loss = loss + options["z_loss"] * u.logsumexp(dim).square()
    if reduction != "mean":
        return loss.sum() if reduction == "sum" else loss
    if normalizer is None or isinstance(normalizer, str):
        count = loss.numel()
        return loss.sum() / (count if normalizer is None else max(count, 1))
    return loss.sum() / normalizer
