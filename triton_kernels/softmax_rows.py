"""The parts of a row: what the kernels of the softmax family load, accumulate and store around loss_math.

Conventions: `row` is an int64 scalar, [ROWS, 1], or for images [1, PIXELS]; per-row values have its shape. `cols` are
classes counted from class `first`, [BLOCK], [1, BLOCK], or [CLASSES, 1]; a block's `mask` is on for classes that exist
in rows that count. Class vectors are loaded under a mask `real`: over images of the classes, else the block's whole
mask, lest their own layout become the block's. x: Vectors; o: LossOptions; terms: TargetTerms.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .effective import (
    capped_logits,
    class_logits,
    effective_logits,
    load_block,
    load_shard_terms,
    load_terms,
    store_grad,
)
from .loss_math import (
    RowGrad,
    RowStats,
    accumulate,
    apply,
    combine,
    combine_lanes,
    empty_stats,
    finish,
    finite_max,
    over_lanes_sum,
    scale_grad,
)


@triton.jit
def load_target(target, mask, classes, ignore_index):
    """The target class, 0 where the row does not count, and whether it does. Out of range traps, as in torch."""
    g = tl.load(target, mask=mask, other=0)
    valid = (g >= 0) & (g < classes)
    counted = valid & mask
    if ignore_index is not None:
        valid |= g == ignore_index
        counted &= g != ignore_index
    tl.device_assert(valid | (mask == 0), "longtail: target is out of bounds")
    return tl.where(counted, g, 0).to(tl.int32), counted


@triton.jit
def load_shard_target(target, mask, classes, ignore_index):
    """The target class or -1, in another shard, and whether the row counts. Out of range traps."""
    g = tl.load(target, mask=mask, other=-1)
    counted = mask & (g != ignore_index)
    tl.device_assert((g >= -1) & (g < classes) | (counted == 0), "longtail: target is out of bounds")
    return tl.where(counted & (g >= 0) & (g < classes), g, -1).to(tl.int32), counted


@triton.jit
def load_row(z_target, g, row, counted, x, o):
    """u_g, w_g and v; 1 where there are no weights. And what g brings to the other classes."""
    capped = capped_logits(tl.load(z_target, mask=counted, other=0.0), o)
    terms = load_terms(capped, g, counted, x)
    u_g = class_logits(capped, g, 0, counted, terms, x)
    w_g, v = tl.zeros_like(u_g) + 1.0, tl.zeros_like(u_g) + 1.0
    if x.class_margin is not None:
        u_g -= tl.load(x.class_margin + g, mask=counted, other=0.0)
    if x.weight is not None:
        w_g = tl.load(x.weight + g, mask=counted, other=0.0)
    if x.sample_weight is not None:
        v = tl.load(x.sample_weight + row, mask=counted, other=0.0)
    return u_g, w_g, v, terms


@triton.jit
def load_reference(z_row, g, counted, terms, x, o):
    """u_g and w_g of the target; where it lies in another shard u_0, which U is relative to."""
    first = tl.where(g < 0, 0, g)
    capped = capped_logits(tl.load(z_row + first, mask=counted, other=0.0), o)
    own = class_logits(capped, first, 0, counted, terms, x)
    u_g = tl.where(g < 0, effective_logits(own, first, 0, counted, terms, x, o), own)
    w_g = tl.zeros_like(u_g) + 1.0
    if x.class_margin is not None:
        u_g -= tl.load(x.class_margin + first, mask=counted & (g >= 0), other=0.0)
    if x.weight is not None:
        w_g = tl.load(x.weight + first, mask=counted, other=0.0)
    return u_g, w_g


@triton.jit
def load_shard_row(z_row, g, row, counted, target_terms, x, o, GRAD: tl.constexpr):
    """u_g, w_g and the TargetTerms of a row of a shard. GRAD: its gradient may be written over its logits."""
    terms = load_shard_terms(z_row, g, row, counted, target_terms, x, o)
    u_g, w_g = load_reference(z_row, g, counted, terms, x, o)
    if GRAD and target_terms is None and o.compensation is not None:
        tl.debug_barrier()  # before one warp writes over the target's logit, all have read it
    return u_g, w_g, terms


@triton.jit
def add_block(s, u, cols, first, mask, real, g, holds_target, x, o, LANES: tl.constexpr, RUN: tl.constexpr):
    """Adds a block to stats [LANES]. A lane takes runs of RUN neighbours, as a thread of the load does."""
    GROUPS: tl.constexpr = u.numel // (LANES * RUN)
    U = s.U
    if o.label_smoothing is not None:
        difference = tl.where(mask & (cols != g - first), u - finite_max(s.u_g), 0.0)
        if x.weight is not None:
            difference *= tl.load(x.weight + first + cols, mask=real, other=0.0)
        U += over_lanes_sum(difference.reshape(GROUPS, LANES, RUN))
    if holds_target:
        u = tl.where(cols == g - first, float("-inf"), u)
    s = accumulate(s, u.reshape(GROUPS, LANES, RUN))
    return RowStats(s.m, s.d, s.t, s.u_g, U)


@triton.jit
def load_stats(stats, apart, counted):
    """`stats` of a row, its numbers `apart` elements from each other."""
    return RowStats(
        tl.load(stats, mask=counted, other=0.0),
        tl.load(stats + apart, mask=counted, other=0.0),
        tl.load(stats + 2 * apart, mask=counted, other=0.0),
        tl.load(stats + 3 * apart, mask=counted, other=0.0),
        tl.load(stats + 4 * apart, mask=counted, other=0.0),
    )


@triton.jit
def store_stats(stats, apart, s, mask, counted):
    tl.store(stats, tl.where(counted, s.m, 0.0), mask=mask)
    tl.store(stats + apart, tl.where(counted, s.d, 0.0), mask=mask)
    tl.store(stats + 2 * apart, tl.where(counted, s.t, 0.0), mask=mask)
    tl.store(stats + 3 * apart, tl.where(counted, s.u_g, 0.0), mask=mask)
    tl.store(stats + 4 * apart, tl.where(counted, s.U, 0.0), mask=mask)


@triton.jit
def closed_stats(s, w_g, o):
    """The stats of a row all of whose classes have been added."""
    U = s.U
    if o.label_smoothing is not None:
        U += w_g * (s.u_g - finite_max(s.u_g))  # the target's share: 0, but for a target at -inf
    return RowStats(tl.where(s.d == s.d, s.m, s.d), s.d, s.t, s.u_g, U)  # a maximum passes over NaN, a sum does not


@triton.jit
def store_shard_stats(stats, s, g, w_g, exists, counted, o):
    closed = closed_stats(s, w_g, o)
    U = tl.where(g < 0, s.U, closed.U)  # no target has been left out of the sum
    store_stats(stats, 1, RowStats(closed.m, s.d, s.t, s.u_g, U), exists, counted)


@triton.jit
def load_row_grad(row_grad, counted):
    return RowGrad(
        tl.load(row_grad, mask=counted, other=0.0),
        tl.load(row_grad + 1, mask=counted, other=0.0),
        tl.load(row_grad + 2, mask=counted, other=0.0),
        tl.load(row_grad + 3, mask=counted, other=0.0),
        tl.load(row_grad + 4, mask=counted, other=0.0),
    )


@triton.jit
def finish_row(s, w_g, v, row, mask, counted, grad_loss, loss, stats, apart, grad_loss_stride, classes, x, o):
    """Stores loss and stats if `loss` is given. Returns the gradient's coefficients, 0 in rows that do not count.

    stats: of the row, its numbers `apart` elements from each other.
    """
    total = classes.to(tl.float32)
    weight_sum = total
    if x.weight_sum is not None:
        weight_sum = tl.load(x.weight_sum)
    if loss is not None:
        s = closed_stats(s, w_g, o)
    value, grad = finish(s, o, total, weight_sum, w_g, v)
    if loss is not None:
        tl.store(loss + row, tl.where(counted, value, 0.0), mask=mask)
        store_stats(stats, apart, s, mask, counted)
    if grad_loss is not None:
        grad = scale_grad(grad, tl.load(grad_loss + row * grad_loss_stride, mask=counted, other=0.0))
    return RowGrad(
        tl.where(counted, grad.m, 0.0),
        tl.where(counted, grad.a, 0.0),
        tl.where(counted, grad.b, 0.0),
        tl.where(counted, grad.S, 0.0),
        tl.where(counted, grad.target, 0.0),
    )


@triton.jit
def store_block(grad, cols, first, mask, real, row_grad, capped, u, g, terms, x, o):
    """Writes the gradient of a block from its capped and effective logits."""
    du = apply(row_grad, u)
    if o.label_smoothing is not None:
        if x.weight is not None:
            du += row_grad.S * tl.load(x.weight + first + cols, mask=real, other=0.0)
        else:
            du += row_grad.S
    du = tl.where(cols == g - first, row_grad.target, du)
    store_grad(grad, cols, first, mask, real, du, capped, terms, x, o)


@triton.jit
def edges(head, body, classes, VEC: tl.constexpr):
    """The classes before and after the body of a row, `classes` in unused places."""
    i = tl.arange(0, 2 * VEC)
    return tl.where(i < VEC, tl.where(i < head, i, classes), i - VEC + head + body)


@triton.jit
def sweep_stats(
    z_row, z_body, head, body, g, counted, u_g, classes, terms, x, o,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """The stats of one row; every lane keeps its own until the end, so that the loop needs no barrier."""
    s = empty_stats(u_g, LANES)
    end = tl.where(counted, body, 0)
    for start in range(0, end, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < end
        _, u = load_block(z_body + cols, cols, head, mask, mask, terms, x, o, "")
        holds_target = (g >= head + start) & (g < head + start + BLOCK)  # the others skip a comparison per element
        s = add_block(s, u, cols, head, mask, mask, g, holds_target, x, o, LANES, VEC)
    s = combine_lanes(s)
    if EDGES:
        edge = edges(head, body, classes, VEC)
        at_edge = edge < tl.where(counted, classes, 0)
        _, u_edge = load_block(z_row + edge, edge, 0, at_edge, at_edge, terms, x, o, "")
        ends = add_block(empty_stats(u_g, 1), u_edge, edge, 0, at_edge, at_edge, g, True, x, o, 1, 2 * VEC)
        s = combine(s, combine_lanes(ends))
    return s


@triton.jit
def sweep_grad(
    z_row, z_body, grad_row, grad_body, head, body, g, counted, row_grad, classes, terms, x, o,
    BLOCK: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of one row, last block first."""
    end = tl.where(counted, body, 0)
    last = (tl.cdiv(body, BLOCK) - 1) * BLOCK
    for done in range(0, body, BLOCK):
        cols = last - done + tl.arange(0, BLOCK)
        mask, written = cols < end, cols < body
        capped, u = load_block(z_body + cols, cols, head, mask, mask, terms, x, o, "evict_first")
        store_block(grad_body + cols, cols, head, written, written, row_grad, capped, u, g, terms, x, o)
    if EDGES:
        edge = edges(head, body, classes, VEC)
        at_edge = edge < tl.where(counted, classes, 0)
        written_edge = edge < classes
        capped_edge, u_edge = load_block(z_row + edge, edge, 0, at_edge, at_edge, terms, x, o, "")
        store_block(grad_row + edge, edge, 0, written_edge, written_edge, row_grad, capped_edge, u_edge, g, terms, x, o)
