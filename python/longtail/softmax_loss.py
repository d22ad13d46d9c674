"""From checked arguments to the operators: rows, denominators and row statistics of the softmax family."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments, ops, reference
from .autograd import SoftmaxLoss, differentiable_reduction
from .errors import ArgumentValueError
from .fallback import finish_options
from .kept_gradient import Size, check_overwritable, function_shares, softmax_size


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


def row_stats(stats: Tensor, target: Tensor, ignore_index: int, shape: torch.Size) -> RowStats:
    """What the operators' statistics [N, 5] say of rows with targets [N], each entry of ``shape``."""
    nll, _, lse, entropy = reference.posterior(stats)
    ignored = target == ignore_index
    values = [x.masked_fill(ignored, 0.0) for x in (lse, -nll, entropy)]
    correct = (stats[:, 3] > stats[:, 0]) & ~ignored
    return RowStats(*(x.reshape(shape) for x in (*values, correct)))


def mean_denominator(
    normalizer: str | float | Tensor | None, target: Tensor, weight: Tensor | None, ignore_index: int, num_classes: int
) -> Tensor:
    """What a mean over rows with targets [N] divides by, 0-d."""
    given = arguments.given_normalizer(normalizer, target.device)
    if given is not None:
        return given
    counted = ops.mean_denominator(target, weight if normalizer is None else None, ignore_index, num_classes)
    return counted if normalizer is None else counted.clamp(min=1)


def operator_options(
    input: Tensor,
    target: Tensor,
    num_classes: int,
    dtype: torch.dtype,
    *,
    weight: Tensor | None,
    class_bias: Tensor | None,
    class_margin: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    focal_gamma: float,
    complement_gamma: float,
    balanced: bool = True,
    cross_entropy_coefficient: float = 1.0,
    scale: float,
    softcap: float | None,
    z_loss: float,
) -> tuple[Any, ...]:
    """The operators' trailing arguments in schema order, vectors checked; ``dtype``: that of the arithmetic."""
    per_class = torch.Size((num_classes,))
    return (
        arguments.vector("weight", weight, per_class, input, dtype),
        arguments.vector("class_bias", class_bias, per_class, input, dtype),
        arguments.vector("class_margin", class_margin, per_class, input, dtype),
        arguments.vector("sample_weight", sample_weight, target.shape, input, dtype),
        ignore_index,
        label_smoothing,
        focal_gamma,
        complement_gamma / max(num_classes - 1, 1) if balanced else complement_gamma,
        cross_entropy_coefficient,
        scale,
        softcap or 0.0,
        z_loss,
    )


def kept_size(target: Tensor, num_classes: int, dtype: torch.dtype, options: tuple[Any, ...]) -> Size | None:
    """:func:`longtail.kept_gradient.softmax_size` for the operators' ``options``; None but for float16 logits."""
    if dtype != torch.float16:
        return None
    weight, _, _, sample_weight, ignore_index = options[:5]
    scale, softcap, z_loss = options[9:]
    coefficients: Any = (*options[5:9], z_loss)
    g = target.clamp(0, max(num_classes - 1, 0))
    finish = finish_options(g, num_classes, weight if num_classes else None, sample_weight, *coefficients)
    return softmax_size(target != ignore_index, finish, scale, softcap)


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
    options = operator_options(
        *(input, target, num_classes, dtype),
        weight=weight,
        class_bias=class_bias,
        class_margin=class_margin,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        focal_gamma=focal_gamma,
        complement_gamma=complement_gamma,
        balanced=balanced,
        cross_entropy_coefficient=cross_entropy_coefficient,
        scale=scale,
        softcap=softcap,
        z_loss=z_loss,
    )
    denominator = None
    if reduction == "mean":
        denominator = mean_denominator(normalizer, rows.target, options[0], ignore_index, num_classes).to(dtype)
    check_overwritable(input, gradient)
    wants_grad = torch.is_grad_enabled() and rows.logits.requires_grad
    if torch.compiler.is_exporting() or (torch.compiler.is_compiling() and not wants_grad):
        # The operator alone: it differentiates in an exported graph, and torch.compile passes a context to the
        # Function's forward where nothing requires grad.
        loss, stats = ops.softmax_loss(rows.logits, rows.target, *options)
        loss = differentiable_reduction(loss, denominator, reduction)
    else:
        mode = gradient if wants_grad else "backward"  # nothing may be computed for a gradient, or overwritten by one
        keeps, counted = mode != "backward", weight is None and normalizer is None
        size = kept_size(rows.target, num_classes, input.dtype, options) if keeps else None
        factor, divisor = function_shares(denominator, counted, keeps, size, dtype, input.device)
        inputs = (rows.logits, rows.target, denominator, divisor, factor, *options[:4])
        loss, stats, *_ = SoftmaxLoss.apply(*inputs, (reduction, mode, *options[4:]))
    if reduction == "none":
        loss = loss.reshape(rows.shape)
    return (loss, row_stats(stats, rows.target, ignore_index, rows.shape)) if return_stats else loss


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
    """Class-probability targets in plain PyTorch, over the effective logits (about 20 passes).

    :func:`torch.nn.functional.cross_entropy`, but for a class of probability 0 at a logit of -inf: torch gives NaN.
    """
    if ignore_index >= 0:
        raise ArgumentValueError(f"ignore_index is {ignore_index}, expected none: target holds class probabilities")
    arguments.check_device("target", target, input)
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
    y, smoothing = target.to(dtype), options["label_smoothing"]
    if smoothing:
        y = y * (1 - smoothing) + smoothing / max(per_class.numel(), 1)
    log_prob = F.log_softmax(u, dim)
    absent = (y == 0) & (log_prob == -torch.inf)  # of the others the gradient by y is needed too
    terms = log_prob.masked_fill(absent, 0.0) * y
    if weight is not None:  # here, as in torch, the loss is differentiable in it
        arguments.check_tensors(weight=weight)
        if weight.shape != per_class:
            raise ArgumentValueError(f"weight has shape {list(weight.shape)}, expected {list(per_class)}")
        arguments.check_device("weight", weight, input)
        terms = (terms * weight.to(dtype).view(column)).masked_fill(absent, 0.0)
    loss = -terms.sum(dim)
    if v is not None:
        loss = loss * v.view(row_shape)
    if options["z_loss"]:
        loss = loss + options["z_loss"] * u.logsumexp(dim).square()
    if reduction != "mean":
        return loss.sum() if reduction == "sum" else loss
    given = arguments.given_normalizer(normalizer, input.device)
    if given is not None:
        return differentiable_reduction(loss, given.to(dtype), reduction)
    count = loss.numel() if input.numel() else 0  # without classes too: torch's mean is NaN then
    return loss.sum() / (count if normalizer is None else max(count, 1))
