"""From logits to effective logits, and the way back of their gradient, in plain PyTorch.

    s_j = softcap(scale z_j)
    x_j = class_scale_j target_scale_g s_j + class_bias_j
    u_j = x_j + min(0, class_mitigation_j - class_mitigation_g) + compensation max(0, x_j - x_g)    for j != g
    u_g = x_g - class_margin_g

of a row with target class g. The last term of u_j is a constant: no gradient passes through the compensation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..options import SoftmaxOptions
from .sizes import Size


def capped_logits(logits: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """``softcap * tanh(scale * z / softcap)``, or ``scale * z`` when softcap is off; [N, C]."""
    scaled = logits * scale
    return softcap * torch.tanh(scaled / softcap) if softcap else scaled


class TargetTerms(NamedTuple):
    """What the class of a row's target brings to the effective logits of the others, each [N]."""

    scale: Tensor
    """target_scale_g"""
    mitigation: Tensor
    """class_mitigation_g; -inf brings nothing."""
    reference: Tensor
    """x_g, 0 in the place of -inf; inf brings nothing."""

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, options: SoftmaxOptions) -> TargetTerms:
        """Of the targets' own logits [N], and target [N]; one of -1, whose class is none of these, brings nothing."""
        elsewhere, index = target < 0, target.clamp(min=0)
        scale = torch.ones_like(logits)
        mitigation, reference = scale * -torch.inf, scale * torch.inf
        if options.target_scale is not None:
            scale = options.target_scale[index].masked_fill(elsewhere, 1.0)
        if options.class_mitigation is not None:
            mitigation = options.class_mitigation[index].masked_fill(elsewhere, -torch.inf)
        if options.compensation:
            x = capped_logits(logits, options.scale, options.softcap)
            x = (x if options.class_scale is None else x * options.class_scale[index]) * scale
            x = x if options.class_bias is None else x + options.class_bias[index]
            reference = x.masked_fill(x == -torch.inf, 0.0).masked_fill(elsewhere, torch.inf).detach()
        return cls(scale, mitigation, reference)


class Effective(NamedTuple):
    """Effective logits [N, C], and what they were made of."""

    u: Tensor
    capped: Tensor
    options: SoftmaxOptions
    scale: Tensor | None
    """target_scale_g, [N]"""

    @classmethod
    def of_all(cls, logits: Tensor, options: SoftmaxOptions, scale: Tensor | None = None) -> Effective:
        """x in the place of u, of logits [N, C] in the dtype of the arithmetic; ``scale``: target_scale_g [N]."""
        capped = capped_logits(logits, options.scale, options.softcap)
        effective = cls(capped, capped, options, scale)
        x = effective._stretched(capped)
        return effective._replace(u=x if options.class_bias is None else x + options.class_bias)

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, options: SoftmaxOptions, terms: TargetTerms | None = None) -> Effective:
        """Of logits [N, C] in the dtype of the arithmetic and target [N]; -1 is a class that is none of these.

        ``terms``: of the targets, where others know them.
        """
        if logits.shape[1] == 0 or not (options.by_target() or options.class_margin is not None):
            return cls.of_all(logits, options)
        index = target.clamp(min=0)
        if terms is None:
            terms = TargetTerms.of(logits.gather(1, index[:, None])[:, 0], target, options)
        effective = cls.of_all(logits, options, None if options.target_scale is None else terms.scale)
        x = u = effective.u
        if options.class_mitigation is not None:
            mitigation, own = options.class_mitigation, terms.mitigation[:, None]
            u = u + torch.where(mitigation < own, mitigation - own, 0.0)
        if options.compensation:
            u = u + options.compensation * (x - terms.reference[:, None]).clamp(min=0.0).detach()
        x_g = x.gather(1, index[:, None])
        if options.class_margin is not None:
            x_g = x_g - options.class_margin[index, None]
        here = (target >= 0)[:, None]
        return effective._replace(u=u.scatter(1, index[:, None], torch.where(here, x_g, u.gather(1, index[:, None]))))

    def _stretched(self, s: Tensor) -> Tensor:
        """Capped logits, or a gradient on its way back, times the scales of classes and targets."""
        s = s if self.options.class_scale is None else s * self.options.class_scale
        return s if self.scale is None else s * self.scale[:, None]

    def gradient(self, du: Tensor) -> Tensor:
        """``dloss/dlogits`` from ``dloss/du``."""
        grad, softcap = self._stretched(du) * self.options.scale, self.options.softcap
        return grad * (1 - (self.capped / softcap) ** 2) if softcap else grad


def stretch(options: SoftmaxOptions) -> Size:
    """A bound of what scales of classes and targets multiply a gradient by."""
    size: Size = 1.0
    for scale in (options.class_scale, options.target_scale):
        if scale is not None and scale.numel():
            size = size * largest_scale(scale)
    return size


def largest_scale(scale: Tensor) -> Tensor:
    """The largest finite size of scales [C], 0-d; 0 of none."""
    return scale.abs().nan_to_num(0.0, 0.0).amax() if scale.numel() else scale.new_zeros(())
