"""The softmax family for class probabilities in Triton: rows held in registers and rows swept in blocks.

`loss` asks for losses and statistics, `grad`, from the statistics, for the gradient; never both. An argument or option
that is None is compiled out; numbers are read at run time.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from longtail.options import SoftmaxOptions

from . import tuning
from .checks import check_dense_loss
from .dense_math import (
    DenseGrad,
    DenseStats,
    accumulate_dense,
    combine_dense,
    combine_dense_lanes,
    empty_dense,
    finish_dense,
)
from .effective import load_block, store_grad
from .launching import COMPILE, aligned, on
from .loss_math import Vectors, exp_cut, loss_options
from .softmax_rows import edges

INTEGERS = ["stride", "target_stride", "grad_stride", "grad_loss_stride", "rows", "classes"]
UNALIGNED = ["grad_loss", "loss", "stats"]


@triton.jit
def load_weighted(target, u, cols, first, mask, classes, x, o, EVICT: tl.constexpr):
    """q_j of a block of probabilities with logits u, 0 where the mask is off.

    Of no probability at a logit of -inf it is 0, whatever the weight.
    """
    q = tl.load(target, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if o.label_smoothing is not None:
        smoothed = q * (1.0 - o.label_smoothing) + o.label_smoothing / classes.to(tl.float32)
        q = tl.where(mask, smoothed, 0.0)
    if x.weight is not None:
        absent = (q == 0.0) & (u == float("-inf"))
        q = tl.where(absent, 0.0, q * tl.load(x.weight + first + cols, mask=mask, other=0.0))
    return q


@triton.jit
def add_block(s, z, y, cols, first, mask, classes, x, o, LANES: tl.constexpr, RUN: tl.constexpr):
    """Adds a block to stats [LANES]. A lane takes runs of RUN neighbours, as a thread of the load does."""
    _, u = load_block(z, cols, first, mask, mask, None, x, o, "")
    q = load_weighted(y, u, cols, first, mask, classes, x, o, "")
    GROUPS: tl.constexpr = u.numel // (LANES * RUN)
    return accumulate_dense(s, u.reshape(GROUPS, LANES, RUN), q.reshape(GROUPS, LANES, RUN))


@triton.jit
def store_block(grad, z, y, cols, first, mask, g, classes, x, o):
    """Writes the gradient of a block."""
    capped, u = load_block(z, cols, first, mask, mask, None, x, o, "evict_first")
    q = load_weighted(y, u, cols, first, mask, classes, x, o, "evict_first")
    e, _ = exp_cut(u - g.m)
    du = g.v * (g.mass * e - q)
    if o.z_loss is not None:
        du += g.z * e
    store_grad(grad, cols, first, mask, mask, du, capped, None, x, o)


@triton.jit
def sample_weights(row, exists, like, x):
    v = tl.zeros_like(like) + 1.0
    if x.sample_weight is not None:
        v = tl.load(x.sample_weight + row, mask=exists, other=0.0)
    return v


@triton.jit
def store_loss(loss, stats, s, row, exists, x, o):
    value, _ = finish_dense(s, o, sample_weights(row, exists, s.d, x))
    at = stats + row * 5
    tl.store(loss + row, value, mask=exists)
    tl.store(at, tl.where(s.d == s.d, s.m, s.d), mask=exists)  # a maximum passes over NaN, a sum does not
    tl.store(at + 1, s.d, mask=exists)
    tl.store(at + 2, tl.zeros_like(s.d), mask=exists)
    tl.store(at + 3, s.W, mask=exists)
    tl.store(at + 4, tl.zeros_like(s.d), mask=exists)


@triton.jit
def load_row_grad(stats, grad_loss, grad_loss_stride, row, exists, x, o):
    """The coefficients of the loss times its upstream gradient."""
    m = tl.load(stats + row * 5, mask=exists, other=0.0)
    d = tl.load(stats + row * 5 + 1, mask=exists, other=1.0)
    W = tl.load(stats + row * 5 + 3, mask=exists, other=0.0)
    _, g = finish_dense(DenseStats(m, d, tl.zeros_like(d), W), o, sample_weights(row, exists, d, x))
    upstream = tl.load(grad_loss + row * grad_loss_stride, mask=exists, other=0.0)
    return DenseGrad(g.m, g.mass, g.v * upstream, g.z * upstream)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def dense_tile_kernel(
    logits, target, grad_loss, loss, stats, grad, stride, target_stride, grad_stride, grad_loss_stride, rows, classes,
    x, o, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Short rows, held in registers: C <= BLOCK.

    grid: ceil(N / ROWS) programs of ROWS whole rows. Sweeps: one.
    reads: logits and target [N, C] once; per row the sample weight and, with `grad`, the upstream gradient and the
      stats [N, 5]; class_bias, class_scale and weight [C] per row, from cache.
    writes: loss [N] and stats [N, 5], or grad [N, C].
    bytes: one pass over each of the matrices named above, about 30 per row.
    Bodies and edges of rows, VEC: as dense_sweep_kernel.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    exists = row < rows
    head = tl.zeros([ROWS, 1], tl.int32)
    if EDGES:
        head += ((VEC - row * stride % VEC) % VEC).to(tl.int32)
    body = (classes - head) // VEC * VEC
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (cols < body) & exists
    z = logits + (row * stride + head) // VEC * VEC + cols
    y = target + (row * target_stride + head) // VEC * VEC + cols
    if EDGES:
        edge = edges(head, body, classes, VEC)
        at_edge = (edge < classes) & exists
        z_edge, y_edge = logits + row * stride + edge, target + row * target_stride + edge
    if loss is not None:
        s = add_block(empty_dense(ROWS), z, y, cols, head, mask, classes, x, o, ROWS, BLOCK)
        if EDGES:
            ends = add_block(empty_dense(ROWS), z_edge, y_edge, edge, 0, at_edge, classes, x, o, ROWS, 2 * VEC)
            s = combine_dense(s, ends)
        s = DenseStats(s.m[:, None], s.d[:, None], s.V[:, None], s.W[:, None])
        store_loss(loss, stats, s, row, exists, x, o)
    else:
        g = load_row_grad(stats, grad_loss, grad_loss_stride, row, exists, x, o)
        to = grad + (row * grad_stride + head) // VEC * VEC + cols
        store_block(to, z, y, cols, head, mask, g, classes, x, o)
        if EDGES:
            to_edge = grad + row * grad_stride + edge
            store_block(to_edge, z_edge, y_edge, edge, 0, at_edge, g, classes, x, o)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def dense_sweep_kernel(
    logits, target, grad_loss, loss, stats, grad, stride, target_stride, grad_stride, grad_loss_stride, rows, classes,
    x, o, BLOCK: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Long rows, in blocks of BLOCK classes.

    grid: N programs of one row. Sweeps: one; for `grad` in reverse, last row and last block first, so that what the
      forward pass read last is read from cache.
    reads, writes, bytes: as dense_tile_kernel.
    A row is its body, whole vectors of VEC elements from its first aligned one on, and, if EDGES, fewer than VEC
    elements at either end: 16-byte accesses for every C. The rows of all matrices are aligned alike; else VEC is 1.
    """
    row = tl.program_id(0).to(tl.int64)
    if loss is None:
        row = rows - 1 - row
    exists = row < rows
    head = 0
    if EDGES:
        head = ((VEC - row * stride % VEC) % VEC).to(tl.int32)
    body = (classes - head) // VEC * VEC
    z_body, y_body = logits + (row * stride + head) // VEC * VEC, target + (row * target_stride + head) // VEC * VEC
    if EDGES:
        edge = edges(head, body, classes, VEC)
        at_edge = edge < classes
        z_edge, y_edge = logits + row * stride + edge, target + row * target_stride + edge
    if loss is not None:
        s = empty_dense(LANES)
        for start in range(0, body, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            s = add_block(s, z_body + cols, y_body + cols, cols, head, cols < body, classes, x, o, LANES, VEC)
        s = combine_dense_lanes(s)
        if EDGES:
            ends = add_block(empty_dense(1), z_edge, y_edge, edge, 0, at_edge, classes, x, o, 1, 2 * VEC)
            s = combine_dense(s, combine_dense_lanes(ends))
        store_loss(loss, stats, s, row, exists, x, o)
    else:
        g = load_row_grad(stats, grad_loss, grad_loss_stride, row, exists, x, o)
        grad_body = grad + (row * grad_stride + head) // VEC * VEC
        last = (tl.cdiv(body, BLOCK) - 1) * BLOCK
        for done in range(0, body, BLOCK):
            cols = last - done + tl.arange(0, BLOCK)
            mask = cols < body
            store_block(
                grad_body + cols, z_body + cols, y_body + cols, cols, head, mask, g, classes, x, o
            )  # fmt: skip
        if EDGES:
            to_edge = grad + row * grad_stride + edge
            store_block(to_edge, z_edge, y_edge, edge, 0, at_edge, g, classes, x, o)


def launch_dense(
    logits: Tensor, target: Tensor, grad_loss: Tensor | None, loss: Tensor | None, stats: Tensor,
    grad: Tensor | None, options: SoftmaxOptions,
) -> None:  # fmt: skip
    """The loss and its statistics, or the gradient, of logits and target [N, C]."""
    check_dense_loss(logits, target, grad_loss, stats, options)
    if logits.numel() == 0:
        if loss is not None:
            loss.zero_()
            stats.zero_()
        return
    x = Vectors(*options.parted()[0])
    n, c = logits.shape
    strides = tuple(t.stride(0) for t in (logits, target, grad) if t is not None)
    arguments: tuple[Any, ...] = (
        *(logits, target, grad_loss, loss, stats, grad, *strides[:2], strides[-1]),
        *(0 if grad_loss is None else grad_loss.stride(0), n, c, x, loss_options(options)),
    )
    every = aligned(logits, target, grad)
    with on(logits.device):
        if c <= tuning.TILE_CLASSES:
            t = tuning.tile(c, logits.itemsize, strides, every)
            constants = {"ROWS": t.rows, "BLOCK": t.block, "VEC": t.vec, "EDGES": t.edges}
            dense_tile_kernel[(triton.cdiv(n, t.rows),)](*arguments, **constants, num_warps=t.warps, **COMPILE)
            return
        s = tuning.dense_sweep(c, logits.itemsize, strides, every)
        constants = {"BLOCK": s.block, "LANES": s.lanes, "VEC": s.vec, "EDGES": s.edges}
        dense_sweep_kernel[(n,)](*arguments, **constants, num_warps=s.warps, **COMPILE)
