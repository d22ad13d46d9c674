"""The mathematics of one row of the softmax family for Triton kernels, under the names of csrc/loss_math.h.

    logits, target --accumulate--> RowStats --finish--> loss, RowGrad --apply--> dloss/dlogits

u_j: effective logits; g: the target class; omega_j: class weights (1 without weights). Everything is float32. A field
of a row is a scalar where a program works on one row, else a block with one entry per row or per lane.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from operator import attrgetter
from typing import Any, NamedTuple

import triton
import triton.language as tl

from longtail.options import SOFTMAX_NUMBERS, SoftmaxOptions

from .launching import switch

# exp of anything below is exactly 0 in float32, on every device: the C++ kernels cut where exp leaves the normal
# numbers, which takes two selects more per element.
LOWEST = tl.constexpr(-120.0)
LOG2_E = tl.constexpr(1.4426950408889634)


class RowStats(NamedTuple):
    """Five numbers describe a row.

    m, d, t cover the classes other than the target: 1 - p_g from p_g itself loses every digit on confident rows.
    """

    m: Any  # max of u_j
    d: Any  # sum of exp(u_j - m)
    t: Any  # sum of exp(u_j - m) * (u_j - m), where 0 * -inf is 0
    u_g: Any  # the target's effective logit
    U: Any  # sum over all classes of omega_j * (u_j - u_g); 0 without label smoothing


class RowGrad(NamedTuple):
    """dloss/du_j = exp(u_j - m) * (a + b * (u_j - m)) + S * omega_j for j != g, and `target` for j == g."""

    m: Any
    a: Any
    b: Any
    S: Any
    target: Any


class TargetTerms(NamedTuple):
    """What a row's class brings to the effective logits of the others: target_scale_g, class_mitigation_g and x_g."""

    scale: Any
    mitigation: Any
    reference: Any  # 0 in the place of -inf


class Vectors(NamedTuple):
    """Optional constants, float32: per class [C], per row [N], and the sum of the class weights (0-d)."""

    weight: Any = None
    class_bias: Any = None
    class_margin: Any = None
    class_scale: Any = None
    target_scale: Any = None
    class_mitigation: Any = None
    sample_weight: Any = None
    weight_sum: Any = None  # only with label smoothing; without, or without weights, the sum is C


class LossOptions(NamedTuple):
    """The numbers of a loss. None switches an option off when the kernel is compiled; values are read at run time."""

    label_smoothing: Any
    focal_gamma: Any
    complement_coefficient: Any  # complement_gamma / (C - 1)
    cross_entropy_coefficient: Any  # always a number: 1, or 0 for complement entropy alone
    scale: Any
    softcap: Any
    z_loss: Any
    compensation: Any


_numbers = attrgetter(*LossOptions._fields)
# What the operators are given where an option is off; None: it never is.
_OFF = [
    None if name == "cross_entropy_coefficient" else SOFTMAX_NUMBERS[name].off or 0.0 for name in LossOptions._fields
]


def loss_options(options: SoftmaxOptions) -> LossOptions:
    return LossOptions(*map(switch, _numbers(options), _OFF))


def vectors(options: SoftmaxOptions) -> Vectors:
    weight, smoothing = options.weight, options.label_smoothing
    weight_sum = weight.sum() if smoothing and weight is not None else None
    tensors, _ = options.parted()
    return Vectors(*tensors, weight_sum)  # type: ignore[call-arg]


@triton.jit
def empty_stats(u_g, LANES: tl.constexpr):
    """Stats of no class at all, [LANES] of them; they may share u_g."""
    zero = tl.zeros([LANES], tl.float32)
    return RowStats(zero + float("-inf"), zero, zero, u_g, zero)


@triton.jit
def finite_max(m):
    """m as a number that can be subtracted: -inf (nothing but -inf seen so far) stands in as 0."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def mitigated(mitigation, terms):
    """min(0, class_mitigation_j - class_mitigation_g); two of -inf are equal."""
    return tl.where(mitigation < terms.mitigation, mitigation - terms.mitigation, 0.0)


@triton.jit
def compensated(x, terms, compensation):
    """compensation * max(0, x_j - x_g)"""
    return compensation * tl.maximum(x - terms.reference, 0.0)


@triton.jit
def maximum(a, b):
    """The larger; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp_cut(x):
    """exp(x) and x for x <= 0, both cut off where exp(x) is 0, so that 0 * x is 0. NaN stays NaN.

    exp2, because Triton's exp spends three more instructions per element on subnormal results.
    """
    x = maximum(x, LOWEST)
    return tl.exp2(x * LOG2_E), x


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1 as x times a minimax fit of log1p(x) / x (relative error 3e-8): no division."""
    p = x * 0.005232690708474488 - 0.029505228969872625
    p = p * x + 0.0782259444194464
    p = p * x - 0.13663246051734518
    p = p * x + 0.19106007430968716
    p = p * x - 0.24842982587451046
    p = p * x + 0.3331909689707918
    p = p * x - 0.49999493149273366
    p = p * x + 0.9999999698819687
    return p * x


@triton.jit
def tanh(x):
    """The rational minimax fit of csrc/cpu/simd_math.h (relative error 2.1e-8); beyond 9.02, tanh rounds to 1."""
    c = tl.minimum(maximum(x, -9.02), 9.02, propagate_nan=tl.PropagateNan.ALL)
    s = c * c
    p = 1.3319008461603048e-08 * s + 2.0583435844878837e-05
    p = p * s + 0.0034940318775660427
    p = p * s + 0.13379715732344968
    p = p * s + 0.9999999790274084
    q = 7.761993488081781e-07 * s + 0.00032830883840931406
    q = q * s + 0.025871063137131018
    q = q * s + 0.46713030976665915
    q = q * s + 1.0
    y = c * p / q
    return tl.minimum(maximum(y, -1.0), 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def over_lanes_max(x):
    """Max of [groups, lanes, run] for each lane: within a thread where a lane is one."""
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def over_lanes_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def raise_max(s, m):
    """Moves the sums to a new maximum m >= s.m."""
    factor, shift = exp_cut(s.m - finite_max(m))
    return RowStats(m, factor * s.d, factor * (s.t + s.d * shift), s.u_g, s.U)


@triton.jit
def accumulate(s, u):
    """Adds non-target logits u [groups, lanes, run] to stats [lanes]: one exp each, and one per lane."""
    s = raise_max(s, tl.maximum(s.m, over_lanes_max(u)))
    e, shift = exp_cut(u - finite_max(s.m)[None, :, None])
    return RowStats(s.m, s.d + over_lanes_sum(e), s.t + over_lanes_sum(e * shift), s.u_g, s.U)


@triton.jit
def combine_lanes(s):
    """Joins the pieces of one row that lie along axis 0."""
    m = tl.max(s.m, 0)
    s = raise_max(s, m)
    return RowStats(m, tl.sum(s.d, 0), tl.sum(s.t, 0), s.u_g, tl.sum(s.U, 0))


@triton.jit
def combine(a, b):
    """Joins two disjoint pieces of one row. `b` need not know the target; both hold U relative to the same u_g."""
    m = tl.maximum(a.m, b.m)
    a = raise_max(a, m)
    b = raise_max(b, m)
    return RowStats(m, a.d + b.d, a.t + b.t, a.u_g, a.U + b.U)


@triton.jit
def finish(s, o, classes, weight_sum, w_g, v):
    """The loss and the coefficients of its gradient. w_g: class weight of the target; v: sample weight.

    classes: C; weight_sum: Omega, the sum of omega_j. Both as float32.
    """
    alone = s.d == 0.0  # no other class has any mass: p_g = 1, H = 0
    d = tl.where(alone, 1.0, s.d)
    log_d = tl.log(d)
    inverse_d = tl.where(alone, 0.0, 1.0 / d)
    mean_shift = s.t * inverse_d
    # l - u_g; a target at +inf has no probability (inf - inf), as in torch.
    margin = tl.where(s.u_g == float("inf"), float("nan"), (s.m - s.u_g) + log_d)
    # softplus and sigmoid of both signs of the margin from one exp and one log1p, each with full relative precision.
    e, _ = exp_cut(-tl.abs(margin))
    tail = log1p(e)
    nearer = 1.0 / (1.0 + e)
    wrong = margin > 0.0
    nll = maximum(margin, 0.0) + tail
    log_miss = -(maximum(-margin, 0.0) + tail)  # log(1 - p_g)
    p = tl.where(wrong, e * nearer, nearer)
    miss = tl.where(wrong, nearer, e * nearer)
    vF = v * o.cross_entropy_coefficient
    if o.focal_gamma is not None:
        vF *= exp_cut(o.focal_gamma * log_miss)[0]
    # CE and its derivatives by l and by u_g.
    ce, by_nll, by_target = w_g * nll, w_g, -w_g * miss
    zero = tl.zeros_like(inverse_d)
    b, S = zero, zero
    if o.label_smoothing is not None:
        kept, smooth = (1.0 - o.label_smoothing) * w_g, o.label_smoothing / classes
        ce = kept * nll + smooth * (weight_sum * nll - s.U)
        by_nll = kept + smooth * weight_sum
        by_target = smooth * (weight_sum * p - w_g) - kept * miss
        S = -vF * smooth
    loss, a, target = vF * ce, vF * by_nll * miss, vF * by_target
    if o.focal_gamma is not None:
        # Derivative of the focal factor times CE; p * CE tends to 0 with p.
        focal_term = o.focal_gamma * vF * tl.where(p == 0.0, 0.0, p * ce)
        a += focal_term
        target -= focal_term
    # Complement entropy alone, which the target's logit has no part in: an infinite one neither, but NaN shows.
    crossing = o.cross_entropy_coefficient != 0.0
    nothing = tl.where(s.u_g == s.u_g, 0.0 * s.d, s.u_g)
    loss = tl.where(crossing, loss, nothing)
    a = tl.where(crossing, a, nothing)
    target = tl.where(crossing, target, nothing)
    if o.z_loss is not None:
        lse = maximum(s.u_g, s.m + log_d) + tail  # u_g + nll has no digits left where l is far above u_g
        z_term = 2.0 * o.z_loss * lse
        loss += o.z_loss * lse * lse
        a += z_term * miss
        target += z_term * p
    if o.complement_coefficient is not None:
        kappa = v * o.complement_coefficient * w_g
        loss += kappa * (log_d - mean_shift)
        b = -kappa * inverse_d
    return loss, RowGrad(finite_max(s.m), a * inverse_d - b * mean_shift, b, S, target)


@triton.jit
def scale_grad(grad, upstream):
    """b and S stay 0 where their options are off, whatever the upstream gradient."""
    b = tl.where(grad.b == 0.0, grad.b, grad.b * upstream)
    S = tl.where(grad.S == 0.0, grad.S, grad.S * upstream)
    return RowGrad(grad.m, grad.a * upstream, b, S, grad.target * upstream)


@triton.jit
def apply(grad, u):
    """dloss/du_j of non-target classes; the caller adds S * omega_j when there is label smoothing."""
    e, shift = exp_cut(u - grad.m)
    return e * (grad.a + grad.b * shift)
