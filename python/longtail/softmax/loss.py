"""From options to the operators: rows, denominators and row statistics of the softmax family."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments
from ..arguments import arithmetic_dtype
from ..errors import ArgumentTypeError, ArgumentValueError
from ..ops import layout, operators
from ..ops.autograd import differentiable_loss, direct_loss
from ..ops.gradient import differentiable_reduction
from ..options import SOFTMAX_NUMBERS, Request, SoftmaxOptions
from ..reference import softmax
from ..reference.sizes import Size
from .autograd import SOFTMAX, SoftmaxLoss
from .statistics import record


def mean_denominator(
    normalizer: str | float | Tensor | None,
    target: Tensor,
    options: SoftmaxOptions,
    num_classes: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """What a mean over rows with targets [N] divides by, 0-d; of ``options`` weight and ignore_index.

    A number of rows is int64, a sum of weights of their dtype, and what the caller brings of ``dtype``.
    """
    given = arguments.given_normalizer(normalizer, target.device, dtype)
    if given is not None:
        return given.to(dtype)
    weight = options.weight if normalizer is None else None
    counted = operators.mean_denominator(target, weight, options.ignore_index, num_classes)
    return counted if normalizer is None else counted.clamp(min=1)


def kept_size(target: Tensor, num_classes: int, options: SoftmaxOptions) -> Size:
    """A bound of the gradient's elements over rows with targets [N]; ``options`` as the operators take them."""
    if options.weight is None and options.sample_weight is None:  # no row differs, and nothing is launched
        return softmax.gradient_size(None, softmax.Factors(1.0, 1.0, num_classes, float(num_classes)), options)
    factors = softmax.Factors.of(target.clamp(0, max(num_classes - 1, 0)), num_classes, options)
    return softmax.gradient_size(target != options.ignore_index, factors, options)


def check(input: Tensor, target: Tensor, options: SoftmaxOptions, request: Request) -> SoftmaxOptions:
    """Everything but shapes and vectors; the options with numbers that are floats."""
    arguments.check_tensors(input=input, target=target)
    arguments.check_logits(input)
    dtype = arithmetic_dtype(input.dtype)
    request.check(dtype)
    return options.checked(dtype)


def cross_entropy(input: Tensor, target: Tensor, options: SoftmaxOptions, request: Request) -> Any:
    """The whole family, for class indices and class probabilities; see :func:`longtail.cross_entropy`."""
    options = check(input, target, options, request)
    if input.shape == target.shape and input.dim() > 0:
        return _probability_cross_entropy(input, target, options, request)
    return _softmax_loss(input, target, options, request)


def complement_entropy(input: Tensor, target: Tensor, options: SoftmaxOptions, request: Request, balanced: bool) -> Any:
    """H alone, over C - 1 where ``balanced``; see :func:`longtail.complement_entropy`."""
    options = check(input, target, options, request)
    options = options._replace(complement_coefficient=1.0, cross_entropy_coefficient=0.0)
    return _softmax_loss(input, target, options, request, balanced)


def _softmax_loss(
    input: Tensor, target: Tensor, options: SoftmaxOptions, request: Request, balanced: bool = True
) -> Any:
    rows = layout.rows(input, target)
    num_classes, dtype = rows.logits.shape[1], arithmetic_dtype(input.dtype)
    options = options.prepared(input, target.shape, num_classes, dtype, balanced)
    if request.return_stats:
        options = options._replace(entropy=True)
    denominator = None
    if request.reduction == "mean":
        if _at_once(rows, options, request):
            counts = (request.normalizer == "count",)
            return direct_loss(SOFTMAX, (rows.logits, rows.target), options, "mean", None, None, counts)
        denominator = mean_denominator(request.normalizer, rows.target, options, num_classes, dtype)
    loss, stats = differentiable_loss(
        *(SoftmaxLoss, SOFTMAX, input, (rows.logits, rows.target), options, request.reduction, request.gradient),
        denominator=denominator,
        counts=denominator is not None and not denominator.is_floating_point(),
        size=lambda: kept_size(rows.target, num_classes, options),
        statistics=request.return_stats,
    )
    if request.reduction == "none":
        loss = loss.reshape(rows.shape)
    return (loss, record(stats, rows.target, options.ignore_index, rows.shape)) if request.return_stats else loss


def _at_once(rows: layout.Rows, options: SoftmaxOptions, request: Request) -> bool:
    """Whether one operator makes the whole mean, and its denominator."""
    counts = request.normalizer is None or isinstance(request.normalizer, str)
    plain = counts and request.gradient == "backward" and not request.return_stats
    return plain and operators.direct(rows.logits, rows.target, *options)


def _check_probabilities(target: Tensor, options: SoftmaxOptions, request: Request) -> None:
    if not target.is_floating_point():
        raise ArgumentTypeError(
            f"target has the input's shape and dtype {target.dtype}, expected floating point class probabilities"
        )
    numbers = options.numbers
    needs_class = {n.name: numbers[n.name] != n.off for n in SOFTMAX_NUMBERS.values() if n.needs_class}
    needs_class["class_margin"] = options.class_margin is not None
    needs_class |= {"return_stats": request.return_stats, "gradient": request.gradient != "backward"}
    for name, used in needs_class.items():
        if used:
            raise ValueError(f"{name} needs integer targets, got class probabilities")
    if options.ignore_index >= 0:
        raise ArgumentValueError(
            f"ignore_index is {options.ignore_index}, expected none: target holds class probabilities"
        )


def _probability_cross_entropy(input: Tensor, target: Tensor, options: SoftmaxOptions, request: Request) -> Tensor:
    """Class-probability targets in plain PyTorch, over the effective logits (about 20 passes).

    :func:`torch.nn.functional.cross_entropy`, but for a class of probability 0 at a logit of -inf: torch gives NaN.
    """
    _check_probabilities(target, options, request)
    arguments.check_device("target", target, input)
    dtype, weight = arithmetic_dtype(input.dtype), options.weight
    dim = 0 if input.dim() == 1 else 1
    column = [1] * input.dim()
    column[dim] = -1
    per_class = input.shape[dim : dim + 1]
    bias = arguments.vector("class_bias", options.class_bias, per_class, input, dtype)
    row_shape = input.shape[:dim] + input.shape[dim + 1 :]
    v = arguments.vector("sample_weight", options.sample_weight, row_shape, input, dtype)
    u = softmax.capped_logits(input.to(dtype), options.scale, options.softcap)
    if bias is not None:
        u = u + bias.view(column)
    y, smoothing = target.to(dtype), options.label_smoothing
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
    if options.z_loss:
        loss = loss + options.z_loss * u.logsumexp(dim).square()
    if request.reduction != "mean":
        return loss.sum() if request.reduction == "sum" else loss
    given = arguments.given_normalizer(request.normalizer, input.device)
    if given is not None:
        return differentiable_reduction(loss, given.to(dtype), request.reduction)
    count = loss.numel() if input.numel() else 0  # without classes too: torch's mean is NaN then
    return loss.sum() / (count if request.normalizer is None else max(count, 1))
