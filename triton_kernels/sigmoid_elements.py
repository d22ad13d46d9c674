"""What the kernels of the sigmoid family load, compute and store of a block of elements: classes of rows, or pixels.

A row is what has one class target: N rows of logits [N, C], N * P of images [N, C, P]. x: Vectors; o: Options.
Whatever does not count is read as a negative with logit -inf, whose loss and slope are exactly 0.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import triton
import triton.language as tl

from longtail.options import SigmoidOptions

from .launching import switch
from .sigmoid_general import general_hard, general_soft, rebalanced
from .sigmoid_math import hard_element, logistic, soft_element


class Vectors(NamedTuple):
    """Optional constants, float32: per class [C], and per row."""

    weight: Any
    pos_weight: Any
    sample_weight: Any
    class_bias: Any
    class_alpha: Any
    class_gamma: Any
    inverse_counts: Any


class Options(NamedTuple):
    """None switches an option off when the kernel is compiled; values are read at run time.

    Those after gamma are of general kernels alone.
    """

    alpha: Any
    gamma: Any
    gamma_negative: Any = None  # None: gamma
    clip: Any = None
    detach: Any = None
    scale: Any = None  # negative_scale, and its inverse
    inverse_scale: Any = None
    smoothing: Any = None
    rebalance_alpha: Any = None
    rebalance_beta: Any = None
    rebalance_shift: Any = None  # beta times mu


def vectors(options: SigmoidOptions) -> Vectors:
    tensors, _ = options.parted()
    return Vectors(*tensors)


def element_options(options: SigmoidOptions) -> Options:
    if options.is_plain:
        return Options(options.alpha, float(options.gamma))
    alpha, gamma = options.alpha if options.class_alpha is None else None, float(options.gamma)
    same = options.gamma_negative is None or (options.class_gamma is None and options.gamma_negative == gamma)
    rebalance: tuple[float | None, ...] = (None, None, None)
    if options.inverse_counts is not None:
        beta = float(options.rebalance_beta)
        rebalance = (float(options.rebalance_alpha), beta, beta * options.rebalance_mu)
    scale = switch(options.negative_scale, 1.0)
    return Options(
        *(alpha, gamma, None if same else float(options.gamma_negative or 0.0), switch(options.clip, 0.0)),
        *(1 if options.detach else None, scale, None if scale is None else 1.0 / scale),
        *(switch(options.label_smoothing, 0.0), *rebalance),
    )


def focus(options: SigmoidOptions, dense: bool) -> str:
    """How the focal factor is computed: see sigmoid_math and, with any other option, sigmoid_general."""
    if options.is_plain:
        return {0.0: "none", 2.0: "square"}.get(options.gamma, "power")
    if options.class_gamma is not None:
        return "power"
    exponents = [options.gamma, options.gamma if options.gamma_negative is None else options.gamma_negative]
    if exponents == [0.0, 0.0]:
        return "none"
    whole = all(gamma in range(8) for gamma in exponents) and not dense and not options.label_smoothing
    return "whole" if whole else "power"


class Row(NamedTuple):
    """What the elements of a row have in common; a field broadcasts over the block."""

    counted: Any
    hot: Any  # the target class, or -1: none, or one that does not count
    ignored: Any  # the target that does not count, None without one; a float if dense
    factor: Any  # of every element, but for class targets of the negative ones
    positive: Any  # for class targets, the factor of the positive element
    upstream: Any  # None where each element has its own
    rarity: Any  # what inverse_counts are multiplied by: rebalance_beta over their sum over the labels


@triton.jit
def with_labels(row, label_sum, o):
    """`row` with what its labels' inverse counts sum up to."""
    return Row(row.counted, row.hot, row.ignored, row.factor, row.positive, row.upstream, o.rebalance_beta / label_sum)


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
    if not DENSE and o.smoothing is None:
        if x.pos_weight is not None:
            positive *= tl.load(x.pos_weight + g, mask=counted, other=0.0)
        if o.alpha is not None:
            positive *= o.alpha
            factor *= 1.0 - o.alpha
        if x.class_alpha is not None:
            positive *= tl.load(x.class_alpha + g, mask=counted, other=0.0)
    return factor, positive


@triton.jit
def general_elements(z, y, counts, classes, real, row, column, x, o, FOCUS: tl.constexpr, DENSE: tl.constexpr):
    """Losses and slopes, all factors included, 0 where not `counts`; column: the class weight."""
    u = tl.where(counts, z, 0.0)
    if x.class_bias is not None:
        u += tl.load(x.class_bias + classes, mask=real, other=0.0)
    alpha, gamma_positive = o.alpha, o.gamma
    if x.class_alpha is not None:
        alpha = tl.load(x.class_alpha + classes, mask=real, other=0.0)
    if x.class_gamma is not None:
        gamma_positive = tl.load(x.class_gamma + classes, mask=real, other=0.0)
    gamma_negative = gamma_positive if o.gamma_negative is None else o.gamma_negative
    factor = row.factor
    one = counts & (classes == row.hot)
    if DENSE or o.smoothing is not None:
        if not DENSE:
            y = tl.where(one, 1.0, 0.0)
        if o.smoothing is not None:
            y += o.smoothing * (0.5 - y)
        pos_weight = load_pos_weight(y, classes, real, x)
        element = general_soft(u, y, pos_weight, gamma_positive, gamma_negative, o, FOCUS)
        if alpha is not None:
            factor *= alpha * y + (1.0 - alpha) * (1.0 - y)
    else:
        element = general_hard(u, one, gamma_positive, gamma_negative, o, FOCUS)
        if x.class_alpha is not None:
            factor *= 1.0 - alpha
        factor = tl.where(one, row.positive, factor)
    factor *= column
    if x.inverse_counts is not None:
        factor *= rebalanced(tl.load(x.inverse_counts + classes, mask=real, other=0.0), row.rarity, o)
    return tl.where(counts, factor * element.loss, 0.0), tl.where(counts, factor * element.slope, 0.0)


@triton.jit
def load_pos_weight(y, classes, real, x):
    pos_weight = 1.0
    if x.pos_weight is not None:
        pos_weight = tl.load(x.pos_weight + classes, mask=real, other=0.0)
        pos_weight = tl.where(y == 0.0, 1.0, pos_weight)  # says nothing of negatives, even if it is infinite
    return pos_weight


@triton.jit
def block(
    logits, target, grad_loss, loss, grad, at, row, classes, real, loaded, written, x, o,
    GENERAL: tl.constexpr, FOCUS: tl.constexpr, DENSE: tl.constexpr, BY_TARGET: tl.constexpr, LOSSES: tl.constexpr,
    UPSTREAMS: tl.constexpr, SELECT: tl.constexpr,
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
    y = 0.0
    if DENSE:
        y = tl.load(target + at.y, mask=loaded, other=0.0).to(tl.float32)
        if row.ignored is not None:
            counts = y != row.ignored
            z = tl.where(counts, z, float("-inf"))
            y = tl.where(counts, y, 0.0)
    if GENERAL:
        value, slope = general_elements(z, y, counts & loaded, classes, real, row, column, x, o, FOCUS, DENSE)
    elif DENSE:
        pos_weight = load_pos_weight(y, classes, real, x)
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
