"""The softmax family over images [N, C, P] of contiguous pixels: kernels that walk the classes with their stride.

A lane is a pixel, and so is a `row` of softmax_rows; blocks are [classes, pixels]. Outputs, arguments and options
switch as in softmax_loss.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .effective import load_block
from .loss_math import RowStats, combine_lanes, empty_stats
from .softmax_rows import add_block, finish_row, load_row, load_stats, load_target, store_block

INTEGERS = ["stride", "class_stride", "grad_stride", "grad_class_stride", "target_stride", "grad_loss_stride",
            "rows", "classes", "pixels", "ignore_index"]  # fmt: skip


class Place(NamedTuple):
    """Where the pixels of a program lie."""

    row: Any  # of all images
    exists: Any
    image: Any
    pixel: Any


@triton.jit
def place(rows, pixels, PIXELS: tl.constexpr, VEC: tl.constexpr):
    """[1, PIXELS], which may lie in several images. Divided and multiplied, so that the compiler sees multiples."""
    row = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[None, :]
    p = pixels // VEC * VEC
    return Place(row, row < rows // VEC * VEC, row // p, row % p)


@triton.jit
def first_class(matrix, at, stride, VEC: tl.constexpr):
    """Pointers to the pixels' logits, or gradients, of class 0."""
    return matrix + (at.image * (stride // VEC * VEC) + at.pixel)


@triton.jit
def of_class(first, cls, class_stride, VEC: tl.constexpr):
    return first + cls.to(tl.int64) * (class_stride // VEC * VEC)


@triton.jit
def as_row(s, u_g):
    """Stats [PIXELS] as a row's, [1, PIXELS]."""
    return RowStats(s.m[None, :], s.d[None, :], s.t[None, :], u_g, s.U[None, :])


@triton.jit(do_not_specialize=INTEGERS)
def pixel_tile_kernel(
    logits, target, grad_loss, loss, stats, grad, stride, class_stride, grad_stride, grad_class_stride, target_stride,
    grad_loss_stride, rows, classes, pixels, ignore_index, x, o,
    PIXELS: tl.constexpr, CLASSES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Few classes, held in registers: C <= CLASSES.

    grid: ceil(N * P / PIXELS) programs of PIXELS whole pixels. Sweeps: one.
    reads: logits [N, C, P] once; target; per pixel the target's logit and its number of each class vector, the sample
      weight, the upstream gradient (with `grad`), the stats [5, N * P] (without `loss`); class_bias, class_scale,
      class_mitigation and, with label smoothing, weight [C] per program.
    writes: loss [N * P] and stats [5, N * P] (with `loss`); grad [N, C, P] (with `grad`; may be the logits' memory).
    bytes: one pass over the logits, one over the gradient, about 40 per pixel.
    VEC: elements of an access, 4 if P, all strides and all pointers are multiples of 16 bytes, else 1.
    """
    at, apart = place(rows, pixels, PIXELS, VEC), rows.to(tl.int64)
    g, counted = load_target(target + at.row * target_stride, at.exists, classes, ignore_index)
    z = first_class(logits, at, stride, VEC)
    u_g, w_g, v, terms = load_row(of_class(z, g, class_stride, 1), g, at.row, counted, x, o)
    cls = tl.arange(0, CLASSES)[:, None]
    real = cls < classes
    written = real & at.exists
    capped, u = load_block(of_class(z, cls, class_stride, VEC), cls, 0, written, real, terms, x, o, "")
    if loss is not None:
        s = add_block(empty_stats(u_g, PIXELS), u, cls, 0, written, real, g, True, x, o, PIXELS, 1)
        s = as_row(s, u_g)
    else:
        s = load_stats(stats + at.row, apart, counted)
    row_grad = finish_row(
        s, w_g, v, at.row, at.exists, counted, grad_loss, loss, stats + at.row, apart, grad_loss_stride, classes, x, o
    )  # fmt: skip
    if grad is not None:
        u = tl.where(counted, u, float("-inf"))
        capped = tl.where(counted, capped, 0.0)
        to = of_class(first_class(grad, at, grad_stride, VEC), cls, grad_class_stride, VEC)
        store_block(to, cls, 0, written, real, row_grad, capped, u, g, terms, x, o)


@triton.jit(do_not_specialize=INTEGERS)
def pixel_sweep_kernel(
    logits, target, grad_loss, loss, stats, grad, stride, class_stride, grad_stride, grad_class_stride, target_stride,
    grad_loss_stride, rows, classes, pixels, ignore_index, x, o,
    PIXELS: tl.constexpr, CLASSES: tl.constexpr, GROUPS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Many classes, in blocks of CLASSES.

    grid: as pixel_tile_kernel. Sweeps: one for `loss`; one for `grad`, in reverse, so that what the first sweep read
      last is read from cache.
    reads: logits [N, C, P] once per sweep; the rest as pixel_tile_kernel, class vectors once per sweep.
    writes: as pixel_tile_kernel.
    bytes: one pass over the logits per sweep (with both, the second from cache as far as pixels in flight fit there),
      one over the gradient, about 40 per pixel.
    GROUPS of neighbouring classes keep their own stats until the end, as warps read them: no barrier in the loop.
    """
    at, apart = place(rows, pixels, PIXELS, VEC), rows.to(tl.int64)
    g, counted = load_target(target + at.row * target_stride, at.exists, classes, ignore_index)
    z = first_class(logits, at, stride, VEC)
    u_g, w_g, v, terms = load_row(of_class(z, g, class_stride, 1), g, at.row, counted, x, o)
    if loss is not None:
        s = empty_stats(u_g, GROUPS * PIXELS)
        for start in range(0, classes, CLASSES):
            cls = start + tl.arange(0, CLASSES)[:, None]
            real = cls < classes
            mask = real & at.exists
            _, u = load_block(of_class(z, cls, class_stride, VEC), cls, 0, mask, real, terms, x, o, "")
            s = add_block(s, u, cls, 0, mask, real, g, True, x, o, GROUPS * PIXELS, 1)
        groups = RowStats(s.m.reshape(GROUPS, PIXELS), s.d.reshape(GROUPS, PIXELS), s.t.reshape(GROUPS, PIXELS),
                          u_g, s.U.reshape(GROUPS, PIXELS))  # fmt: skip
        s = as_row(combine_lanes(groups), u_g)
    else:
        s = load_stats(stats + at.row, apart, counted)
    row_grad = finish_row(
        s, w_g, v, at.row, at.exists, counted, grad_loss, loss, stats + at.row, apart, grad_loss_stride, classes, x, o
    )  # fmt: skip
    if grad is not None:
        first = first_class(grad, at, grad_stride, VEC)
        last = (tl.cdiv(classes, CLASSES) - 1) * CLASSES
        for done in range(0, classes, CLASSES):
            cls = last - done + tl.arange(0, CLASSES)[:, None]
            real = cls < classes
            written = real & at.exists
            capped, u = load_block(
                of_class(z, cls, class_stride, VEC), cls, 0, written, real, terms, x, o, "evict_first"
            )
            u = tl.where(counted, u, float("-inf"))
            capped = tl.where(counted, capped, 0.0)
            to = of_class(first, cls, grad_class_stride, VEC)
            store_block(to, cls, 0, written, real, row_grad, capped, u, g, terms, x, o)
