"""Gradients made in forward, times the upstream gradient: kernels for rows and for images, and their launcher."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from longtail.ops import layout

from . import tuning
from .checks import check_factor, check_layout, check_target
from .launching import COMPILE, aligned, on
from .softmax_pixels import first_class, of_class, place

INTEGERS = ["stride", "class_stride", "factor_stride", "target_stride", "ignore_index", "rows", "classes", "pixels"]


@triton.jit
def load_factor(factor, target, factor_stride, target_stride, ignore_index, row, exists):
    """What multiplies each row: 1 where the target is ignored, whatever the upstream gradient."""
    f = tl.load(factor + row * factor_stride, mask=exists, other=1.0)
    if target is not None:
        g = tl.load(target + row * target_stride, mask=exists & (f != 1.0), other=ignore_index)
        f = tl.where(g == ignore_index, 1.0, f)
    return f


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["factor", "target"])
def scale_rows_kernel(
    grad, factor, target, stride, factor_stride, target_stride, ignore_index, rows, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Multiplies the rows of grad [N, C] by factor [N], in place.

    grid: ceil(N / ROWS) programs of ROWS rows. Sweeps: one, or none where all the factors are 1.
    reads: factor [N] (one number again and again if its stride is 0); target [N] where the factor is not 1; grad
    [N, C] once unless the factors are 1.
    writes: grad, likewise. VEC: elements in 16 bytes if C, the stride and the pointer are multiples
    of them, else 1.
    bytes: 4 per row where the factors are 1, else two passes over grad.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    f = load_factor(factor, target, factor_stride, target_stride, ignore_index, row, row < rows)
    if tl.max(tl.where(f == 1.0, 0, 1)) != 0:
        grad_row = grad + row * stride // VEC * VEC
        for start in range(0, classes, BLOCK):
            cols = start + tl.arange(0, BLOCK)[None, :]
            mask = (cols < classes // VEC * VEC) & (row < rows)
            scaled = tl.load(grad_row + cols, mask=mask, other=0.0).to(tl.float32) * f
            tl.store(grad_row + cols, scaled.to(grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["factor", "target"])
def scale_pixels_kernel(
    grad, factor, target, stride, class_stride, factor_stride, target_stride, ignore_index, rows, classes, pixels,
    PIXELS: tl.constexpr, CLASSES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Multiplies the pixels of grad [N, C, P] by factor [N * P], in place.

    grid: ceil(N * P / PIXELS) programs. Sweeps: one, or none where all the factors are 1.
    reads: factor (one number again and again if its stride is 0); target where it is not 1; grad once unless the
    factors are 1.
    writes: grad, likewise. VEC: as pixel_tile_kernel.
    bytes: 4 per pixel where the factors are 1, else two passes over grad.
    """
    at = place(rows, pixels, PIXELS, VEC)
    f = load_factor(factor, target, factor_stride, target_stride, ignore_index, at.row, at.exists)
    if tl.max(tl.where(f == 1.0, 0, 1)) != 0:
        first = first_class(grad, at, stride, VEC)
        for start in range(0, classes, CLASSES):
            cls = start + tl.arange(0, CLASSES)[:, None]
            to = of_class(first, cls, class_stride, VEC)
            mask = (cls < classes) & at.exists
            scaled = tl.load(to, mask=mask, other=0.0).to(tl.float32) * f
            tl.store(to, scaled.to(grad.dtype.element_ty), mask=mask)


def scale_grad_(grad: Tensor, grad_loss: Tensor, target: Tensor | None, ignore_index: int) -> None:
    check_layout("grad", grad)
    check_factor("grad_loss", grad_loss, grad)
    if target is not None:
        check_target(target, grad)
    if grad.numel() == 0:
        return
    c, every, factor_stride = grad.shape[1], aligned(grad), grad_loss.stride(0)
    rows, target_stride = layout.row_count(grad), 0 if target is None else target.stride(0)
    with on(grad.device):
        if grad.dim() == 2:
            t = tuning.scaling(c, grad.itemsize, grad.stride(0), every)
            scale_rows_kernel[(triton.cdiv(rows, t.rows),)](
                grad, grad_loss, target, grad.stride(0), factor_stride, target_stride, ignore_index, rows, c,
                ROWS=t.rows, BLOCK=t.block, VEC=t.vec, num_warps=t.warps, **COMPILE,
            )  # fmt: skip
            return
        p = tuning.element_pixels(c, grad.shape[2], grad.itemsize, grad.stride()[:2], every, False)
        scale_pixels_kernel[(triton.cdiv(rows, p.pixels),)](
            grad, grad_loss, target, *grad.stride()[:2], factor_stride, target_stride, ignore_index, rows, c,
            grad.shape[2],
            PIXELS=p.pixels, CLASSES=p.classes, VEC=p.vec, num_warps=p.warps, **COMPILE,
        )  # fmt: skip
