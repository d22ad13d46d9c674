"""The mathematics of one row of ZLPR and the two-way loss for Triton kernels, under the names of csrc/two_way_math.h.

A side has the largest exponent m of its classes, u of a negative and -u of a positive, and the sum d of their weights
times exp((exponent - m) / T); its log-sum-exp is l = m + T log d. Everything is float32.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from longtail.options import TwoWayOptions

from .loss_math import exp_cut, log1p, maximum, over_lanes_max, over_lanes_sum


class Temperatures(NamedTuple):
    """Numbers that are read at run time."""

    negative: Any
    positive: Any
    inverse_negative: Any
    inverse_positive: Any


class Side(NamedTuple):
    """What describes a side of a row, or of a lane."""

    m: Any
    d: Any


class RowSides(NamedTuple):
    """Losses, and what multiplies the terms of both sides in the gradient."""

    loss: Any
    negative: Any
    positive: Any


def temperatures(options: TwoWayOptions) -> Temperatures:
    negative, positive = float(options.negative_temperature), float(options.positive_temperature)
    return Temperatures(negative, positive, 1.0 / negative, 1.0 / positive)


@triton.jit
def empty_side(LANES: tl.constexpr):
    zero = tl.zeros([LANES], tl.float32)
    return Side(zero + float("-inf"), zero)


@triton.jit
def finite_exponent(m):
    """m as a number that can be subtracted: an infinite one stands in as 0."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def raise_side(s, m, inverse):
    """Moves d to a new maximum m >= s.m."""
    factor, _ = exp_cut((s.m - m) * inverse)
    return Side(m, tl.where(m > s.m, factor * s.d, s.d))


@triton.jit
def accumulate_side(s, exponent, weight, inverse):
    """Adds exponents [groups, lanes, run], -inf of classes of the other side, to a side [lanes]; weight: None for 1."""
    s = raise_side(s, tl.maximum(s.m, over_lanes_max(exponent)), inverse)
    e, _ = exp_cut((exponent - finite_exponent(s.m)[None, :, None]) * inverse)
    if weight is not None:
        e = weight * e
    return Side(s.m, s.d + over_lanes_sum(e))


@triton.jit
def combine_side(s, inverse, AXIS: tl.constexpr):
    """Joins the pieces of a row that lie along an axis."""
    m = tl.max(s.m, AXIS)
    s = raise_side(s, tl.expand_dims(m, AXIS), inverse)
    return Side(m, tl.sum(s.d, AXIS))


@triton.jit
def join_sides(a, b, inverse):
    m = tl.maximum(a.m, b.m)
    a = raise_side(a, m, inverse)
    b = raise_side(b, m, inverse)
    return Side(m, a.d + b.d)


@triton.jit
def settle_side(s):
    """What an infinite exponent makes of d, whatever was added to it; NaN stays NaN."""
    return Side(s.m, tl.where(s.m == float("inf"), s.d + float("inf"), s.d))


@triton.jit
def softplus(x):
    """softplus(x), and its derivative."""
    e, _ = exp_cut(-tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    return maximum(x, 0.0) + log1p(e), tl.where(x > 0.0, inverse, e * inverse)


@triton.jit
def finish_sides(n, p, t, v, JOINT: tl.constexpr):
    """v: the sample weight."""
    no_n, no_p = n.d == 0.0, p.d == 0.0
    log_n = t.negative * tl.log(tl.where(no_n, 1.0, n.d))
    log_p = t.positive * tl.log(tl.where(no_p, 1.0, p.d))
    none = float("-inf")
    if JOINT:
        total = n.d + p.d
        poison = tl.where(total == total, 0.0, total)  # of one side, where the other is empty
        value, slope = softplus(tl.where(no_n | no_p, none, (n.m + p.m) + (log_n + log_p)))
        loss, slope_n, slope_p = value + poison, slope + poison, slope + poison
    else:
        of_n, slope_n = softplus(tl.where(no_n, none, n.m + log_n))
        of_p, slope_p = softplus(tl.where(no_p, none, p.m + log_p))
        loss = of_n + of_p
    return RowSides(v * loss, tl.where(no_n, 0.0, v * slope_n / n.d), tl.where(no_p, 0.0, v * slope_p / p.d))
