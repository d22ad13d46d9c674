"""From logits to effective logits, and the way back of their gradient, as reference/effective.py:

    s_j = softcap(scale z_j)
    x_j = class_scale_j target_scale_g s_j + class_bias_j
    u_j = x_j + min(0, class_mitigation_j - class_mitigation_g) + compensation max(0, x_j - x_g)    for j != g
    u_g = x_g - class_margin_g

Conventions as softmax_rows. Of class probabilities, which have no g, `terms` is None.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .loss_math import TargetTerms, compensated, finite_max, mitigated, tanh


@triton.jit
def capped_logits(z, o):
    """s_j in float32."""
    s = z.to(tl.float32)
    if o.scale is not None:
        s = s * o.scale
    if o.softcap is not None:
        s = o.softcap * tanh(s / o.softcap)
    return s


@triton.jit
def stretched(s, cols, first, real, terms, x):
    """Capped logits, or a gradient on its way back, times the scales of classes and targets."""
    if x.class_scale is not None:
        s = s * tl.load(x.class_scale + first + cols, mask=real, other=1.0)
    if x.target_scale is not None:
        s = s * terms.scale
    return s


@triton.jit
def class_logits(capped, cols, first, real, terms, x):
    """x_j"""
    s = stretched(capped, cols, first, real, terms, x)
    if x.class_bias is not None:
        s = s + tl.load(x.class_bias + first + cols, mask=real, other=0.0)
    return s


@triton.jit
def effective_logits(own, cols, first, real, terms, x, o):
    """u_j of j != g from x_j."""
    u = own
    if x.class_mitigation is not None:
        u = u + mitigated(tl.load(x.class_mitigation + first + cols, mask=real, other=0.0), terms)
    if o.compensation is not None:
        u = u + compensated(own, terms, o.compensation)
    return u


@triton.jit
def load_terms(capped, g, here, x):
    """The TargetTerms of a row by its target's capped logit; those that change nothing where g is not `here`."""
    scale = tl.zeros_like(capped) + 1.0
    mitigation = tl.zeros_like(capped) + float("-inf")
    if x.target_scale is not None:
        scale = tl.load(x.target_scale + g, mask=here, other=1.0)
    if x.class_mitigation is not None:
        mitigation = tl.load(x.class_mitigation + g, mask=here, other=float("-inf"))
    terms = TargetTerms(scale, mitigation, scale)
    x_g = class_logits(capped, g, 0, here, terms, x)
    return TargetTerms(scale, mitigation, tl.where(here, finite_max(x_g), float("inf")))


@triton.jit
def load_shard_terms(z_row, g, row, counted, target_terms, x, o):
    """As load_terms, for target -1, too, or from `target_terms` [N, 3], where they are given."""
    if target_terms is not None:
        at = target_terms + row * 3
        scale = tl.load(at, mask=counted, other=1.0)
        mitigation = tl.load(at + 1, mask=counted, other=0.0)
        terms = TargetTerms(scale, mitigation, tl.load(at + 2, mask=counted, other=0.0))
    else:
        here = counted & (g >= 0)
        terms = load_terms(capped_logits(tl.load(z_row + g, mask=here, other=0.0), o), g, here, x)
    return terms


@triton.jit
def load_block(z, cols, first, mask, real, terms, x, o, EVICT: tl.constexpr):
    """Capped and effective logits of a block, these as of j != g, and -inf where the mask is off."""
    capped = capped_logits(tl.load(z, mask=mask, other=float("-inf"), eviction_policy=EVICT), o)
    u = effective_logits(class_logits(capped, cols, first, real, terms, x), cols, first, real, terms, x, o)
    if o.scale is not None or o.softcap is not None or x.class_scale is not None or x.target_scale is not None:
        u = tl.where(mask, u, float("-inf"))
    return capped, u


@triton.jit
def store_grad(grad, cols, first, mask, real, du, capped, terms, x, o):
    """Writes dloss/dlogits from dloss/du."""
    if o.softcap is not None:
        y = capped / o.softcap
        du = du * (1.0 - y * y)
    if o.scale is not None:
        du = du * o.scale
    du = stretched(du, cols, first, real, terms, x)
    tl.store(grad, du.to(grad.dtype.element_ty), mask=mask)
