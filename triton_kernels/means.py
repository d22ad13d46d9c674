"""What a mean over rows takes beside the losses: what it divides by, and the division.

Many rows are shared out among programs, each of which leaves one number; torch adds those up. No atomics: always the
same bits.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .checks import check_mean, check_mean_denominator
from .launching import COMPILE, on
from .softmax_rows import load_target


@triton.jit(do_not_specialize=["rows", "classes", "ignore_index", "share"])
def denominator_kernel(
    target, weight, partial, stride, rows, classes, ignore_index, share, BLOCK: tl.constexpr
):  # fmt: skip
    """Counts the rows whose target counts, exactly, or adds up the weights of their classes.

    grid: ceil(N / share) programs, at least one. Sweeps: one.
    reads: target [N]; weight [C], if there are weights, where a target counts.
    writes: partial, one number a program: int64, or of the weights' dtype.
    bytes: 8 per row, with weights at most 12.
    """
    first = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(first + share, rows)
    total = tl.zeros([BLOCK], tl.int32 if weight is None else weight.dtype.element_ty)
    for start in range(first, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        g, counted = load_target(target + row * stride, row < end, classes, ignore_index)
        if weight is not None:
            total += tl.load(weight + g, mask=counted, other=0.0)
        else:
            total += counted.to(tl.int32)
    tl.store(partial + tl.program_id(0), tl.sum(total, 0).to(partial.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"])
def mean_kernel(loss, denominator, mean, divisor, rows, BLOCK: tl.constexpr):
    """grid: one program. Sweeps: one.

    reads: loss [N]; denominator. writes: mean, and divisor: the denominator, or inf where it is 0. bytes: 4 per row.
    """
    total = tl.zeros([BLOCK], loss.dtype.element_ty)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(loss + row, mask=row < rows, other=0.0)
    d = tl.load(denominator).to(loss.dtype.element_ty)
    tl.store(mean, tl.sum(total, 0) / d)
    tl.store(divisor, tl.where(d == 0.0, float("inf"), d))


def mean_denominator(target: Tensor, weight: Tensor | None, ignore_index: int, num_classes: int) -> Tensor:
    check_mean_denominator(target, weight, ignore_index, num_classes)
    rows = target.numel()
    share = tuning.row_share(rows)
    programs = max(1, triton.cdiv(rows, share))
    partial = target.new_empty(programs, dtype=torch.int64 if weight is None else weight.dtype)
    with on(target.device):
        denominator_kernel[(programs,)](
            *(target, weight, partial, target.stride(0), rows, num_classes, ignore_index, share),
            **{"BLOCK": tuning.MEAN_BLOCK, "num_warps": tuning.MEAN_WARPS, **COMPILE},
        )
    return partial[0] if programs == 1 else partial.sum()


def mean_loss(loss: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    check_mean(loss, denominator)
    if loss.numel() > tuning.MEAN_ROWS:
        loss = loss.sum().view(1)
    mean, divisor = loss.new_empty(()), loss.new_empty(())
    with on(loss.device):
        mean_kernel[(1,)](
            *(loss, denominator, mean, divisor, loss.numel()),
            **{"BLOCK": tuning.MEAN_BLOCK, "num_warps": tuning.MEAN_WARPS, **COMPILE},
        )
    return mean, divisor
