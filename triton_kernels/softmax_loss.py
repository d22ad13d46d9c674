"""The softmax family in Triton: kernels for rows held in registers and for rows swept in blocks, and all launchers.

What a kernel computes follows from its outputs: `loss` asks for losses and statistics, `grad` for the gradient, both
for the two in one launch. Of a SHARD of the classes `stats` alone asks for its statistics, `grad` with `row_grad` for
its gradient; targets may then be -1, in another shard, and `target_terms` say what a row's class brings to the others.
An argument or option that is None is compiled out; numbers are read at run time.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtail.ops import layout
from longtail.options import SoftmaxOptions

from . import tuning
from .checks import check_loss
from .effective import load_block
from .launching import COMPILE, aligned, on
from .loss_math import LossOptions, RowStats, Vectors, combine, empty_stats, loss_options, vectors
from .softmax_dense import launch_dense
from .softmax_pixels import pixel_sweep_kernel, pixel_tile_kernel
from .softmax_rows import (
    add_block,
    edges,
    finish_row,
    load_row,
    load_row_grad,
    load_shard_row,
    load_shard_target,
    load_stats,
    load_target,
    store_block,
    store_shard_stats,
    sweep_grad,
    sweep_stats,
)

INTEGERS = ["stride", "grad_stride", "target_stride", "grad_loss_stride", "rows", "classes", "ignore_index"]
UNALIGNED = ["target", "grad_loss", "target_terms", "row_grad", "loss", "stats"]


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def tile_kernel(
    logits, target, grad_loss, target_terms, row_grad, loss, stats, grad, stride, grad_stride, target_stride,
    grad_loss_stride, rows, classes, ignore_index, x, o,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr, SHARD: tl.constexpr,
):  # fmt: skip
    """Short rows, held in registers: C <= BLOCK.

    grid: ceil(N / ROWS) programs of ROWS whole rows. Sweeps: one.
    reads: logits [N, C] once, ignored rows never; target; per row the target's logit and its number of each
      class vector, the sample weight, the upstream gradient (with `grad`), the stats [N, 5] (without `loss`), or of a
      SHARD row_grad [N, 5] and target_terms [N, 3] in the place of all these; class_bias, class_scale, class_mitigation
      and, with label smoothing, weight [C] per row, from cache.
    writes: loss [N] (with `loss`) and stats [N, 5] (with `loss`, or without `grad`); grad [N, C] (with `grad`; may be
      the logits' own memory).
    bytes: one pass over the logits, one over the gradient, about 40 per row.
    Bodies and edges of rows, VEC: as sweep_kernel.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    exists = row < rows
    z_row = logits + row * stride
    if SHARD:
        g, counted = load_shard_target(target + row * target_stride, exists, classes, ignore_index)
        u_g, w_g, terms = load_shard_row(z_row, g, row, counted, target_terms, x, o, row_grad is not None)
    else:
        g, counted = load_target(target + row * target_stride, exists, classes, ignore_index)
        u_g, w_g, v, terms = load_row(z_row + g, g, row, counted, x, o)
    head = tl.zeros([ROWS, 1], tl.int32)
    if EDGES:
        head += ((VEC - row * stride % VEC) % VEC).to(tl.int32)
    body = (classes - head) // VEC * VEC
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (cols < body) & counted
    z_body = logits + (row * stride + head) // VEC * VEC
    capped, u = load_block(z_body + cols, cols, head, mask, mask, terms, x, o, "")
    if EDGES:
        edge = edges(head, body, classes, VEC)
        at_edge = (edge < classes) & counted
        capped_edge, u_edge = load_block(z_row + edge, edge, 0, at_edge, at_edge, terms, x, o, "")
    if loss is not None or grad is None:
        s = add_block(empty_stats(u_g, ROWS), u, cols, head, mask, mask, g, True, x, o, ROWS, BLOCK)
        if EDGES:
            ends = empty_stats(u_g, ROWS)
            s = combine(s, add_block(ends, u_edge, edge, 0, at_edge, at_edge, g, True, x, o, ROWS, 2 * VEC))
        s = RowStats(s.m[:, None], s.d[:, None], s.t[:, None], u_g, s.U[:, None])
    elif not SHARD:
        s = load_stats(stats + row * 5, 1, counted)
    if not SHARD:
        grads = finish_row(
            s, w_g, v, row, exists, counted, grad_loss, loss, stats + row * 5, 1, grad_loss_stride, classes, x, o
        )  # fmt: skip
    elif grad is not None:
        grads = load_row_grad(row_grad + row * 5, counted)
    else:
        store_shard_stats(stats + row * 5, s, g, w_g, exists, counted, o)
    if grad is not None:
        written = (cols < body) & exists
        grad_body = grad + (row * grad_stride + head) // VEC * VEC
        store_block(grad_body + cols, cols, head, written, written, grads, capped, u, g, terms, x, o)
        if EDGES:
            written_edge, to = (edge < classes) & exists, grad + row * grad_stride + edge
            store_block(to, edge, 0, written_edge, written_edge, grads, capped_edge, u_edge, g, terms, x, o)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def sweep_kernel(
    logits, target, grad_loss, target_terms, row_grad, loss, stats, grad, stride, grad_stride, target_stride,
    grad_loss_stride, rows, classes, ignore_index, x, o,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr, SHARD: tl.constexpr,
):  # fmt: skip
    """Long rows, in blocks of BLOCK classes.

    grid: N programs of one row. Sweeps: one for `loss`; one for `grad`, in reverse, so that what the first sweep read
      last is read from cache.
    reads: logits [N, C] once per sweep, ignored rows never; the rest as tile_kernel.
    writes: as tile_kernel.
    bytes: one pass over the logits per sweep (with both, the second from cache as far as rows in flight fit there),
      one over the gradient, about 40 per row.
    A row is its body, whole vectors of VEC elements from its first aligned one on, and, if EDGES, fewer than VEC
    elements at either end: 16-byte accesses for every C. `grad` rows must be aligned as the logits'; else VEC is 1.
    """
    row = tl.program_id(0).to(tl.int64)
    if loss is None and grad is not None:
        row = rows - 1 - row  # the rows that the forward pass read last may still be in the L2 cache
    z_row = logits + row * stride
    if SHARD:
        g, counted = load_shard_target(target + row * target_stride, row < rows, classes, ignore_index)
        u_g, w_g, terms = load_shard_row(z_row, g, row, counted, target_terms, x, o, row_grad is not None)
    else:
        g, counted = load_target(target + row * target_stride, row < rows, classes, ignore_index)
        u_g, w_g, v, terms = load_row(z_row + g, g, row, counted, x, o)
    head = 0
    if EDGES:
        head = ((VEC - row * stride % VEC) % VEC).to(tl.int32)
    body = (classes - head) // VEC * VEC
    z_body = logits + (row * stride + head) // VEC * VEC
    if loss is not None or grad is None:
        s = sweep_stats(z_row, z_body, head, body, g, counted, u_g, classes, terms, x, o, BLOCK, LANES, VEC, EDGES)
    elif not SHARD:
        s = load_stats(stats + row * 5, 1, counted)
    if not SHARD:
        grads = finish_row(
            s, w_g, v, row, row < rows, counted, grad_loss, loss, stats + row * 5, 1, grad_loss_stride, classes, x, o
        )  # fmt: skip
    elif grad is not None:
        grads = load_row_grad(row_grad + row * 5, counted)
    else:
        store_shard_stats(stats + row * 5, s, g, w_g, row < rows, counted, o)
    if grad is not None:
        grad_row = grad + row * grad_stride
        grad_body = grad + (row * grad_stride + head) // VEC * VEC
        sweep_grad(
            z_row, z_body, grad_row, grad_body, head, body, g, counted, grads, classes, terms, x, o, BLOCK, VEC, EDGES
        )  # fmt: skip


def _launch(
    logits: Tensor, target: Tensor, grad_loss: Tensor | None, loss: Tensor | None, stats: Tensor,
    grad: Tensor | None, options: SoftmaxOptions,
) -> None:  # fmt: skip
    check_loss(logits, target, grad_loss, stats, options)
    if target.numel() == 0:
        return
    x, o = vectors(options), loss_options(options)
    tensors = (logits, target, grad_loss, None, None, loss, stats, grad)
    heavy = tuning.is_heavy(options)
    with on(logits.device):
        if logits.dim() == 2:
            launch_rows(tensors, options.ignore_index, x, o, heavy)
        else:
            _launch_pixels(tensors[:3] + tensors[5:], options.ignore_index, x, o, heavy)


def launch_rows(
    tensors: tuple[Any, ...], ignore_index: int, x: Vectors, o: LossOptions, heavy: bool, shard: bool = False
) -> None:
    """``tensors``: logits [N, C] and what else the kernels take first."""
    logits, target, grad_loss, _, _, loss, _, grad = tensors
    n, c = logits.shape
    strides = (logits.stride(0),) if grad is None else (logits.stride(0), grad.stride(0))
    arguments = (
        *(*tensors, strides[0], strides[-1], target.stride(0)),
        *(0 if grad_loss is None else grad_loss.stride(0), n, c, ignore_index, x, o),
    )
    every = aligned(logits, grad)
    if c <= tuning.TILE_CLASSES:
        t = tuning.tile(c, logits.itemsize, strides, every)
        constants = {"ROWS": t.rows, "BLOCK": t.block, "VEC": t.vec, "EDGES": t.edges, "SHARD": shard}
        tile_kernel[(triton.cdiv(n, t.rows),)](*arguments, **constants, num_warps=t.warps, **COMPILE)
        return
    twice, cache = loss is not None and grad is not None, tuning.cache_per_processor(logits.device)
    s = tuning.sweep(c, logits.itemsize, strides, every, twice, heavy, cache)
    constants = {"BLOCK": s.block, "LANES": s.lanes, "VEC": s.vec, "EDGES": s.edges, "SHARD": shard}
    sweep_kernel[(n,)](*arguments, **constants, num_warps=s.warps, **COMPILE)


def _launch_pixels(tensors: tuple[Any, ...], ignore_index: int, x: Vectors, o: LossOptions, heavy: bool) -> None:
    logits, target, grad_loss, loss, _, grad = tensors
    _, c, pixels = logits.shape
    written = logits if grad is None else grad
    strides, rows = (*logits.stride()[:2], *written.stride()[:2]), layout.row_count(logits)
    arguments = (
        *(*tensors, *strides, target.stride(0), 0 if grad_loss is None else grad_loss.stride(0)),
        *(rows, c, pixels, ignore_index, x, o),
    )
    vec = tuning.pixel_vector(logits.itemsize, pixels, strides, aligned(logits, grad))
    if c <= tuning.TILE_PIXEL_CLASSES:
        p = tuning.pixel_tile(c, vec)
        grid, constants = (triton.cdiv(rows, p.pixels),), {"PIXELS": p.pixels, "CLASSES": p.classes, "VEC": p.vec}
        pixel_tile_kernel[grid](*arguments, **constants, num_warps=p.warps, **COMPILE)
        return
    twice, cache = loss is not None and grad is not None, tuning.cache_per_processor(logits.device)
    p = tuning.pixel_sweep(c, logits.itemsize, vec, twice, heavy, cache)
    constants = {"PIXELS": p.pixels, "CLASSES": p.classes, "GROUPS": p.groups, "VEC": p.vec}
    pixel_sweep_kernel[(triton.cdiv(rows, p.pixels),)](*arguments, **constants, num_warps=p.warps, **COMPILE)


def _new_loss(logits: Tensor) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty((layout.row_count(logits),), dtype=torch.float32)
    return loss, layout.stats_like(logits, torch.float32)


def _as_written(stats: Tensor, logits: Tensor) -> Tensor:
    """Statistics as ``layout.stats_like`` lays them out."""
    return stats.contiguous() if logits.dim() == 2 else stats.t().contiguous().t()


def softmax_loss(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    loss, stats = _new_loss(logits)
    launch = launch_dense if target.is_floating_point() else _launch
    launch(logits, target, None, loss, stats, None, SoftmaxOptions(*options))
    return loss, stats


def softmax_loss_backward(grad_loss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, *options: Any) -> Tensor:
    grad = logits.new_empty(logits.shape)
    launch = launch_dense if target.is_floating_point() else _launch
    launch(logits, target, grad_loss, None, _as_written(stats, logits), grad, SoftmaxOptions(*options))
    return grad


def softmax_loss_and_grad(
    grad_loss: Tensor, logits: Tensor, target: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss, stats = _new_loss(logits)
    grad = logits.new_empty(logits.shape)
    _launch(logits, target, grad_loss, loss, stats, grad, SoftmaxOptions(*options))
    return loss, stats, grad


def softmax_loss_and_grad_(grad_loss: Tensor, logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    loss, stats = _new_loss(logits)
    _launch(logits, target, grad_loss, loss, stats, logits, SoftmaxOptions(*options))
    return loss, stats
