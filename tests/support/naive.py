"""The family straight from its definitions, in the dtype given, for moderate margins only.

Written apart from `longtail.reference` on purpose: softmax, masks, then logarithms; gradients by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


def effective_logits(
    logits: Tensor,
    target: Tensor,
    class_bias: Tensor | None = None,
    class_margin: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    class_scale: Tensor | None = None,
    target_scale: Tensor | None = None,
    class_mitigation: Tensor | None = None,
    compensation: float = 0.0,
) -> Tensor:
    """[N, C] logits as the loss sees them; target must be in range."""
    u = logits * scale
    if softcap:
        u = softcap * torch.tanh(u / softcap)
    if class_scale is not None:
        u = class_scale * u
    if target_scale is not None:
        u = u * target_scale[target].unsqueeze(1)
    if class_bias is not None:
        u = u + class_bias
    factor = torch.zeros_like(u)  # Seesaw's log S, 0 for the target itself
    if class_mitigation is not None:
        ratio = class_mitigation.unsqueeze(0) - class_mitigation[target].unsqueeze(1)
        factor = factor + torch.minimum(ratio, torch.zeros_like(ratio))
    if compensation:
        x = u.detach()
        own = x[torch.arange(len(x)), target].unsqueeze(1)
        own = torch.where(own == -torch.inf, torch.zeros_like(own), own)
        factor = factor + compensation * torch.maximum(x - own, torch.zeros_like(x))
    others = 1 - torch.nn.functional.one_hot(target, u.shape[1])
    u = torch.where(others.bool(), u + factor, u)
    if class_margin is not None:
        u = u - torch.nn.functional.one_hot(target, u.shape[1]) * class_margin[target][:, None]
    return u


def complement_entropy(u: Tensor, target: Tensor) -> Tensor:
    """Entropy [N] of the softmax over the classes other than the target; 0 with one class."""
    keep = torch.ones_like(u, dtype=torch.bool).scatter_(1, target[:, None], False)
    others = u[keep].reshape(u.shape[0], u.shape[1] - 1)
    if others.shape[1] == 0:
        return u.sum(1) * 0
    q = torch.softmax(others, 1)
    return -(q * torch.log(q)).sum(1)


def rows(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N]
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    complement_gamma: float = 0.0,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    **effective: object,
) -> Tensor:
    """Loss [N] of every row, 0 where ignored."""
    counted = target != ignore_index
    result = torch.zeros_like(target, dtype=logits.dtype)
    if not counted.any():
        return result + logits.nan_to_num(0, 0, 0).sum() * 0
    g, classes = target[counted], logits.shape[1]
    u = effective_logits(logits[counted], g, **effective)  # type: ignore[arg-type]
    log_p = torch.log_softmax(u, 1)
    omega = torch.ones(classes, dtype=u.dtype) if weight is None else weight
    pick = torch.nn.functional.one_hot(g, classes).bool()
    ce = -(1 - label_smoothing) * omega[g] * log_p[pick] - label_smoothing / classes * (omega * log_p).sum(1)
    not_target = torch.softmax(u, 1).masked_fill(pick, 0.0).sum(1)
    focal = not_target**focal_gamma if focal_gamma else torch.ones_like(ce)
    complement = complement_gamma / max(classes - 1, 1) * omega[g] * complement_entropy(u, g)
    v = 1.0 if sample_weight is None else sample_weight[counted]
    loss = v * (focal * ce + complement) + z_loss * torch.logsumexp(u, 1) ** 2
    return result.masked_scatter(counted, loss)


def probability_rows(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N, C]
    *,
    weight: Tensor | None = None,
    class_bias: Tensor | None = None,
    class_scale: Tensor | None = None,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Loss [N] of class probabilities: the weighted sum over the classes of -y log p."""
    u, classes = logits * scale, logits.shape[1]
    u = softcap * torch.tanh(u / softcap) if softcap else u
    u = u if class_scale is None else u * class_scale
    u = u if class_bias is None else u + class_bias
    y = target * (1 - label_smoothing) + label_smoothing / classes
    cost = -y * torch.log(torch.softmax(u, 1))
    loss = (cost if weight is None else cost * weight).sum(1)
    loss = loss if sample_weight is None else loss * sample_weight
    return loss + z_loss * torch.log(torch.exp(u).sum(1)) ** 2


def rows_and_grad(logits: Tensor, target: Tensor, upstream: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """(loss [N], gradient [N, C] of sum(upstream * loss)), in float64."""
    x = logits.detach().double().requires_grad_()
    loss = rows(x, target, **options)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad((loss * upstream.double()).sum(), x)
    return loss.detach(), grad
