"""The softmax family in plain PyTorch: the truth that every kernel is tested against, and the fallback backend.

    logits, target --accumulate--> stats (m, d, t, u_g, U) --finish--> loss, RowGrad --apply--> dloss/dlogits

Notation: effective logits u_j, of :mod:`longtail.reference.effective`, of a row with target class g, over C classes.
Everything is differentiable, twice, and exact in float64. Arithmetic is float64 for float64
logits, else float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import SoftmaxOptions
from .effective import stretch
from .sizes import LARGEST_HALF, Size, largest


class RowGrad(NamedTuple):
    """Coefficients of a row's gradient, each [N].

    ``dloss/du_j = exp(u_j - m) (a + b (u_j - m)) + S omega_j`` for j != g, and ``target`` for j == g.
    """

    m: Tensor
    a: Tensor
    b: Tensor
    S: Tensor
    target: Tensor

    def times(self, upstream: Tensor) -> RowGrad:
        """Of the row's loss times ``upstream`` [N]: all but m, which is no coefficient.

        b and S stay 0 where their options are off, whatever ``upstream`` is.
        """
        b, S = (torch.where(x == 0, x, x * upstream) for x in (self.b, self.S))
        return RowGrad(self.m, self.a * upstream, b, S, self.target * upstream)


def shifted_exp(u: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """``exp(u - m)`` and ``u - m``; where the first would underflow it is 0 and the second a finite number."""
    lowest = -708.0 if u.dtype == torch.float64 else -87.0
    shift = u - torch.where(m == -torch.inf, 0.0, m)
    underflow = shift < lowest
    shift = shift.masked_fill(underflow, lowest)
    return shift.exp().masked_fill(underflow, 0.0), shift


def accumulate(u: Tensor, target: Tensor, omega: Tensor | None = None, smoothing: bool = False) -> Tensor:
    """The five numbers of each row, [N, 5]: m, d, t over the classes other than the target, u_g, U.

    ``m = max u_j``, ``d = sum exp(u_j - m)``, ``t = sum exp(u_j - m) (u_j - m)``, ``U = sum omega_j (u_j - u_g)`` over
    all classes (0 without smoothing). ``omega`` [C] defaults to ones.

    ``u`` may be a shard of the classes. A row of target -1 has its class in another shard: all classes of this one are
    others, and ``u_g`` is the first of them (0 of none), so that U remains relative to a logit of the row.
    """
    if u.shape[1] == 0:
        return u.new_tensor([-torch.inf, 0.0, 0.0, 0.0, 0.0]).expand(u.shape[0], 5)
    index = target.clamp(min=0)[:, None]
    u_g = u.gather(1, index)
    others = u.scatter(1, index, torch.where(target[:, None] < 0, u_g, -torch.inf))
    m = others.amax(1, keepdim=True).detach()
    e, shift = shifted_exp(others, m)
    U = torch.zeros_like(u_g)
    if smoothing:
        difference = u - torch.where(u_g == -torch.inf, 0.0, u_g)
        U = (difference if omega is None else difference * omega).sum(1, keepdim=True)
    return torch.cat([m, e.sum(1, keepdim=True), (e * shift).sum(1, keepdim=True), u_g, U], 1)


class Posterior(NamedTuple):
    """What a row's stats say about its target, each [N]: negative log-probability, log(1 - p), log-sum-exp, H."""

    nll: Tensor
    log_miss: Tensor
    lse: Tensor
    entropy: Tensor


def posterior(stats: Tensor) -> Posterior:
    """``nll = softplus(l - u_g)`` with ``l = m + log d``; ``H = log d - t / d`` (0 when the target stands alone)."""
    m, d, t, u_g = stats[:, 0], stats[:, 1], stats[:, 2], stats[:, 3]
    alone = d == 0
    safe_d = d.masked_fill(alone, 1.0)
    log_d = safe_d.log()
    margin = torch.where(u_g == torch.inf, torch.nan, (m - u_g) + log_d)  # inf - inf: no probability, as in torch
    nll = -F.logsigmoid(-margin)  # softplus; F.softplus turns linear at 20 and loses digits there
    log_miss = F.logsigmoid(margin)
    # From the larger side: u_g + nll has no digits left where l is far above u_g.
    lse = torch.where(margin > 0, (m + log_d) - log_miss, u_g + nll)
    return Posterior(nll, log_miss, lse, log_d - t / safe_d)


class Factors(NamedTuple):
    """What weights make of a batch of rows."""

    w_g: Tensor | float
    """Class weight of the target, [N]."""
    v: Tensor | float
    """Sample weight, [N]."""
    num_classes: int
    weight_sum: Tensor | float
    """Of the class weights; looked at under label smoothing alone."""

    @classmethod
    def of(cls, g: Tensor, num_classes: int, options: SoftmaxOptions) -> Factors:
        """Of rows with targets g [N], a class in range where ignored."""
        weight, v = options.weight if num_classes else None, options.sample_weight
        weight_sum = float(num_classes) if weight is None or not options.label_smoothing else weight.sum()
        return cls(1.0 if weight is None else weight[g], 1.0 if v is None else v, num_classes, weight_sum)


def finish(stats: Tensor, factors: Factors, options: SoftmaxOptions) -> tuple[Tensor, RowGrad]:
    """Row losses [N] and the coefficients of their gradients.

    ``CE = (1 - eps) w_g nll + (eps / C) (Omega nll - U)``, ``F = (1 - p_g)^focal_gamma``,
    ``loss = v (cross_entropy_coefficient F CE + complement_coefficient w_g H) + z_loss lse^2``.
    """
    w_g, v, num_classes, weight_sum = factors
    focal_gamma, label_smoothing, z_loss = options.focal_gamma, options.label_smoothing, options.z_loss
    nll, log_miss, lse, entropy = posterior(stats)
    m, d, t, u_g, U = stats.unbind(1)
    p, miss = (-nll).exp(), log_miss.exp()
    inverse_d = torch.where(d == 0, 0.0, 1 / d)
    focal = (focal_gamma * log_miss).exp() if focal_gamma else torch.ones_like(nll)
    vF = v * options.cross_entropy_coefficient * focal
    # An option that is off is left out, not multiplied by 0: weights may be infinite, or NaN.
    kept = (1 - label_smoothing) * w_g
    ce, by_nll, by_target = kept * nll, kept, -kept * miss  # CE and its derivatives by l and by u_g
    b = S = torch.zeros_like(nll)
    if label_smoothing:
        smooth = label_smoothing / num_classes
        ce = ce + smooth * (weight_sum * nll - U)
        by_nll = by_nll + smooth * weight_sum
        by_target = by_target + smooth * (weight_sum * p - w_g)
        S = -vF * smooth
    loss, a, at_target = vF * ce, vF * by_nll * miss, vF * by_target
    if focal_gamma:
        p_ce = torch.where(p == 0, 0.0, p * ce)  # tends to 0 with p, where ce is infinite
        a = a + focal_gamma * vF * p_ce
        at_target = at_target - focal_gamma * vF * p_ce
    if not options.cross_entropy_coefficient:
        # Complement entropy alone, which the target's logit has no part in: an infinite one neither, but NaN shows, and
        # does so again in a derivative.
        undefined = u_g.masked_fill(~u_g.isnan(), 0.0)
        loss = a = at_target = d * undefined * undefined
    if z_loss:
        loss = loss + z_loss * lse * lse
        a = a + 2 * z_loss * lse * miss
        at_target = at_target + 2 * z_loss * lse * p
    if options.complement_coefficient:
        kappa = v * options.complement_coefficient * w_g
        loss = loss + kappa * entropy
        b = -kappa * inverse_d
    return loss, RowGrad(torch.where(m == -torch.inf, 0.0, m), a * inverse_d - b * t * inverse_d, b, S, at_target)


def apply(grad: RowGrad, u: Tensor, target: Tensor, omega: Tensor | None = None, smoothing: bool = False) -> Tensor:
    """``dloss/du`` [N, C] from the effective logits and a row's coefficients; -1 is a target in another shard."""
    e, shift = shifted_exp(u, grad.m[:, None])
    du = e * (grad.a[:, None] + grad.b[:, None] * shift)
    if smoothing:
        du = du + (grad.S[:, None] if omega is None else grad.S[:, None] * omega)
    if u.shape[1] == 0:
        return du
    index = target.clamp(min=0)[:, None]
    return du.scatter(1, index, torch.where(target[:, None] < 0, du.gather(1, index), grad.target[:, None]))


def gradient_size(counted: Tensor | None, factors: Factors, options: SoftmaxOptions) -> Size:
    """A bound of the elements of the gradient of the losses' sum, of float16 logits, over the ``counted`` rows [N].

    ``counted`` says nothing, and may be None, where there are no weights.

    Too small, so that they may overflow, only where focal factor and smoothing meet logits that lie thousands of nats
    apart on average.
    """
    w_g, v, num_classes, weight_sum = factors
    smoothing, scale = options.label_smoothing, abs(options.scale) * stretch(options)
    crossing = abs(options.cross_entropy_coefficient) * (1 + options.focal_gamma) * scale
    entropy = abs(options.complement_coefficient) * (1 + math.log(max(num_classes, 1))) * scale
    row: Any = (crossing * (1 - smoothing) + entropy) * w_g
    if smoothing:
        row = row + crossing * smoothing / max(num_classes, 1) * weight_sum
    row = abs(row * v) if isinstance(v, Tensor) else abs(row)
    if options.z_loss:  # of the log-sum-exp, which neither weights nor the number of rows make smaller
        reach = options.softcap * stretch(options) if options.softcap else scale * LARGEST_HALF
        row = row + 2 * abs(options.z_loss) * reach * (1 + 2 * options.compensation) * scale
    return row if counted is None or not isinstance(row, Tensor) else largest(row, counted)
