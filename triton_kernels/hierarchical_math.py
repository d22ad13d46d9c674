"""The mathematics of one row of the hierarchical cross-entropy for Triton kernels.

A_0, all classes, contains A_1, ..., A_D, the target's ancestors from the top down and itself; ring k is A_k without
A_(k+1). From the log-sum-exp of each ring the loss is the weighted sum of softplus(lse(ring k) - lse(A_(k+1))), and
dloss/du_j = exp(u_j - m_k) c_k in ring k. What is per level is [LEVELS], a power of two; rings beyond the target's own
have nothing in them. Conventions of loss_math.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loss_math import exp_cut, finite_max, log1p, maximum, over_lanes_max, over_lanes_sum


class Ring(NamedTuple):
    """Of some classes, in every lane or at every level."""

    m: Any  # max of u_j
    d: Any  # sum of exp(u_j - m)


class PathGrad(NamedTuple):
    """dloss/du_j = exp(u_j - m) * c for the classes of ring k at level k, and `target` for the target."""

    m: Any
    c: Any
    target: Any


@triton.jit
def empty_ring(LANES: tl.constexpr):
    zero = tl.zeros([LANES], tl.float32)
    return Ring(zero + float("-inf"), zero)


@triton.jit
def raise_ring(s, m):
    """Moves the sum to a new maximum m >= s.m."""
    factor, _ = exp_cut(s.m - finite_max(m))
    return Ring(m, factor * s.d)


@triton.jit
def accumulate_ring(s, u):
    """Adds logits u [groups, lanes, run] to lanes: one exp each, and one per lane."""
    s = raise_ring(s, tl.maximum(s.m, over_lanes_max(u)))
    e, _ = exp_cut(u - finite_max(s.m)[None, :, None])
    return Ring(s.m, s.d + over_lanes_sum(e))


@triton.jit
def combine_ring_lanes(s):
    """Joins the pieces of one ring that lie along axis 0."""
    m = tl.max(s.m, 0)
    return Ring(m, tl.sum(raise_ring(s, m).d, 0))


@triton.jit
def combine_rings(a, b):
    """Joins two disjoint pieces of one ring."""
    m = tl.maximum(a.m, b.m)
    a = raise_ring(a, m)
    b = raise_ring(b, m)
    return Ring(m, a.d + b.d)


@triton.jit
def behind(a, b):
    """a - b of two maxima; 0 of nothing but -inf behind nothing but -inf."""
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def node(rings, u_g, inside):
    """The classes of a node on the target's path as (m, log s), lse = m + log s; inside [LEVELS, LEVELS]: its rings."""
    m = maximum(tl.max(tl.where(inside, rings.m[None, :], float("-inf")), 1), u_g)
    at = finite_max(m)
    e, _ = exp_cut(rings.m[None, :] - at[:, None])
    own, _ = exp_cut(u_g - at)
    s = tl.sum(tl.where(inside, rings.d[None, :] * e, 0.0), 1) + own
    return m, tl.log(tl.where(m == float("-inf"), 1.0, s))


@triton.jit
def share(m, log_s, m_of, log_s_of):
    """The mass of the node at level k within that at level j, [k, j]."""
    ratio, _ = exp_cut(behind(m[:, None], m_of[None, :]) + (log_s[:, None] - log_s_of[None, :]))
    return ratio


@triton.jit
def finish_path(rings, u_g, weight, weight_above, factor, LEVELS: tl.constexpr):
    """The loss and the coefficients of its gradient.

    weight: of A_(k+1) at level k; weight_above: that of A_k, 0 at level 0; factor: sample weight times class weight.
    """
    k, j = tl.arange(0, LEVELS)[:, None], tl.arange(0, LEVELS)[None, :]
    m, log_s = node(rings, u_g, j >= k)  # A_k
    m_below, log_s_below = node(rings, u_g, j > k)  # A_(k+1)
    margin = behind(rings.m, m_below) + (tl.log(tl.where(rings.d == 0.0, 1.0, rings.d)) - log_s_below)
    # A ring without mass costs nothing; a target at NaN shows, one at +inf has no probability.
    margin = tl.where(rings.d == 0.0, tl.where(u_g < float("inf"), float("-inf"), float("nan")), margin)
    # softplus and sigmoid of the margin, with full relative precision on both sides.
    e, _ = exp_cut(-tl.abs(margin))
    nearer = 1.0 / (1.0 + e)
    nothing = maximum(tl.max(rings.m, 0), u_g)
    nothing = factor * (nothing - nothing)  # NaN in a row of nothing but -inf, as in torch
    loss = factor * tl.sum(weight * (maximum(margin, 0.0) + log1p(e)), 0) + nothing
    lost = weight * tl.where(margin > 0.0, nearer, e * nearer)  # weight * (1 - P(A_(k+1) | A_k))
    # weight - lost above, or from the weights' steps, whichever cancels less: those of weights that are all alike.
    above = tl.sum(tl.where(j < k, lost[None, :] * share(m, log_s, m_below, log_s_below), 0.0), 1)
    step = tl.where(j <= k, (weight - weight_above)[None, :] * share(m, log_s, m, log_s), 0.0)
    kept = tl.where(tl.sum(tl.abs(step), 1) < weight + above, tl.sum(step, 1), weight - above)
    largest, _ = exp_cut(behind(rings.m, m) - log_s)  # probability in A_k of the ring's largest logit
    own, _ = exp_cut(behind(u_g, m_below) - log_s_below)
    c, target = factor * kept * largest + nothing, nothing - factor * tl.sum(lost * own, 0)
    return loss, PathGrad(finite_max(rings.m), c, target)


@triton.jit
def scale_path_grad(grad, upstream):
    return PathGrad(grad.m, grad.c * upstream, grad.target * upstream)
