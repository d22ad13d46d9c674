"""The sigmoid family in plain PyTorch: the truth that its kernels are tested against, and the fallback backend.

Element by element, with logit z, target y, p = sigmoid(z); x_t = z and p_t = p for y = 1, x_t = -z and p_t = 1 - p for
y = 0:

    loss = w alpha_t (1 - p_t)^gamma softplus(-x_t)
    dloss/dx_t = -w alpha_t (1 - p_t)^gamma (gamma p_t softplus(-x_t) + 1 - p_t)

Soft targets as torchvision reads them: ``y softplus(-z) + (1 - y) softplus(z)`` in place of the softplus,
``1 - p_t = y (1 - p) + (1 - y) p`` and ``alpha_t = y alpha + (1 - y) (1 - alpha)``. Differentiable, twice, and exact in
float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..options import SigmoidOptions
from ..signatures import refuse_unknown, with_options_of
from .sizes import Size, largest


class Logistic(NamedTuple):
    """``sigmoid(z)``, ``sigmoid(-z)``, ``softplus(z)``, ``softplus(-z)``: none is one minus another."""

    p: Tensor
    q: Tensor
    plus: Tensor
    minus: Tensor


class Element(NamedTuple):
    """The loss of each element, and its derivative by the logit."""

    loss: Tensor
    slope: Tensor


def logistic(z: Tensor) -> Logistic:
    # softplus by logsigmoid: F.softplus turns linear at 20 and loses digits there.
    return Logistic(torch.sigmoid(z), torch.sigmoid(-z), -F.logsigmoid(-z), -F.logsigmoid(z))


def _product(factor: Tensor, x: Tensor) -> Tensor:
    """``factor * x`` where 0 * inf is 0."""
    return torch.where(factor == 0, 0.0, factor * torch.where(factor == 0, 0.0, x))


def elements(
    z: Tensor,
    y: Tensor,
    factor: Tensor | float = 1.0,
    pos_weight: Tensor | float = 1.0,
    alpha: float | None = None,
    gamma: float = 0.0,
) -> Element:
    """Losses and slopes of logits z and targets y of one shape; ``factor`` and ``pos_weight`` broadcast."""
    x, rest = logistic(z), 1 - y
    factor = factor if alpha is None else factor * (alpha * y + (1 - alpha) * rest)
    # A weight of positives says nothing of negatives, even if it is infinite.
    cost = torch.where(y == 0, 0.0, pos_weight * _product(y, x.minus)) + _product(rest, x.plus)
    slope = rest * x.p - torch.where(y == 0, 0.0, pos_weight * y * x.q)
    if not gamma:
        return Element(factor * cost, factor * slope)
    soft = (y != 0) & (y != 1)
    miss = y * x.q + rest * x.p
    hit = miss <= 0  # y may be a rounding outside of [0, 1]
    safe_miss = torch.where(soft & ~hit, miss, 1.0)
    log_soft = torch.where(hit, -torch.inf, safe_miss.log())
    log_miss = torch.where(y == 1, -x.plus, torch.where(y == 0, -x.minus, log_soft))
    focal = (gamma * log_miss).exp()
    log_miss_slope = torch.where(y == 1, -x.p, torch.where(y == 0, x.q, x.p * x.q * (rest - y) / safe_miss))
    slope = slope + gamma * _product(log_miss_slope, cost)
    return Element(factor * focal * cost, factor * focal * slope)


def one_hot(target: Tensor, logits: Tensor) -> Tensor:
    """1 in the column of each row's class, else 0: [N, C] in the logits' dtype. Ignored rows need a class in range."""
    return torch.zeros_like(logits).scatter_(1, target[:, None], 1.0)


def option_elements(logits: Tensor, target: Tensor, options: SigmoidOptions) -> Element:
    """:func:`sigmoid_elements` for options as the operators take them."""
    weight, pos_weight, sample_weight, by_target, ignore_index, alpha, gamma = options
    dtype = arithmetic_dtype(logits.dtype)
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    one_class = not target.is_floating_point()
    everywhere = ignored[:, None] if one_class else ignored
    z = logits.to(dtype).masked_fill(everywhere, 0.0)
    safe = target.masked_fill(ignored, 0)
    if logits.numel() == 0:
        return Element(z, z)
    y = one_hot(safe, z) if one_class else safe.to(dtype)
    factor = z.new_ones(()) if sample_weight is None else sample_weight.to(dtype)[:, None]
    if weight is not None:
        factor = factor * (weight[safe][:, None] if by_target else weight).to(dtype)
    found = elements(z, y, factor, 1.0 if pos_weight is None else pos_weight.to(dtype), alpha, gamma)
    return Element(*(x.masked_fill(everywhere, 0.0) for x in found))


@with_options_of(SigmoidOptions)
def sigmoid_elements(logits: Tensor, target: Tensor, **options: Any) -> Element:
    """Losses and slopes [N, C], 0 where ignored, for logits [N, C] and target [N] (classes) or [N, C] (float).

    weight, pos_weight: [C]; sample_weight: [N]; class_weight_by_target: the weight of a row's target class multiplies
    the whole row. ignore_index: rows, or elements, with this target do not count. alpha, gamma: as in
    :func:`longtail.sigmoid_focal_loss`, but off by default. Arithmetic is float64 for float64 logits, else float32.
    """
    refuse_unknown(sigmoid_elements, options)
    return option_elements(logits, target, SigmoidOptions(**options))


def gradient_size(target: Tensor, num_classes: int, options: SigmoidOptions) -> Size:
    """A bound of the elements of the gradient of the losses' sum, of float16 logits."""
    weight, pos_weight, sample_weight, by_target, ignore_index, _, gamma = options
    size: Size = 1 + gamma
    if weight is None and pos_weight is None and sample_weight is None:
        return size
    every = torch.ones((), dtype=torch.bool, device=target.device)
    by_target = by_target and num_classes > 0
    if sample_weight is not None or by_target:
        row = every.float() if sample_weight is None else sample_weight.abs()
        if weight is not None and by_target:
            row = row * weight[target.clamp(0, num_classes - 1)].abs()
        counted = every if target.is_floating_point() or ignore_index is None else target != ignore_index
        size = size * largest(row, counted)
    if pos_weight is not None or (weight is not None and not options.class_weight_by_target):
        column = every.float() if weight is None or options.class_weight_by_target else weight.abs()
        size = size * largest(column if pos_weight is None else column * pos_weight.abs().clamp(min=1), every)
    return size


@with_options_of(SigmoidOptions)
def sigmoid_loss(
    logits: Tensor, target: Tensor, *, elementwise: bool = False, **options: Tensor | float | bool | None
) -> Tensor:
    """Row losses [N], summed over the classes, or [N, C] if ``elementwise``; options as :func:`sigmoid_elements`."""
    loss = sigmoid_elements(logits, target, **options).loss
    return loss if elementwise else loss.sum(1)
