"""The sigmoid family in plain PyTorch: the truth that its kernels are tested against, and the fallback backend.

Element by element, with logit z + class_bias = u, target y, p = sigmoid(u); x_t = u and p_t = p for y = 1, x_t = -u and
p_t = 1 - p for y = 0:

    loss = w alpha_t (1 - p_t)^gamma softplus(-x_t)
    dloss/dx_t = -w alpha_t (1 - p_t)^gamma (gamma p_t softplus(-x_t) + 1 - p_t)

Negatives may have an exponent of their own, a scale lambda (u becomes lambda u, and the loss is divided by lambda), and
a shift m of their probability (``clip``): p becomes max(p - m, 0). Soft targets as torchvision reads them: ``y
softplus(-u) + (1 - y) softplus(u)`` in place of the softplus, ``1 - p_t = y (1 - p) + (1 - y) p``, and likewise
alpha_t and the exponent. Differentiable, twice, and exact in float64.
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


class Negatives(NamedTuple):
    """What negatives have of their own: exponent (None: that of positives), probability shift and scale."""

    gamma: float | None = None
    clip: float = 0.0
    scale: float = 1.0


def _shifted(x: Logistic, clip: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of negatives: max(p - clip, 0), its slope, -log(1 - it), and the slope of that."""
    if not clip:
        return x.p, x.p * x.q, x.plus, x.p
    over = x.p - clip
    dead = over <= 0  # not of NaN
    miss = over.masked_fill(dead, 0.0)
    hit = (x.q + clip).masked_fill(dead, 1.0)
    near = miss < 0.5
    cost = torch.where(near, -torch.log1p(-torch.where(near, miss, 0.0)), -torch.where(near, 1.0, hit).log())
    slope = (x.p * x.q).masked_fill(dead, 0.0)
    return miss, slope, cost, slope / hit


def elements(
    z: Tensor,
    y: Tensor,
    factor: Tensor | float = 1.0,
    pos_weight: Tensor | float = 1.0,
    alpha: Tensor | float | None = None,
    gamma: Tensor | float = 0.0,
    negatives: Negatives | None = None,
    detach: bool = False,
) -> Element:
    """Losses and slopes of logits z and targets y of one shape; everything else broadcasts."""
    own = Negatives() if negatives is None else negatives
    x, rest = logistic(z), 1 - y
    n = x if own.scale == 1 else logistic(own.scale * z)
    miss_n, miss_slope_n, cost_n, cost_slope_n = _shifted(n, own.clip)
    factor = factor if alpha is None else factor * (alpha * y + (1 - alpha) * rest)
    # A weight of positives says nothing of negatives, even if it is infinite.
    cost = torch.where(y == 0, 0.0, pos_weight * _product(y, x.minus)) + _product(rest, cost_n) / own.scale
    slope = _product(rest, cost_slope_n) - torch.where(y == 0, 0.0, pos_weight * y * x.q)
    # y may be a rounding outside of [0, 1]: an exponent below 0 would make inf of a focal factor of 0.
    exponent = gamma if own.gamma is None else (gamma * y + own.gamma * rest).clamp(min=0.0)
    if not isinstance(exponent, Tensor) and not exponent:
        return Element(factor * cost, factor * slope)
    soft = (y != 0) & (y != 1)
    miss = y * x.q + rest * miss_n
    hit = miss <= 0
    safe_miss = torch.where(hit, 1.0, miss)
    log_n = torch.where(hit, -torch.inf, safe_miss.log()) if own.clip else -n.minus
    log_soft = torch.where(hit, -torch.inf, torch.where(soft, safe_miss, 1.0).log())
    log_miss = torch.where(y == 1, -x.plus, torch.where(y == 0, log_n, log_soft))
    focal = _product(torch.as_tensor(exponent, dtype=z.dtype, device=z.device), log_miss).exp()
    if detach:
        focal = focal.detach()
        return Element(factor * focal * cost, factor * focal * slope)
    quotient_n = own.scale * (torch.where(hit, 0.0, miss_slope_n / safe_miss) if own.clip else n.q)
    quotient = (rest * own.scale * miss_slope_n - y * x.p * x.q) / safe_miss
    log_slope = torch.where(y == 1, -x.p, torch.where(y == 0, quotient_n, quotient))
    slope = slope + exponent * _product(log_slope, cost)
    return Element(factor * focal * cost, factor * focal * slope)


def rebalanced(y: Tensor, options: SigmoidOptions) -> Tensor:
    """The weight of each element of targets y [N, C] in the distribution-balanced loss."""
    assert options.inverse_counts is not None
    if not options.rebalance_beta:  # the ratio of a row without labels is infinite
        return torch.full_like(y, options.rebalance_alpha + 0.5)
    rarity = options.inverse_counts.to(y.dtype)
    ratio = rarity / (y * rarity).sum(1, keepdim=True)
    return options.rebalance_alpha + torch.sigmoid(options.rebalance_beta * (ratio - options.rebalance_mu))


def one_hot(target: Tensor, logits: Tensor) -> Tensor:
    """1 in the column of each row's class, else 0: [N, C] in the logits' dtype. Ignored rows need a class in range."""
    return torch.zeros_like(logits).scatter_(1, target[:, None], 1.0)


def option_elements(logits: Tensor, target: Tensor, options: SigmoidOptions) -> Element:
    """:func:`sigmoid_elements` for options as the operators take them."""
    o, dtype, ignore_index = options, arithmetic_dtype(logits.dtype), options.ignore_index
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    one_class = not target.is_floating_point()
    everywhere = ignored[:, None] if one_class else ignored
    z = logits.to(dtype).masked_fill(everywhere, 0.0)
    safe = target.masked_fill(ignored, 0)
    if logits.numel() == 0:
        return Element(z, z)
    y = one_hot(safe, z) if one_class else safe.to(dtype)
    factor = z.new_ones(()) if o.sample_weight is None else o.sample_weight.to(dtype)[:, None]
    if o.weight is not None:
        factor = factor * (o.weight[safe][:, None] if o.class_weight_by_target else o.weight).to(dtype)
    if o.inverse_counts is not None:
        factor = factor * rebalanced(y, o)
    if o.class_bias is not None:
        z = (z + o.class_bias.to(dtype)).masked_fill(everywhere, 0.0)
    if o.label_smoothing:
        y = y + o.label_smoothing * (0.5 - y)
    found = elements(
        *(z, y, factor, 1.0 if o.pos_weight is None else o.pos_weight.to(dtype)),
        o.alpha if o.class_alpha is None else o.class_alpha.to(dtype),
        o.gamma if o.class_gamma is None else o.class_gamma.to(dtype),
        Negatives(o.gamma_negative, o.clip, o.negative_scale),
        o.detach,
    )
    return Element(*(x.masked_fill(everywhere, 0.0) for x in found))


@with_options_of(SigmoidOptions)
def sigmoid_elements(logits: Tensor, target: Tensor, **options: Any) -> Element:
    """Losses and slopes [N, C], 0 where ignored, for logits [N, C] and target [N] (classes) or [N, C] (float).

    weight, pos_weight: [C]; sample_weight: [N]; class_weight_by_target: the weight of a row's target class multiplies
    the whole row. ignore_index: rows, or elements, with this target do not count. The rest as in
    :func:`longtail.sigmoid_focal_loss`, but off by default; alpha and gamma of each class are ``class_alpha`` and
    ``class_gamma``. inverse_counts [C], up to a factor, and rebalance_*: what elements are weighted by in
    :func:`longtail.distribution_balanced_loss`. Arithmetic is float64 for float64 logits, else float32.
    """
    refuse_unknown(sigmoid_elements, options)
    return option_elements(logits, target, SigmoidOptions(**options))


def gradient_size(target: Tensor, num_classes: int, options: SigmoidOptions) -> Size:
    """A bound of the elements of the gradient of the losses' sum, of float16 logits."""
    weight, pos_weight, sample_weight, by_target = *options[:3], options.class_weight_by_target
    ignore_index, scale = options.ignore_index, options.negative_scale
    size: Size = (1 + max(options.gamma, options.gamma_negative or 0.0)) * max(scale, 1 / scale)
    if options.class_gamma is not None and options.class_gamma.numel() > 0:
        size = size + options.class_gamma.amax()
    if options.inverse_counts is not None:
        size = size * (1 + options.rebalance_alpha)
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
