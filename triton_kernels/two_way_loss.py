"""ZLPR and the two-way loss in Triton: kernels for rows of contiguous classes and for images of contiguous pixels.

What a kernel computes follows from its outputs: `loss` asks for losses and statistics, `grad` for the gradient, both
for the two in one launch, which sweeps twice. Class targets are compared, never expanded. An argument or option that is
None is compiled out; temperatures are read at run time.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtail.ops import layout
from longtail.options import TwoWayOptions

from . import tuning
from .checks import check_two_way_loss
from .launching import COMPILE, aligned, on
from .softmax_pixels import first_class, of_class, place
from .softmax_rows import edges
from .two_way_elements import Sums, add_block, finish_row, load_block, load_row, store_block, vectors
from .two_way_math import Side, combine_side, empty_side, join_sides, temperatures

INTEGERS = ["stride", "class_stride", "target_stride", "target_class_stride", "grad_stride", "grad_class_stride",
            "grad_loss_stride", "rows", "classes", "pixels", "ignore_index"]  # fmt: skip
UNALIGNED = ["grad_loss", "loss", "stats"]


@triton.jit
def empty_sums(LANES: tl.constexpr):
    return Sums(empty_side(LANES), empty_side(LANES), tl.zeros([LANES], tl.float32))


@triton.jit
def over_axis(s, t, A: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr):
    """Sums [A * B] as [A, B], joined along an axis."""
    n = Side(s.negative.m.reshape(A, B), s.negative.d.reshape(A, B))
    p = Side(s.positive.m.reshape(A, B), s.positive.d.reshape(A, B))
    n, p = combine_side(n, t.inverse_negative, AXIS), combine_side(p, t.inverse_positive, AXIS)
    return Sums(n, p, tl.max(s.any.reshape(A, B), AXIS))


@triton.jit
def as_rows(s, AXIS: tl.constexpr):
    """Sums [ROWS] with another axis."""
    n = Side(tl.expand_dims(s.negative.m, AXIS), tl.expand_dims(s.negative.d, AXIS))
    p = Side(tl.expand_dims(s.positive.m, AXIS), tl.expand_dims(s.positive.d, AXIS))
    return Sums(n, p, tl.expand_dims(s.any, AXIS))


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def two_way_rows_kernel(
    logits, target, grad_loss, loss, stats, grad, stride, target_stride, grad_stride, grad_loss_stride, rows, classes,
    ignore_index, x, t, DENSE: tl.constexpr, JOINT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr, VEC: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    """Logits [N, C].

    grid: ceil(N / ROWS) programs of ROWS whole rows, in blocks of BLOCK classes. Sweeps: one for `loss`; one for
      `grad`, in reverse, so that what the first sweep read last is read from cache.
    reads: logits [N, C] once per sweep, ignored rows never; target [N], or [N, C] once per sweep if DENSE; per row the
      target's logit (of a class), the sample weight, the upstream gradient (with `grad`), the stats [N, 4] (without
      `loss`); class_bias [C] per row, from cache.
    writes: loss [N] and stats [N, 4] (with `loss`); grad [N, C] (with `grad`; may be the logits' own memory).
    bytes: one pass per sweep over each of the matrices that it reads, one over the gradient, about 40 per row.
    Bodies and edges of rows, VEC: as the rows of the sigmoid family.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    exists = row < rows
    z_row, y_row, grad_row = row * stride, row * target_stride, row * grad_stride
    r = load_row(logits, target + y_row, z_row, 1, row, exists, classes, ignore_index, x, DENSE)
    head = tl.zeros([ROWS, 1], tl.int32)
    if EDGES:
        head += ((VEC - row * stride % VEC) % VEC).to(tl.int32)
    body = (classes - head) // VEC * VEC
    z_body, y_body = (z_row + head) // VEC * VEC, (y_row + head) // VEC * VEC
    grad_body = (grad_row + head) // VEC * VEC
    s = empty_sums(ROWS)
    if loss is not None:
        lanes = empty_sums(LANES)
        for start in range(0, classes // VEC * VEC, BLOCK):
            cols = start + tl.arange(0, BLOCK)[None, :]
            mask = (cols < body) & r.counted
            b = load_block(logits, target, z_body + cols, y_body + cols, head + cols, mask, mask, r.hot,
                           ignore_index, x, DENSE, "")  # fmt: skip
            lanes = add_block(lanes, b, t, DENSE, LANES, RUN)
        s = over_axis(lanes, t, ROWS, LANES // ROWS, 1)
        if EDGES:
            edge = edges(head, body, classes, VEC)
            at_edge = (edge < classes) & r.counted
            of_edge = load_block(logits, target, z_row + edge, y_row + edge, edge, at_edge, at_edge, r.hot,
                                 ignore_index, x, DENSE, "")  # fmt: skip
            ends = add_block(empty_sums(ROWS), of_edge, t, DENSE, ROWS, 2 * VEC)
            negative = join_sides(s.negative, ends.negative, t.inverse_negative)
            positive = join_sides(s.positive, ends.positive, t.inverse_positive)
            s = Sums(negative, positive, tl.maximum(s.any, ends.any))
    n, p, counted = finish_row(as_rows(s, 1), r, row, grad_loss, grad_loss_stride, loss, stats, None, t, x, DENSE,
                               JOINT)  # fmt: skip
    if grad is not None:
        last = (tl.cdiv(classes // VEC * VEC, BLOCK) - 1) * BLOCK
        for done in range(0, classes // VEC * VEC, BLOCK):
            cols = last - done + tl.arange(0, BLOCK)[None, :]
            mask = (cols < body) & counted
            b = load_block(logits, target, z_body + cols, y_body + cols, head + cols, mask, mask, r.hot,
                           ignore_index, x, DENSE, "evict_first")  # fmt: skip
            store_block(grad + grad_body + cols, b, head + cols, (cols < body) & exists, n, p, r, counted, t, DENSE)
        if EDGES:
            edge = edges(head, body, classes, VEC)
            at_edge = (edge < classes) & counted
            of_edge = load_block(logits, target, z_row + edge, y_row + edge, edge, at_edge, at_edge, r.hot,
                                 ignore_index, x, DENSE, "evict_first")  # fmt: skip
            written = (edge < classes) & exists
            store_block(grad + grad_row + edge, of_edge, edge, written, n, p, r, counted, t, DENSE)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def two_way_pixels_kernel(
    logits, target, grad_loss, loss, stats, grad, stride, class_stride, target_stride, target_class_stride, grad_stride,
    grad_class_stride, grad_loss_stride, rows, classes, pixels, ignore_index, x, t,
    DENSE: tl.constexpr, JOINT: tl.constexpr,
    PIXELS: tl.constexpr, CLASSES: tl.constexpr, GROUPS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Logits [N, C, P], P = `pixels`; `rows` = N * P.

    grid: ceil(N * P / PIXELS) programs of PIXELS pixels, which may lie in several images. Sweeps: as
      two_way_rows_kernel, over the classes, CLASSES of them at a time.
    reads, writes, bytes: as two_way_rows_kernel, with N * P rows, and stats [4, N * P].
    VEC: elements in 16 bytes if P, all strides and all pointers are multiples of them, else 1. GROUPS of neighbouring
    classes keep their own sums until the end, as warps read them, so that the loop needs no barrier.
    """
    here, apart = place(rows, pixels, PIXELS, VEC), rows.to(tl.int64)
    row, exists = here.row, here.exists
    z_image, y_image = first_class(0, here, stride, VEC), first_class(0, here, target_stride, VEC)
    grad_image = first_class(0, here, grad_stride, VEC)
    r = load_row(logits, target + row * target_stride, z_image, class_stride.to(tl.int64), row, exists, classes,
                 ignore_index, x, DENSE)  # fmt: skip
    s = empty_sums(PIXELS)
    if loss is not None:
        lanes = empty_sums(GROUPS * PIXELS)
        for start in range(0, classes, CLASSES):
            cls = start + tl.arange(0, CLASSES)[:, None]
            real = cls < classes
            b = load_block(logits, target, of_class(z_image, cls, class_stride, VEC),
                           of_class(y_image, cls, target_class_stride, VEC), cls, real & exists, real, r.hot,
                           ignore_index, x, DENSE, "")  # fmt: skip
            lanes = add_block(lanes, b, t, DENSE, GROUPS * PIXELS, 1)
        s = over_axis(lanes, t, GROUPS, PIXELS, 0)
    n, p, counted = finish_row(as_rows(s, 0), r, row, grad_loss, grad_loss_stride, loss, stats, apart, t, x, DENSE,
                               JOINT)  # fmt: skip
    if grad is not None:
        last = (tl.cdiv(classes, CLASSES) - 1) * CLASSES
        for done in range(0, classes, CLASSES):
            cls = last - done + tl.arange(0, CLASSES)[:, None]
            real = cls < classes
            b = load_block(logits, target, of_class(z_image, cls, class_stride, VEC),
                           of_class(y_image, cls, target_class_stride, VEC), cls, real & exists, real, r.hot,
                           ignore_index, x, DENSE, "evict_first")  # fmt: skip
            to = grad + of_class(grad_image, cls, grad_class_stride, VEC)
            store_block(to, b, cls, real & exists, n, p, r, counted, t, DENSE)


def _launch(
    logits: Tensor, target: Tensor, grad_loss: Tensor | None, loss: Tensor | None, stats: Tensor,
    grad: Tensor | None, options: TwoWayOptions,
) -> None:  # fmt: skip
    check_two_way_loss(logits, target, grad_loss, stats, options)
    if logits.numel() == 0:
        if loss is not None:
            loss.zero_()
            stats.zero_()
        return
    dense, ignored = target.is_floating_point(), options.ignore_index
    ignore_index = float(ignored) if dense and ignored is not None else ignored
    x, t = vectors(options), temperatures(options)
    written = logits if grad is None else grad
    grad_loss_stride = 0 if grad_loss is None else grad_loss.stride(0)
    tensors = [logits, written, *([target] if dense else [])]
    every, what = aligned(*tensors), {"DENSE": dense, "JOINT": options.joint}
    n, c = logits.shape[:2]
    matrices = (logits, target, grad_loss, loss, stats, grad)
    with on(logits.device):
        if logits.dim() == 2:
            a = tuning.element_rows(c, logits.itemsize, tuple(x.stride(0) for x in tensors), every, True)
            strides = (logits.stride(0), target.stride(0), written.stride(0), grad_loss_stride)
            two_way_rows_kernel[(triton.cdiv(n, a.rows),)](
                *matrices, *strides, n, c, ignore_index, x, t, **what, ROWS=a.rows, BLOCK=a.block, LANES=a.lanes,
                RUN=a.run, VEC=a.vec, EDGES=a.edges, num_warps=a.warps, **COMPILE,
            )  # fmt: skip
            return
        apart = tuple(s for x in tensors for s in x.stride()[:2])
        vec = tuning.pixel_vector(logits.itemsize, logits.shape[2], apart, every)
        twice, cache = loss is not None and grad is not None, tuning.cache_per_processor(logits.device)
        p = tuning.two_way_pixels(c, logits.itemsize, vec, twice, dense, cache)
        rows = layout.row_count(logits)
        two_way_pixels_kernel[(triton.cdiv(rows, p.pixels),)](
            *matrices, *logits.stride()[:2], target.stride(0), target.stride(1) if dense else 0,
            *written.stride()[:2], grad_loss_stride, rows, c, logits.shape[2], ignore_index, x, t, **what,
            PIXELS=p.pixels, CLASSES=p.classes, GROUPS=p.groups, VEC=p.vec, num_warps=p.warps, **COMPILE,
        )  # fmt: skip


def _new_loss(logits: Tensor) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty((layout.row_count(logits),), dtype=torch.float32)
    return loss, layout.stats_like(logits, torch.float32, 4)


def two_way_loss(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    loss, stats = _new_loss(logits)
    _launch(logits, target, None, loss, stats, None, TwoWayOptions(*options))
    return loss, stats


def two_way_loss_backward(grad_loss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, *options: Any) -> Tensor:
    grad = logits.new_empty(logits.shape)
    stats = stats.contiguous() if logits.dim() == 2 else stats.t().contiguous().t()
    _launch(logits, target, grad_loss, None, stats, grad, TwoWayOptions(*options))
    return grad


def two_way_loss_and_grad(
    grad_loss: Tensor, logits: Tensor, target: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    loss, stats = _new_loss(logits)
    grad = logits.new_empty(logits.shape)
    _launch(logits, target, grad_loss, loss, stats, grad, TwoWayOptions(*options))
    return loss, stats, grad


def two_way_loss_and_grad_(grad_loss: Tensor, logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    loss, stats = _new_loss(logits)
    _launch(logits, target, grad_loss, loss, stats, logits, TwoWayOptions(*options))
    return loss, stats
