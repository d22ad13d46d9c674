"""The sigmoid family in Triton: kernels for rows of contiguous classes and for images of contiguous pixels.

What a kernel computes follows from its outputs: `loss`, `grad`, or both, in one sweep over the logits whichever it is.
Class targets are compared, never expanded. An argument or option that is None is compiled out.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtail.ops import layout
from longtail.options import SigmoidOptions

from . import tuning
from .checks import check_sigmoid_loss
from .launching import COMPILE, aligned, on
from .loss_math import over_lanes_sum
from .sigmoid_elements import At, Row, block, element_options, focus, load_factors, vectors, with_labels
from .sigmoid_labels import pixel_labels, row_labels
from .softmax_pixels import first_class, of_class, place
from .softmax_rows import edges, load_target

INTEGERS = ["stride", "class_stride", "target_stride", "target_class_stride", "grad_stride", "grad_class_stride",
            "grad_loss_stride", "rows", "classes", "pixels", "ignore_index"]  # fmt: skip


@triton.jit
def load_rows(target, grad_loss, target_stride, grad_loss_stride, row, exists, classes, ignore_index, x, o,
              DENSE: tl.constexpr, BY_TARGET: tl.constexpr, UPSTREAMS: tl.constexpr):  # fmt: skip
    g, counted = 0, exists
    if not DENSE:
        g, counted = load_target(target + row * target_stride, exists, classes, ignore_index)
    factor, positive = load_factors(g, row, counted, x, o, DENSE, BY_TARGET)
    upstream = 0.0
    if grad_loss is not None and not UPSTREAMS:
        upstream = tl.load(grad_loss + row * grad_loss_stride, mask=counted, other=0.0)
    rarity = 0.0
    if x.inverse_counts is not None and not DENSE:
        rarity = o.rebalance_beta / tl.load(x.inverse_counts + g, mask=counted, other=1.0)
    return Row(counted, tl.where(counted, g, -1), ignore_index, factor, positive, upstream, rarity)


@triton.jit(do_not_specialize=INTEGERS)
def rows_kernel(
    logits, target, grad_loss, loss, grad, stride, target_stride, grad_stride, grad_loss_stride, rows, classes,
    ignore_index, x, o, GENERAL: tl.constexpr, FOCUS: tl.constexpr,
    DENSE: tl.constexpr, BY_TARGET: tl.constexpr, LOSSES: tl.constexpr, UPSTREAMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr, VEC: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    """Logits [N, C].

    grid: ceil(N / ROWS) programs of ROWS whole rows, in blocks of BLOCK classes. Sweeps: one.
    reads: logits [N, C] once, ignored rows never; target [N], or [N, C] once if DENSE (with inverse_counts twice);
      grad_loss (with `grad`) [N], or [N, C] once if UPSTREAMS; per row its weights; class vectors [C] from cache.
    writes: loss [N], or [N, C] if LOSSES; grad [N, C] (may be the logits' own memory).
    bytes: one pass over each of the matrices named above, about 20 per row.
    A row is its body, whole vectors of VEC elements from its first aligned one on, and, if EDGES, fewer than VEC
    elements at either end: 16-byte accesses for every C. The rows of all matrices are aligned alike; else VEC is 1.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    exists = row < rows
    r = load_rows(target, grad_loss, target_stride, grad_loss_stride, row, exists, classes, ignore_index, x, o,
                  DENSE, BY_TARGET, UPSTREAMS)  # fmt: skip
    head = tl.zeros([ROWS, 1], tl.int32)
    if EDGES:
        head += ((VEC - row * stride % VEC) % VEC).to(tl.int32)
    body = (classes - head) // VEC * VEC
    z_row, grad_row = row * stride, row * grad_stride
    y_row, out_row = row * target_stride, row * classes
    z_body, grad_body = (z_row + head) // VEC * VEC, (grad_row + head) // VEC * VEC
    y_body, out_body = (y_row + head) // VEC * VEC, (out_row + head) // VEC * VEC
    if DENSE and x.inverse_counts is not None:
        r = with_labels(r, row_labels(target + y_row, target + y_body, head, body, classes, exists, ignore_index, x,
                                      ROWS, BLOCK, LANES, RUN, VEC, EDGES), o)  # fmt: skip
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, classes // VEC * VEC, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        at = At(z_body + cols, y_body + cols, grad_body + cols, out_body + cols)
        loaded = (cols < body) & r.counted
        value = block(logits, target, grad_loss, loss, grad, at, r, head + cols, loaded, loaded, (cols < body) & exists,
                      x, o, GENERAL, FOCUS, DENSE, BY_TARGET, LOSSES, UPSTREAMS, False)  # fmt: skip
        total += over_lanes_sum(value.reshape(ROWS * BLOCK // (LANES * RUN), LANES, RUN))
    total = tl.sum(total.reshape(ROWS, LANES // ROWS), 1)[:, None]
    if EDGES:
        cols = edges(head, body, classes, VEC)
        at = At(z_row + cols, y_row + cols, grad_row + cols, out_row + cols)
        loaded = (cols < classes) & r.counted
        value = block(logits, target, grad_loss, loss, grad, at, r, cols, loaded, loaded, (cols < classes) & exists,
                      x, o, GENERAL, FOCUS, DENSE, BY_TARGET, LOSSES, UPSTREAMS, False)  # fmt: skip
        total += tl.sum(value, 1)[:, None]
    if loss is not None and not LOSSES:
        tl.store(loss + row, total, mask=exists)


@triton.jit(do_not_specialize=INTEGERS)
def pixels_kernel(
    logits, target, grad_loss, loss, grad, stride, class_stride, target_stride, target_class_stride, grad_stride,
    grad_class_stride, grad_loss_stride, rows, classes, pixels, ignore_index, x, o, GENERAL: tl.constexpr,
    FOCUS: tl.constexpr, DENSE: tl.constexpr, BY_TARGET: tl.constexpr, LOSSES: tl.constexpr, UPSTREAMS: tl.constexpr,
    PIXELS: tl.constexpr, CLASSES: tl.constexpr, GROUPS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Logits [N, C, P], P = `pixels`; `rows` = N * P.

    grid: ceil(N * P / PIXELS) programs of PIXELS pixels, which may lie in several images. Sweeps: one, over the
      classes, CLASSES of them at a time.
    reads, writes, bytes: as rows_kernel, with N * P rows.
    VEC: elements in 16 bytes if P, all strides and all pointers are multiples of them, else 1. GROUPS of neighbouring
    classes are summed apart until the end, as warps read them, so that the loop needs no barrier; each sum makes up for
    the rounding of the one before, lest those of thousands of equal losses add up.
    """
    here = place(rows, pixels, PIXELS, VEC)
    row, exists, p = here.row, here.exists, pixels // VEC * VEC
    r = load_rows(target, grad_loss, target_stride, grad_loss_stride, row, exists, classes, ignore_index, x, o,
                  DENSE, BY_TARGET, UPSTREAMS)  # fmt: skip
    z_image, y_image = first_class(0, here, stride, VEC), first_class(0, here, target_stride, VEC)
    grad_image, out_image = first_class(0, here, grad_stride, VEC), first_class(0, here, classes.to(tl.int64) * p, VEC)
    if DENSE and x.inverse_counts is not None:
        r = with_labels(r, pixel_labels(target + y_image, target_class_stride, classes, exists, ignore_index, x,
                                        PIXELS, CLASSES, VEC), o)  # fmt: skip
    total = tl.zeros([GROUPS * PIXELS], tl.float32)
    lost = total  # what the last sum was rounded by
    for start in range(0, classes, CLASSES):
        cls = start + tl.arange(0, CLASSES)[:, None]
        at = At(of_class(z_image, cls, class_stride, VEC), of_class(y_image, cls, target_class_stride, VEC),
                of_class(grad_image, cls, grad_class_stride, VEC), of_class(out_image, cls, p, VEC))  # fmt: skip
        real = cls < classes
        value = block(logits, target, grad_loss, loss, grad, at, r, cls, real, real & exists, real & exists,
                      x, o, GENERAL, FOCUS, DENSE, BY_TARGET, LOSSES, UPSTREAMS, not DENSE)  # fmt: skip
        if loss is not None and not LOSSES:
            added = over_lanes_sum(value.reshape(CLASSES // GROUPS, GROUPS * PIXELS, 1)) - lost
            summed = total + added
            lost = tl.where(tl.abs(summed) < float("inf"), summed - total - added, 0.0)
            total = summed
    if loss is not None and not LOSSES:
        tl.store(loss + row, tl.sum(total.reshape(GROUPS, PIXELS), 0)[None, :], mask=exists)


def _launch(
    logits: Tensor, target: Tensor, grad_loss: Tensor | None, loss: Tensor | None, grad: Tensor | None,
    options: SigmoidOptions,
) -> None:  # fmt: skip
    check_sigmoid_loss(logits, target, grad_loss, options)
    if logits.numel() == 0:
        if loss is not None:
            loss.zero_()
        return
    dense = target.is_floating_point()
    losses = loss is not None and loss.dim() == logits.dim()
    upstreams = grad_loss is not None and grad_loss.dim() == logits.dim()
    ignore_index = options.ignore_index
    ignored = float(ignore_index) if dense and ignore_index is not None else ignore_index
    x, o = vectors(options), element_options(options)
    written = logits if grad is None else grad
    grad_loss_stride = 0 if grad_loss is None else grad_loss.stride(0)
    tensors = [logits, written, *([target] if dense else [])]
    tensors += [x for x in (loss, grad_loss) if x is not None and x.dim() == logits.dim()]
    general = not options.is_plain
    every, heavy = aligned(*tensors), dense or general or grad is not None
    what = {
        "GENERAL": general, "FOCUS": focus(options, dense), "DENSE": dense,
        "BY_TARGET": options.class_weight_by_target, "LOSSES": losses, "UPSTREAMS": upstreams,
    }  # fmt: skip
    n, c = logits.shape[:2]
    matrices = (logits, target, grad_loss, loss, grad)
    with on(logits.device):
        if logits.dim() == 2:
            t = tuning.element_rows(c, logits.itemsize, tuple(x.stride(0) for x in tensors), every, heavy)
            strides = (logits.stride(0), target.stride(0), written.stride(0), grad_loss_stride)
            rows_kernel[(triton.cdiv(n, t.rows),)](
                *matrices, *strides, n, c, ignored, x, o, **what, ROWS=t.rows, BLOCK=t.block, LANES=t.lanes, RUN=t.run,
                VEC=t.vec, EDGES=t.edges, num_warps=t.warps, **COMPILE,
            )  # fmt: skip
            return
        apart = tuple(s for x in tensors for s in x.stride()[:2])
        p = tuning.element_pixels(c, logits.shape[2], logits.itemsize, apart, every, heavy)
        rows = layout.row_count(logits)
        pixels_kernel[(triton.cdiv(rows, p.pixels),)](
            *matrices, *logits.stride()[:2], target.stride(0), target.stride(1) if dense else 0,
            *written.stride()[:2], grad_loss_stride, rows, c, logits.shape[2], ignored, x, o, **what,
            PIXELS=p.pixels, CLASSES=p.classes, GROUPS=p.groups, VEC=p.vec, num_warps=p.warps, **COMPILE,
        )  # fmt: skip


def _new_loss(logits: Tensor, elementwise: bool) -> Tensor:
    shape = logits.shape if elementwise else (layout.row_count(logits),)
    return logits.new_empty(shape, dtype=torch.float32)


def sigmoid_loss(logits: Tensor, target: Tensor, *arguments: Any) -> Tensor:
    *options, elementwise = arguments
    loss = _new_loss(logits, elementwise)
    _launch(logits, target, None, loss, None, SigmoidOptions(*options))
    return loss


def sigmoid_loss_backward(grad_loss: Tensor, logits: Tensor, target: Tensor, *options: Any) -> Tensor:
    grad = logits.new_empty(logits.shape)
    _launch(logits, target, grad_loss, None, grad, SigmoidOptions(*options))
    return grad


def sigmoid_loss_and_grad(grad_loss: Tensor, logits: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *options, elementwise = arguments
    loss, grad = _new_loss(logits, elementwise), logits.new_empty(logits.shape)
    _launch(logits, target, grad_loss, loss, grad, SigmoidOptions(*options))
    return loss, grad


def sigmoid_loss_and_grad_(grad_loss: Tensor, logits: Tensor, target: Tensor, *arguments: Any) -> Tensor:
    *options, elementwise = arguments
    loss = _new_loss(logits, elementwise)
    _launch(logits, target, grad_loss, loss, logits, SigmoidOptions(*options))
    return loss
