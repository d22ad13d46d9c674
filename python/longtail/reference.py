"""The softmax family in plain PyTorch: the truth that every kernel is tested against, and the fallback backend.

    logits, target --accumulate--> stats (m, d, t, u_g, U) --finish--> loss, RowGrad --apply--> dloss/dlogits

Notation: effective logits ``u_j = softcap(scale * z_j) + class_bias_j - [j = g] class_margin_g`` of a row with target
class g, over C classes. Everything is differentiable, twice, and exact in float64. Arithmetic is float64 for float64
logits, else float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_sigmoid import sigmoid_elements as sigmoid_elements
from .reference_sigmoid import sigmoid_loss as sigmoid_loss

STATS = ("m", "d", "t", "u_g", "U")


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


def accumulate_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def capped_logits(logits: Tensor, scale: float = 1.0, softcap: float = 0.0) -> Tensor:
    """``softcap * tanh(scale * z / softcap)``, or ``scale * z`` when softcap is 0; [N, C]."""
    scaled = logits * scale
    return softcap * torch.tanh(scaled / softcap) if softcap else scaled


def effective_logits(
    capped: Tensor, target: Tensor, class_bias: Tensor | None = None, class_margin: Tensor | None = None
) -> Tensor:
    """Adds ``class_bias`` [C] to capped logits [N, C], takes ``class_margin`` [C] off each row's target class."""
    u = capped if class_bias is None else capped + class_bias
    if class_margin is not None and u.shape[1]:
        index = target.clamp(min=0)
        u = u.scatter_add(1, index[:, None], -class_margin[index].masked_fill(target < 0, 0.0)[:, None])
    return u


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


def combine(a: Tensor, b: Tensor) -> Tensor:
    """Joins the stats [N, 5] of two disjoint sets of classes of the same rows; u_g is taken from ``a``."""
    m = torch.maximum(a[:, 0], b[:, 0])
    parts = []
    for s in (a, b):
        factor, shift = shifted_exp(s[:, 0], m)
        parts.append((factor * s[:, 1], factor * (s[:, 2] + s[:, 1] * shift)))
    (d_a, t_a), (d_b, t_b) = parts
    return torch.stack([m, d_a + d_b, t_a + t_b, a[:, 3], a[:, 4] + b[:, 4]], 1)


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


def finish(
    stats: Tensor,
    w_g: Tensor | float,
    v: Tensor | float,
    *,
    num_classes: int,
    weight_sum: Tensor | float,
    label_smoothing: float,
    focal_gamma: float,
    complement_coefficient: float,
    cross_entropy_coefficient: float,
    z_loss: float,
) -> tuple[Tensor, RowGrad]:
    """Row losses [N] and the coefficients of their gradients.

    ``w_g`` [N]: class weight of the target; ``v`` [N]: sample weight; ``weight_sum``: sum of the class weights.

    ``CE = (1 - eps) w_g nll + (eps / C) (Omega nll - U)``, ``F = (1 - p_g)^focal_gamma``,
    ``loss = v (cross_entropy_coefficient F CE + complement_coefficient w_g H) + z_loss lse^2``.
    """
    nll, log_miss, lse, entropy = posterior(stats)
    m, d, t, u_g, U = stats.unbind(1)
    p, miss = (-nll).exp(), log_miss.exp()
    inverse_d = torch.where(d == 0, 0.0, 1 / d)
    focal = (focal_gamma * log_miss).exp() if focal_gamma else torch.ones_like(nll)
    vF = v * cross_entropy_coefficient * focal
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
    if not cross_entropy_coefficient:
        # Complement entropy alone, which the target's logit has no part in: an infinite one neither, but NaN shows, and
        # does so again in a derivative.
        undefined = u_g.masked_fill(~u_g.isnan(), 0.0)
        loss = a = at_target = d * undefined * undefined
    if z_loss:
        loss = loss + z_loss * lse * lse
        a = a + 2 * z_loss * lse * miss
        at_target = at_target + 2 * z_loss * lse * p
    if complement_coefficient:
        kappa = v * complement_coefficient * w_g
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


def softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    class_bias: Tensor | None = None,
    class_margin: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    complement_gamma: float = 0.0,
    cross_entropy_coefficient: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """The loss of each row, [N], for logits [N, C] and target [N]; options as in :func:`longtail.cross_entropy`."""
    dtype, num_classes = accumulate_dtype(logits), logits.shape[1]
    counted = target != ignore_index
    if logits.numel() == 0:
        return logits.to(dtype).sum(1)
    g = torch.where(counted, target, 0)
    z = logits.to(dtype).masked_fill(~counted[:, None], 0.0)
    vectors = [None if x is None else x.to(dtype) for x in (weight, class_bias, class_margin, sample_weight)]
    omega, bias, margin, v = vectors
    u = effective_logits(capped_logits(z, scale, softcap or 0.0), g, bias, margin)
    loss, _ = finish(
        accumulate(u, g, omega, label_smoothing != 0),
        1.0 if omega is None else omega[g],
        1.0 if v is None else v,
        num_classes=num_classes,
        weight_sum=float(num_classes) if omega is None else omega.sum(),
        label_smoothing=label_smoothing,
        focal_gamma=focal_gamma,
        complement_coefficient=complement_gamma / max(num_classes - 1, 1),
        cross_entropy_coefficient=cross_entropy_coefficient,
        z_loss=z_loss,
    )
    return loss.masked_fill(~counted, 0.0)


def mean_denominator(target: Tensor, weight: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """What torch's mean divides by: the number of counted rows, or the sum of their class weights; 0-d."""
    counted = target != ignore_index
    if weight is None:
        return counted.sum()
    return weight[torch.where(counted, target, 0)].masked_fill(~counted, 0.0).sum()


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    normalizer: str | float | Tensor | None = None,
    **options: float | Tensor | None,
) -> Tensor:
    """:func:`longtail.cross_entropy` for input [N, C] and integer target [N], in plain PyTorch.

    Takes all its options but ``gradient`` and ``return_stats``.
    """
    loss = softmax_loss(
        input,
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        **options,  # type: ignore[arg-type]
    )
    if reduction != "mean":
        return loss.sum() if reduction == "sum" else loss
    if normalizer is None:
        normalizer = mean_denominator(target, None if weight is None else weight.to(loss.dtype), ignore_index)
    elif isinstance(normalizer, str):
        normalizer = (target != ignore_index).sum().clamp(min=1)
    return loss.sum() / normalizer
