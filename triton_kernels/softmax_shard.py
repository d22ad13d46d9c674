"""One shard of the classes of a softmax loss in Triton: its statistics, and its gradient from those of all shards.

Rows [N, C] of a vocabulary-parallel layer. The target is a class of this shard, ignore_index, or -1: in another shard.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtail.options import SoftmaxOptions

from . import tuning
from .checks import check_shard
from .launching import COMPILE, aligned, on
from .loss_math import RowGrad, RowStats, Vectors, empty_stats, loss_options
from .softmax_rows import (
    add_block,
    closed_stats,
    load_block,
    load_row,
    store_block,
    store_stats,
    sweep_grad,
    sweep_stats,
)

INTEGERS = ["stride", "grad_stride", "target_stride", "rows", "classes", "ignore_index"]
UNALIGNED = ["target", "stats", "row_grad"]


@triton.jit
def load_shard_target(target, mask, classes, ignore_index):
    """The target class or -1, and whether the row counts. Out of range traps."""
    g = tl.load(target, mask=mask, other=-1)
    counted = mask & (g != ignore_index)
    tl.device_assert((g >= -1) & (g < classes) | (counted == 0), "longtail: target is out of bounds")
    return tl.where(counted & (g >= 0) & (g < classes), g, -1).to(tl.int32), counted


@triton.jit
def load_reference(z_row, g, row, counted, x, o):
    """u_g and w_g of the target; where it lies elsewhere u_0, which U is relative to, without a margin."""
    first = tl.where(g < 0, 0, g)
    # Spelled out: a default would be Python's None, and no constant of Triton's.
    without_margin = Vectors(x.weight, x.class_bias, None, None, None)
    u_g, w_g, _ = load_row(z_row + first, first, row, counted, without_margin, o)
    if x.class_margin is not None:
        u_g -= tl.load(x.class_margin + first, mask=counted & (g >= 0), other=0.0)
    return u_g, w_g


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
def store_shard_stats(stats, s, g, w_g, exists, counted, o):
    closed = closed_stats(s, w_g, o)
    U = tl.where(g < 0, s.U, closed.U)  # no target has been left out of the sum
    store_stats(stats, 1, RowStats(closed.m, s.d, s.t, s.u_g, U), exists, counted)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def shard_tile_kernel(
    logits, target, row_grad, stats, grad, stride, grad_stride, target_stride, rows, classes, ignore_index, x, o,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Short rows, held in registers: C <= BLOCK. `stats` asks for statistics, `grad` for the gradient.

    grid: ceil(N / ROWS) programs of ROWS whole rows. Sweeps: one.
    reads: logits [N, C] once, ignored rows never; target; class vectors [C] per row, from cache; with `grad`
      row_grad [N, 5].
    writes: stats [N, 5], or grad [N, C] (may be the logits' own memory).
    bytes: one pass over the logits, with `grad` another over it, about 30 per row.
    VEC: elements in 16 bytes if C, both strides and both pointers are multiples of them, else 1.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    exists = row < rows
    g, counted = load_shard_target(target + row * target_stride, exists, classes, ignore_index)
    z_row = logits + row * stride // VEC * VEC
    cols = tl.arange(0, BLOCK)[None, :]
    inside = cols < classes // VEC * VEC
    mask = inside & counted
    capped, u = load_block(z_row + cols, cols, 0, mask, mask, x, o, "")
    if stats is not None:
        u_g, w_g = load_reference(z_row, g, row, counted, x, o)
        s = add_block(empty_stats(u_g, ROWS), u, cols, 0, mask, mask, g, True, x, o, ROWS, BLOCK)
        s = RowStats(s.m[:, None], s.d[:, None], s.t[:, None], u_g, s.U[:, None])
        store_shard_stats(stats + row * 5, s, g, w_g, exists, counted, o)
    if grad is not None:
        grads, written = load_row_grad(row_grad + row * 5, counted), inside & exists
        grad_row = grad + row * grad_stride // VEC * VEC
        store_block(grad_row + cols, cols, 0, written, written, grads, capped, u, g, x, o)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def shard_sweep_kernel(
    logits, target, row_grad, stats, grad, stride, grad_stride, target_stride, rows, classes, ignore_index, x, o,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Long rows, in blocks of BLOCK classes.

    grid: N programs of one row. Sweeps: one, for `grad` in reverse.
    reads, writes, bytes: as shard_tile_kernel. Bodies and edges of rows: as softmax_loss.sweep_kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    if stats is None:
        row = rows - 1 - row  # the rows read last may still be in the L2 cache
    exists = row < rows
    g, counted = load_shard_target(target + row * target_stride, exists, classes, ignore_index)
    z_row = logits + row * stride
    head = 0
    if EDGES:
        head = ((VEC - row * stride % VEC) % VEC).to(tl.int32)
    body = (classes - head) // VEC * VEC
    z_body = logits + (row * stride + head) // VEC * VEC
    if stats is not None:
        u_g, w_g = load_reference(z_row, g, row, counted, x, o)
        s = sweep_stats(z_row, z_body, head, body, g, counted, u_g, classes, x, o, BLOCK, LANES, VEC, EDGES)
        store_shard_stats(stats + row * 5, s, g, w_g, exists, counted, o)
    if grad is not None:
        grads, grad_row = load_row_grad(row_grad + row * 5, counted), grad + row * grad_stride
        grad_body = grad + (row * grad_stride + head) // VEC * VEC
        sweep_grad(z_row, z_body, grad_row, grad_body, head, body, g, counted, grads, classes, x, o, BLOCK, VEC, EDGES)


def _launch(
    logits: Tensor, target: Tensor, row_grad: Tensor | None, stats: Tensor | None, grad: Tensor | None,
    options: SoftmaxOptions,
) -> None:  # fmt: skip
    check_shard(logits, target, row_grad, options)
    n, c = logits.shape
    if n == 0:
        return
    x, o = Vectors(options.weight, options.class_bias, options.class_margin), loss_options(options)
    strides = (logits.stride(0),) if grad is None else (logits.stride(0), grad.stride(0))
    arguments = (
        *(logits, target, None if row_grad is None else row_grad.contiguous(), stats, grad, strides[0], strides[-1]),
        *(target.stride(0), n, c, options.ignore_index, x, o),
    )
    every = aligned(logits, grad)
    with on(logits.device):
        if c <= tuning.TILE_CLASSES:
            t = tuning.whole_tile(c, logits.itemsize, strides, every)
            grid = (triton.cdiv(n, t.rows),)
            shard_tile_kernel[grid](*arguments, ROWS=t.rows, BLOCK=t.block, VEC=t.vec, num_warps=t.warps, **COMPILE)
            return
        s = tuning.sweep(c, logits.itemsize, strides, every, False, False, 0)
        constants = {"BLOCK": s.block, "LANES": s.lanes, "VEC": s.vec, "EDGES": s.edges}
        shard_sweep_kernel[(n,)](*arguments, **constants, num_warps=s.warps, **COMPILE)


def softmax_loss_accumulate(
    logits: Tensor, target: Tensor, weight: Tensor | None, class_bias: Tensor | None, class_margin: Tensor | None,
    ignore_index: int, label_smoothing: bool, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    options = SoftmaxOptions(
        *(weight, class_bias, class_margin),
        ignore_index=ignore_index,
        label_smoothing=float(label_smoothing),
        scale=scale,
        softcap=softcap,
    )
    stats = logits.new_empty((logits.shape[0], 5), dtype=torch.float32)
    _launch(logits, target, None, stats, None, options)
    return stats


def _apply_options(
    weight: Tensor | None, class_bias: Tensor | None, ignore_index: int, scale: float, softcap: float
) -> SoftmaxOptions:
    """With label smoothing: a row's S says whether there is some."""
    return SoftmaxOptions(
        weight, class_bias, ignore_index=ignore_index, label_smoothing=1.0, scale=scale, softcap=softcap
    )


def softmax_loss_apply(logits: Tensor, target: Tensor, row_grad: Tensor, *options: Any) -> Tensor:
    grad = logits.new_empty(logits.shape)
    _launch(logits, target, row_grad, None, grad, _apply_options(*options))
    return grad


def softmax_loss_apply_(logits: Tensor, target: Tensor, row_grad: Tensor, *options: Any) -> None:
    _launch(logits, target, row_grad, None, logits, _apply_options(*options))
