"""The mathematics of one row of the softmax family whose target is a probability of each class, as csrc/dense_math.h.

    q_j = w_j ((1 - epsilon) y_j + epsilon / C),   loss = v sum_j q_j (lse - u_j) + z_loss lse^2

Notation and conventions of loss_math.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loss_math import exp_cut, finite_max, over_lanes_max, over_lanes_sum


class DenseStats(NamedTuple):
    """What describes a row whose target is a probability of each class; q_j: that with label smoothing and weight."""

    m: Any  # max of u_j
    d: Any  # sum of exp(u_j - m)
    V: Any  # sum of q_j (m - u_j), where 0 * inf is 0
    W: Any  # sum of q_j


class DenseGrad(NamedTuple):
    """dloss/du_j = v (mass exp(u_j - m) - q_j) + z exp(u_j - m): exactly 0 where p_j W is q_j."""

    m: Any
    mass: Any
    v: Any
    z: Any


@triton.jit
def empty_dense(LANES: tl.constexpr):
    """Stats of no class at all, [LANES] of them."""
    zero = tl.zeros([LANES], tl.float32)
    return DenseStats(zero + float("-inf"), zero, zero, zero)


@triton.jit
def raise_dense(s, m):
    """Moves the sums to a new maximum m >= s.m."""
    factor, _ = exp_cut(s.m - finite_max(m))
    return DenseStats(m, factor * s.d, s.V + s.W * (finite_max(m) - finite_max(s.m)), s.W)


@triton.jit
def accumulate_dense(s, u, q):
    """Adds logits u and q, both [groups, lanes, run], to stats [lanes]."""
    s = raise_dense(s, tl.maximum(s.m, over_lanes_max(u)))
    m = finite_max(s.m)[None, :, None]
    e, _ = exp_cut(u - m)
    cost = tl.where(q == 0.0, 0.0, q * (m - u))
    return DenseStats(s.m, s.d + over_lanes_sum(e), s.V + over_lanes_sum(cost), s.W + over_lanes_sum(q))


@triton.jit
def combine_dense_lanes(s):
    """Joins the pieces of one row that lie along axis 0."""
    m = tl.max(s.m, 0)
    s = raise_dense(s, m)
    return DenseStats(m, tl.sum(s.d, 0), tl.sum(s.V, 0), tl.sum(s.W, 0))


@triton.jit
def combine_dense(a, b):
    """Joins two disjoint pieces of one row."""
    m = tl.maximum(a.m, b.m)
    a = raise_dense(a, m)
    b = raise_dense(b, m)
    return DenseStats(m, a.d + b.d, a.V + b.V, a.W + b.W)


@triton.jit
def finish_dense(s, o, v):
    """The loss and its gradient, which needs no V. v: sample weight. A row of nothing but -inf has NaN, as in torch."""
    d = tl.where(s.d == 0.0, float("nan"), s.d)
    log_d, inverse_d = tl.log(d), 1.0 / d
    loss, z = v * (s.V + s.W * log_d), tl.zeros_like(d)
    if o.z_loss is not None:
        lse = s.m + log_d
        loss += o.z_loss * lse * lse
        z = 2.0 * o.z_loss * lse * inverse_d
    return loss, DenseGrad(finite_max(s.m), s.W * inverse_d, v, z)
