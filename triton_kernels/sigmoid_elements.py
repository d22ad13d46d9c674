"""What the kernels of the sigmoid family load, compute and store of a block of elements: classes of rows, or pixels.

A row is what has one class target: N rows of logits [N, C], N * P of images [N, C, P]. x: Vectors; o: Options.
Whatever does not count is read as a negative with logit -inf, whose loss and slope are exactly 0.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from longtail.options import SigmoidOptions

from .sigmoid_math import hard_element, logistic, soft_element


class Vectors(NamedTuple):
    """Optional constants, float32: per class [C], and per row."""

    weight: Any
    pos_weight: Any
    sample_weight: Any


class Options(NamedTuple):
    """None switches an option off when the kernel is compiled; values are read at run time."""

    alpha: Any
    gamma: Any


def vectors(options: SigmoidOptions) -> Vectors:
    return Vectors(options.weight, options.pos_weight, options.sample_weight)


def element_options(options: SigmoidOptions) -> Options:
    return Options(options.alpha, float(options.gamma))


class Row(NamedTuple):
    """What the elements of a row have in common; a field broadcasts over the block."""

    counted: Any
    hot: Any  # the target class, or -1: none, or one that does not count
    ignored: Any  # the target that does not count, None without one; a float if dense
    factor: Any  # of every element, but for class targets of the negative ones
    positive: Any  # for class targets, the factor of the positive element
    upstream: Any  # None where each element has its own


class At(NamedTuple):
    """Offsets of the block's elements in each tensor; `out` is the place in a contiguous one of the logits' shape."""

    z: Any
    y: Any
    grad: Any
    out: Any


@triton.jit
def load_factors(g, row, counted, x, o, DENSE: tl.constexpr, BY_TARGET: tl.constexpr):
    factor = tl.full(row.shape, 1.0, tl.float32)
    if x.sample_weight is not None:
        factor *= tl.load(x.sample_weight + row, mask=counted, other=0.0)
    if BY_TARGET:
        factor *= tl.load(x.weight + g, mask=counted, other=0.0)
    positive = factor
    if not DENSE:
        if x.pos_weight is not None:
            positive *= tl.load(x.pos_weight + g, mask=counted, other=0.0)
        if o.alpha is not None:
            positive *= o.alpha
            factor *= 1.0 - o.alpha
    return factor, positive


@triton.jit
def block(
    logits, target, grad_loss, loss, grad, at, row, classes, real, loaded, written, x, o, FOCUS: tl.constexpr,
    DENSE: tl.constexpr, BY_TARGET: tl.constexpr, LOSSES: tl.constexpr, UPSTREAMS: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """Stores the block's gradients if there is `grad`, its losses if LOSSES, and returns the latter.

    classes: of the elements, with `real` those that exist. LOSSES, UPSTREAMS: one for each element. SELECT: the mask
    `loaded` may be on in rows that do not count, because a mask that differs between neighbours splits a wide load.
    """
    z = tl.load(logits + at.z, mask=loaded, other=float("-inf")).to(tl.float32)
    counts = loaded
    if SELECT:
        counts = loaded & row.counted
        z = tl.where(counts, z, float("-inf"))
    column = 1.0
    if x.weight is not None and not BY_TARGET:
        column = tl.load(x.weight + classes, mask=real, other=0.0)
    if DENSE:
        y = tl.load(target + at.y, mask=loaded, other=0.0).to(tl.float32)
        if row.ignored is not None:
            counts = y != row.ignored
            z = tl.where(counts, z, float("-inf"))
            y = tl.where(counts, y, 0.0)
        pos_weight = 1.0
        if x.pos_weight is not None:
            pos_weight = tl.load(x.pos_weight + classes, mask=real, other=0.0)
            pos_weight = tl.where(y == 0.0, 1.0, pos_weight)  # says nothing of negatives, even if it is infinite
        element = soft_element(logistic(z), y, pos_weight, o.gamma, FOCUS)
        factor = row.factor * column
        if o.alpha is not None:
            factor *= o.alpha * y + (1.0 - o.alpha) * (1.0 - y)
        value, slope = factor * element.loss, factor * element.slope
    else:
        one = loaded & (classes == row.hot)
        element = hard_element(logistic(tl.where(one, z, -z)), o.gamma, FOCUS)
        value = tl.where(one, row.positive, row.factor) * column * element.loss
        slope = tl.where(one, -row.positive, row.factor) * column * element.slope
    if LOSSES:
        tl.store(loss + at.out, value, mask=written)
    if grad is not None:
        upstream = row.upstream
        if UPSTREAMS:
            upstream = tl.load(grad_loss + at.out, mask=loaded, other=0.0)
            if SELECT or (DENSE and row.ignored is not None):
                upstream = tl.where(counts, upstream, 0.0)
        tl.store(grad + at.grad, (slope * upstream).to(grad.dtype.element_ty), mask=written)
    return value
