"""The mathematics of one element with every option of the sigmoid family, under the names of csrc/sigmoid_general.h.

u: logit with class_bias; y: target; p = sigmoid(u). FOCUS says how the focal factor is computed: "none" (both exponents
are 0), "whole" (both are whole numbers below 8, of hard targets) or "power" (any other). o: Options of
sigmoid_elements, None where an option is off. Everything is float32.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loss_math import LOG2_E, maximum
from .sigmoid_math import Element, logistic, product

SMALLEST = tl.constexpr(2.0**-126)  # Triton takes what is below it for float64


class Shifted(NamedTuple):
    """Of negatives whose probability p is shifted."""

    miss: Any  # max(p - clip, 0)
    hit: Any  # 1 - miss
    cost: Any  # -log(hit)
    slope: Any  # d miss / d logit, NaN where miss is


@triton.jit
def whole_power(x, gamma):
    """x^gamma for whole numbers below 8."""
    bits = gamma.to(tl.int32)
    square = x * x
    found = tl.where(bits & 1 == 0, 1.0, x)
    found = tl.where(bits & 2 == 0, found, found * square)
    return tl.where(bits & 4 == 0, found, found * (square * square))


@triton.jit
def power_of(log_x, gamma):
    """x^gamma from log(x), of which 0^0 is 1."""
    return tl.exp2(tl.where(gamma == 0.0, 0.0, gamma * log_x * LOG2_E))


@triton.jit
def log_cut(x):
    """log(x) for 0 <= x <= 1: finite and very low for what is no normal number."""
    return tl.log(maximum(x, SMALLEST))


@triton.jit
def minus_log1m(miss, hit):
    """-log(1 - miss); hit is 1 - miss rounded by e, which is made up for: -log(hit + e) = -log(hit) - e / hit."""
    return -(tl.log(hit) + (1.0 - hit - miss))


@triton.jit
def shifted(x, clip):
    miss, hit, cost, slope = x.p, x.q, x.plus, x.p * x.q
    if clip is not None:
        over = x.p - clip
        live = over > 0.0
        miss = maximum(over, 0.0)  # NaN stays NaN
        hit = tl.where(live, x.q + clip, 1.0)
        cost = minus_log1m(miss, hit)
        slope = tl.where(live, slope, miss)
    return Shifted(miss, hit, cost, slope)


@triton.jit
def general_hard(u, one, gamma_positive, gamma_negative, o, FOCUS: tl.constexpr):
    """For y in {0, 1}: the loss and its derivative by u."""
    x = u if o.scale is None else o.scale * u
    s = logistic(tl.where(one, -u, x))  # of what the loss rises with
    n = shifted(s, None if o.clip is None else tl.where(one, 0.0, o.clip))
    cost, slope, log_miss = s.plus, s.p, -s.minus
    rise = product(s.q, s.plus)  # d log(miss) times the cost: tends to 0 with q, also where the cost is infinite
    if o.clip is not None:
        cost = tl.where(one, cost, n.cost)
        slope = tl.where(one, slope, n.slope / n.hit)
        rise = product(n.slope, cost) / tl.where(n.miss == 0.0, 1.0, n.miss)
        log_miss = log_cut(n.miss)
    if FOCUS != "none":
        gamma = tl.where(one, gamma_positive, gamma_negative)
        focal = whole_power(n.miss, gamma) if FOCUS == "whole" else power_of(log_miss, gamma)
        if o.detach is None:
            slope += gamma * rise
        cost *= focal
        slope *= focal
    if o.scale is not None:
        cost = tl.where(one, cost, cost * o.inverse_scale)
    return Element(cost, tl.where(one, -slope, slope))


@triton.jit
def general_soft(u, y, positive, gamma_positive, gamma_negative, o, FOCUS: tl.constexpr):
    """For 0 <= y <= 1, with 1 - p_t read as y (1 - p) + (1 - y) p, and so the exponent; the derivative is by u.

    positive: what multiplies the positive term (pos_weight).
    """
    rest, weighted = 1.0 - y, positive * y
    x = logistic(u)
    n = shifted(x if o.scale is None else logistic(o.scale * u), o.clip)
    fall = n.miss if o.clip is None else n.slope / n.hit
    negative = product(rest, n.cost)
    miss_slope = rest * n.slope
    if o.scale is not None:
        negative *= o.inverse_scale
        miss_slope *= o.scale
    cost = product(weighted, x.minus) + negative
    slope = rest * fall - weighted * x.q
    if FOCUS != "none":
        gamma = maximum(gamma_positive * y + gamma_negative * rest, 0.0)  # y may be a rounding outside of [0, 1]
        miss = y * x.q + rest * n.miss
        miss = tl.where(miss < 0.0, 0.0, miss)
        if o.detach is None:
            # Tends to 0 with p or 1 - p, also times a cost that is infinite.
            rise = product(miss_slope - y * (x.p * x.q), cost)
            slope += gamma * rise / tl.where(miss == 0.0, 1.0, miss)
        focal = power_of(log_cut(miss), gamma)
        cost *= focal
        slope *= focal
    return Element(cost, slope)


@triton.jit
def rebalanced(inverse_count, rarity, o):
    """The weight of an element in the distribution-balanced loss.

    rarity: rebalance_beta over the sum of the inverse counts of the row's labels, infinite where there are none.
    """
    x = inverse_count * rarity - o.rebalance_shift
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    nearer = 1.0 / (1.0 + e)
    return o.rebalance_alpha + tl.where(x > 0.0, nearer, e * nearer)
