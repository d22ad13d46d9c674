"""From options to the operators: rows, denominators and row statistics of the softmax family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..arguments import arithmetic_dtype
from ..errors import ArgumentTypeError, ArgumentValueError
from ..ops import layout, operators
from ..ops.autograd import differentiable_loss, direct_loss
from ..ops.gradient import differentiable_reduction
from ..options import SOFTMAX_NUMBERS, HierarchicalOptions, Request, SoftmaxOptions
from ..reference import softmax
from ..reference.sizes import Size
from ..reference.softmax_dense import DenseRows
from .autograd import SOFTMAX, SoftmaxLoss
from .statistics import record


def mean_denominator(
    normalizer: str | float | Tensor | None,
    target: Tensor,
    options: SoftmaxOptions | HierarchicalOptions,
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


def _check_probabilities(input: Tensor, target: Tensor, options: SoftmaxOptions, request: Request) -> None:
    if not target.is_floating_point():
        raise ArgumentTypeError(
            f"target has the input's shape and dtype {target.dtype}, expected floating point class probabilities"
        )
    needs_class = [
        SOFTMAX_NUMBERS[field].name if field in SOFTMAX_NUMBERS else field for field in options.of_one_class()
    ]
    needs_class += ["return_stats"] * request.return_stats + ["gradient"] * (request.gradient != "backward")
    if needs_class:
        raise ValueError(f"{needs_class[0]} needs integer targets, got class probabilities")
    if options.ignore_index >= 0:
        raise ArgumentValueError(
            f"ignore_index is {options.ignore_index}, expected none: target holds class probabilities"
        )
    arguments.check_device("target", target, input)


def _probability_cross_entropy(input: Tensor, target: Tensor, options: SoftmaxOptions, request: Request) -> Tensor:
    """Class probabilities; images become rows.

    :func:`torch.nn.functional.cross_entropy`, but for a class of probability 0 at a logit of -inf: torch gives NaN.
    """
    _check_probabilities(input, target, options, request)
    rows, dtype, weight = layout.probability_rows(input, target), arithmetic_dtype(input.dtype), options.weight
    num_classes, reduction = rows.logits.shape[1], request.reduction
    by_weight = isinstance(weight, Tensor) and weight.requires_grad and torch.is_grad_enabled()
    if by_weight:  # checked without, see below
        options = options._replace(weight=weight.detach())  # type: ignore[union-attr]
    options = options.prepared(input, rows.shape, num_classes, dtype)
    plain = by_weight or num_classes == 0 or (target.requires_grad and torch.is_grad_enabled())
    if reduction == "mean" and not plain and _at_once(rows, options, request):
        counts = (request.normalizer == "count",)
        return direct_loss(SOFTMAX, (rows.logits, rows.target), options, "mean", None, None, counts)
    denominator = _probability_denominator(rows, request, dtype) if reduction == "mean" else None
    if plain:  # in targets and weights, too, as torch's is
        weight = weight.to(dtype) if by_weight else options.weight  # type: ignore[union-attr]
        loss = DenseRows.of(rows.logits, rows.target, options._replace(weight=weight)).losses()
        loss = differentiable_reduction(loss, denominator, reduction)
    else:
        loss, _ = differentiable_loss(
            *(SoftmaxLoss, SOFTMAX, input, (rows.logits, rows.target), options, reduction, "backward"),
            denominator=denominator,
            counts=denominator is not None and not denominator.is_floating_point(),
            size=lambda: 1.0,  # of a gradient that forward would keep
        )
    return loss.reshape(rows.shape) if reduction == "none" else loss


def _probability_denominator(rows: layout.Rows, request: Request, dtype: torch.dtype) -> Tensor:
    """As :func:`mean_denominator`, of rows that all count, whatever they weigh; without classes none does."""
    given = arguments.given_normalizer(request.normalizer, rows.logits.device, dtype)
    if given is not None:
        return given.to(dtype)
    count = rows.logits.shape[0] if rows.logits.shape[1] else 0
    count = count if request.normalizer is None else max(count, 1)
    return torch.full((), count, dtype=torch.int64, device=rows.logits.device)
