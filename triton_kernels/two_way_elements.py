"""What the kernels of ZLPR and the two-way loss load, add up and store of a block of classes of rows, or of pixels.

A row is what has one loss: N rows of logits [N, C], N * P of images [N, C, P]. Per-row values have the shape of `row`,
[ROWS, 1] or [1, PIXELS]. x: Vectors; t: Temperatures. Of class targets, whose positive is one class, `u_g`, blocks hold
the negatives alone.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from longtail.options import TwoWayOptions

from .loss_math import exp_cut, finite_max, over_lanes_max
from .softmax_rows import load_target
from .two_way_math import (
    RowSides,
    Side,
    accumulate_side,
    finish_sides,
    settle_side,
)


class Vectors(NamedTuple):
    """Optional constants, float32: per class [C], and per row."""

    class_bias: Any
    sample_weight: Any


class Row(NamedTuple):
    """What is known of rows before their logits are read."""

    exists: Any
    counted: Any  # whether the class target is none that is ignored; of dense targets `exists`
    hot: Any  # the target class, or -1; of dense targets 0
    u_g: Any  # its logit; of dense targets 0


class Sums(NamedTuple):
    """Both sides, and whether there is a positive, 1 or 0; of class targets the negatives alone."""

    negative: Any
    positive: Any
    any: Any


class Block(NamedTuple):
    """Exponents of both sides, -inf of classes of the other, and their weights; of class targets each is the first."""

    negative: Any
    positive: Any
    of_negative: Any
    of_positive: Any


def vectors(options: TwoWayOptions) -> Vectors:
    return Vectors(options.class_bias, options.sample_weight)


@triton.jit
def load_row(logits, target, z_row, class_stride, row, exists, classes, ignore_index, x, DENSE: tl.constexpr):
    """z_row: offset of the row's class 0. target: of the rows, where they have a class."""
    counted, hot, u_g = exists, tl.zeros_like(row).to(tl.int32), tl.zeros_like(row).to(tl.float32)
    if not DENSE:
        g, counted = load_target(target, exists, classes, ignore_index)
        u_g = tl.load(logits + z_row + g * class_stride, mask=counted, other=0.0).to(tl.float32)
        if x.class_bias is not None:
            u_g += tl.load(x.class_bias + g, mask=counted, other=0.0)
        hot = tl.where(counted, g, -1)
    return Row(exists, counted, hot, u_g)


@triton.jit
def load_block(logits, target, z_at, y_at, cols, mask, real, hot, ignored, x, DENSE: tl.constexpr,
               EVICT: tl.constexpr):  # fmt: skip
    """mask: what is loaded; real: whether the class exists, for the loads of class vectors.

    Of images the mask knows nothing of rows that do not count, so that neighbours are loaded at once: what comes of
    them is not stored.
    """
    none = float("-inf")
    u = tl.load(logits + z_at, mask=mask, other=none, eviction_policy=EVICT).to(tl.float32)
    if x.class_bias is not None:
        u += tl.load(x.class_bias + cols, mask=real, other=0.0)
    if DENSE:
        y = tl.load(target + y_at, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
        on = mask
        if ignored is not None:
            on = mask & (y != ignored)
        of_p = tl.where((y <= 0.0) | (on == 0), 0.0, y)
        of_n = tl.where((y >= 1.0) | (on == 0), 0.0, 1.0 - y)
        found = Block(tl.where(of_n == 0.0, none, u), tl.where(of_p == 0.0, none, -u), of_n, of_p)
    else:
        u = tl.where(mask & (cols != hot), u, none)
        found = Block(u, u, u, u)  # Triton 3.6 returns no None
    return found


@triton.jit
def add_block(s, b, t, DENSE: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr):
    """Adds a block to Sums [LANES]. A lane takes runs of RUN neighbours, as a thread of the load does."""
    GROUPS: tl.constexpr = b.negative.numel // (LANES * RUN)
    u_n = b.negative.reshape(GROUPS, LANES, RUN)
    if DENSE:
        u_p, of_p = b.positive.reshape(GROUPS, LANES, RUN), b.of_positive.reshape(GROUPS, LANES, RUN)
        negative = accumulate_side(s.negative, u_n, b.of_negative.reshape(GROUPS, LANES, RUN), t.inverse_negative)
        positive = accumulate_side(s.positive, u_p, of_p, t.inverse_positive)
        s = Sums(negative, positive, tl.maximum(s.any, over_lanes_max(tl.where(of_p == 0.0, 0.0, 1.0))))
    else:
        s = Sums(accumulate_side(s.negative, u_n, None, t.inverse_negative), s.positive, s.any)
    return s


@triton.jit
def finish_row(s, r, row, grad_loss, grad_loss_stride, loss, stats, apart, t, x, DENSE: tl.constexpr,
               JOINT: tl.constexpr):  # fmt: skip
    """Both sides of the rows, what multiplies their terms, and which rows count.

    With `loss` from Sums of the rows, which, with the losses, are stored; else from the statistics. apart: between the
    columns of these, None where rows lie together.
    """
    at, step = stats + row * 4, 1
    if apart is not None:
        at, step = stats + row, apart
    counted = r.counted
    if loss is not None:
        n, p = settle_side(s.negative), s.positive
        if not DENSE:
            m = tl.where(r.u_g == r.u_g, -r.u_g, 0.0)
            p = Side(m, tl.where(m == float("-inf"), 0.0, tl.where(r.u_g == r.u_g, 1.0, r.u_g)))
        elif JOINT:
            counted = counted & (s.any > 0.0)
        p = settle_side(p)
        tl.store(at, tl.where(counted, n.m, 0.0), mask=r.exists)
        tl.store(at + step, tl.where(counted, n.d, 0.0), mask=r.exists)
        tl.store(at + 2 * step, tl.where(counted, p.m, 0.0), mask=r.exists)
        tl.store(at + 3 * step, tl.where(counted, p.d, 0.0), mask=r.exists)
    else:
        n = Side(tl.load(at, mask=counted, other=0.0), tl.load(at + step, mask=counted, other=0.0))
        p = Side(tl.load(at + 2 * step, mask=counted, other=0.0), tl.load(at + 3 * step, mask=counted, other=0.0))
        counted = counted & ((n.m != 0.0) | (n.d != 0.0) | (p.m != 0.0) | (p.d != 0.0))
    v = tl.zeros_like(n.d) + 1.0
    if x.sample_weight is not None:
        v = tl.load(x.sample_weight + row, mask=counted, other=0.0)
    found = finish_sides(n, p, t, v, JOINT)
    if loss is not None:
        tl.store(loss + row, tl.where(counted, found.loss, 0.0), mask=r.exists)
    if grad_loss is not None:
        upstream = tl.load(grad_loss + row * grad_loss_stride, mask=counted, other=0.0)
        found = RowSides(found.loss, found.negative * upstream, found.positive * upstream)
    return Side(finite_max(n.m), found.negative), Side(finite_max(p.m), found.positive), counted


@triton.jit
def store_block(grad, b, cols, written, n, p, r, counted, t, DENSE: tl.constexpr):
    """Writes the gradient of a block. n, p: m of each side, and what multiplies its terms."""
    e_n, _ = exp_cut((b.negative - n.m) * t.inverse_negative)
    if DENSE:
        e_p, _ = exp_cut((b.positive - p.m) * t.inverse_positive)
        du = tl.where(b.of_negative == 0.0, 0.0, b.of_negative * e_n * n.d)
        du -= tl.where(b.of_positive == 0.0, 0.0, b.of_positive * e_p * p.d)
    else:
        e_g, _ = exp_cut((-r.u_g - p.m) * t.inverse_positive)
        du = tl.where(cols == r.hot, -e_g * p.d, e_n * n.d)
    tl.store(grad, tl.where(counted, du, 0.0).to(grad.dtype.element_ty), mask=written)
