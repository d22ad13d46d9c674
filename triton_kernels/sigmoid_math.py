"""The mathematics of one element of the sigmoid family for Triton kernels, under the names of csrc/sigmoid_math.h.

z: logit; y: target; p = sigmoid(z), p_t = p for y = 1 and 1 - p for y = 0. FOCUS says how (1 - p_t)^gamma is computed:
"none" (gamma 0), "square" (gamma 2) or "power" (any other, read at run time). Everything is float32.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loss_math import LOG2_E, log1p, maximum


class Logistic(NamedTuple):
    """All from exp(-|z|): none is one minus another."""

    p: Any  # sigmoid(z)
    q: Any  # sigmoid(-z)
    plus: Any  # softplus(z)
    minus: Any  # softplus(-z)


class Element(NamedTuple):
    """The loss and its derivative; the factor (alpha, weights) is still to be multiplied."""

    loss: Any
    slope: Any


@triton.jit
def logistic(z):
    e = tl.exp2(tl.abs(z) * -LOG2_E)
    tail = log1p(e)
    nearer = 1.0 / (1.0 + e)
    farther = e * nearer
    positive = z > 0.0
    return Logistic(
        tl.where(positive, nearer, farther),
        tl.where(positive, farther, nearer),
        maximum(z, 0.0) + tail,
        maximum(-z, 0.0) + tail,
    )


@triton.jit
def product(factor, x):
    """factor * x, where 0 * inf is 0."""
    return tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def power(log_x, gamma):
    """x^gamma for 0 <= x <= 1 and gamma > 0, from log(x)."""
    return tl.exp2(gamma * log_x * LOG2_E)


@triton.jit
def hard_element(x, gamma, FOCUS: tl.constexpr):
    """For y in {0, 1}, from the logistic of x_t: z for y = 1, -z for y = 0. `slope` is -dloss/dx_t, never negative."""
    loss, slope = x.minus, x.q
    if FOCUS != "none":
        focal = x.q * x.q if FOCUS == "square" else power(-x.plus, gamma)
        # p_t * cost tends to 0 with p_t, also where cost is infinite.
        slope = focal * (gamma * product(x.p, loss) + slope)
        loss *= focal
    return Element(loss, slope)


@triton.jit
def soft_element(x, y, positive, gamma, FOCUS: tl.constexpr):
    """For 0 <= y <= 1, from the logistic of z, with 1 - p_t read as y (1 - p) + (1 - y) p. `slope` is dloss/dz.

    positive: what multiplies the positive term (pos_weight). y = 0 and y = 1 lose nothing to the products with 0.
    """
    weighted, rest = positive * y, 1.0 - y
    loss = product(weighted, x.minus) + product(rest, x.plus)
    slope = rest * x.p - weighted * x.q
    if FOCUS != "none":
        miss = y * x.q + rest * x.p
        miss = tl.where(miss < 0.0, 0.0, miss)  # y may be a rounding outside of [0, 1]
        focal = miss * miss if FOCUS == "square" else power(tl.log(miss), gamma)
        # d log(miss) / dz; where y is 0 or 1 the quotient is known, and may be 0 / 0.
        quotient = x.p * x.q * (rest - y) / tl.where(miss == 0.0, 1.0, miss)
        log_slope = tl.where(y == 1.0, -x.p, tl.where(y == 0.0, x.q, quotient))
        slope = focal * (slope + gamma * product(log_slope, loss))
        loss *= focal
    return Element(loss, slope)
