"""Losses written of row statistics, and weights of rows: three passes over the logits, whatever the formula is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import arguments
from ..arguments import arithmetic_dtype, check_choice, check_integer, check_number
from ..errors import ArgumentTypeError
from ..ops.gradient import differentiable_reduction
from ..options import Request, SoftmaxOptions
from ..reference.row_statistics import RowStatistics
from .loss import mean_denominator
from .statistics import GRADIENTS, row_statistics

WEIGHTINGS = ("dft", "eaft", "mile")


def row_loss(
    input: Tensor,
    target: Tensor,
    formula: Callable[[RowStatistics], Tensor],
    options: SoftmaxOptions,
    temperature: float,
    request: Request,
) -> Tensor:
    """``formula`` of each row's statistics times weight and sample_weight, reduced as :func:`longtail.cross_entropy`.

    Args:
        input, target: as :func:`check` takes them.
        formula: gives a loss for each row, of the shape of the statistics.
        options: as users give them.
    """
    dtype = arithmetic_dtype(input.dtype)
    check_choice("gradient", request.gradient, GRADIENTS)
    request.check(dtype)
    target = arguments.class_indices(target, input)
    of_logits = options._replace(weight=None, sample_weight=None)
    found = row_statistics(input, target, of_logits, temperature, request.gradient)
    num_classes = input.shape[min(input.dim() - 1, 1)]
    options = options.with_vectors(input, target.shape, num_classes, dtype)
    counted = target != options.ignore_index
    loss = formula(found)
    if options.weight is not None and num_classes:
        loss = loss * options.weight[target.where(counted, 0)]
    if options.sample_weight is not None:
        loss = loss * options.sample_weight.reshape(target.shape)
    loss = loss.where(counted, 0.0)
    denominator = None
    if request.reduction == "mean":
        denominator = mean_denominator(request.normalizer, target.reshape(-1), options, num_classes, dtype)
    return differentiable_reduction(loss, denominator, request.reduction)


def check(input: Tensor, target: Tensor) -> torch.dtype:
    """That both are tensors a loss of rows takes; the dtype of its arithmetic."""
    for name, x in (("input", input), ("target", target)):
        if arguments.is_dtensor(x):
            raise ArgumentTypeError(f"{name} is a DTensor, expected a plain tensor")
    arguments.check_tensors(input=input, target=target)
    arguments.check_logits(input)
    return arithmetic_dtype(input.dtype)


def poly(epsilon: float) -> Callable[[RowStatistics], Tensor]:
    """``-log p_g + epsilon (1 - p_g)``"""
    return lambda rows: epsilon * _one_minus_exp(rows.log_prob) - rows.log_prob


def generalized(q: float) -> Callable[[RowStatistics], Tensor]:
    """``(1 - p_g^q) / q``, and its limit at 0."""
    if q == 0:
        return lambda rows: -rows.log_prob
    return lambda rows: _one_minus_exp(q * rows.log_prob) / q


def _one_minus_exp(x: Tensor) -> Tensor:
    """Near 0 by expm1, elsewhere by exp: torch takes the derivative of expm1 from its result, where -1 swallows it."""
    return torch.where(x > -0.5, -torch.expm1(x), 1 - torch.exp(x))


def token_weighting(
    statistics: RowStatistics,
    kind: str,
    num_classes: int,
    alpha: float,
    gamma: float,
    sigma: float,
    normalize: bool | None,
) -> Tensor:
    """See :func:`longtail.token_weighting`."""
    check_choice("kind", kind, WEIGHTINGS)
    if not isinstance(statistics, RowStatistics):
        raise TypeError(f"statistics is a {type(statistics).__name__}, expected a RowStatistics")
    if normalize is None:
        normalize = kind == "mile"
    elif not isinstance(normalize, bool):
        raise TypeError(f"normalize is a {type(normalize).__name__}, expected a bool or None")
    log_prob, log_miss, entropy = (x.detach() for x in (statistics.log_prob, statistics.log_miss, statistics.entropy))
    dtype = log_prob.dtype
    if kind == "dft":
        weight = log_prob.exp()
    elif kind == "eaft":
        check_integer("num_classes", num_classes, 2)
        weight = (entropy / math.log(num_classes)).clamp(0.0, 1.0) ** check_number("alpha", alpha, 0.0, dtype=dtype)
    else:
        sigma, gamma = check_number("sigma", sigma, 0.0, dtype=dtype), check_number("gamma", gamma, 0.0, dtype=dtype)
        weight = (sigma + entropy.clamp(min=0.0)) ** gamma
    counted = (log_prob != 0) | (log_miss != 0)  # p_g is not 1 and 0 at once, but where a row is ignored
    weight = weight.where(counted, 0.0)
    if not normalize:
        return weight
    total = weight.sum()
    return weight * (counted.sum() / total.masked_fill(total == 0, 1.0))
