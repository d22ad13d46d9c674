"""The losses as one writes them in plain PyTorch: the eager contender, and what torch.compile is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longtail.experiments.plain_losses import Level, complement_entropy


def effective_logits(
    logits: Tensor,
    index: Tensor,
    class_bias: Tensor | None,
    class_margin: Tensor | None,
    scale: float,
    softcap: float | None,
    class_scale: Tensor | None = None,
    target_scale: Tensor | None = None,
    class_mitigation: Tensor | None = None,
    compensation: float = 0.0,
) -> Tensor:
    """Float32 logits [N, C], scaled, capped, biased, the margin taken off the class in ``index`` [N, 1]; Seesaw."""
    u = logits.float()
    if scale != 1:
        u = u * scale
    if softcap is not None:
        u = softcap * torch.tanh(u / softcap)
    if class_scale is not None:
        u = u * class_scale
    if target_scale is not None:
        u = u * target_scale[index]
    if class_bias is not None:
        u = u + class_bias
    if class_mitigation is not None or compensation:
        u = u + seesaw_factor(u.detach(), index, class_mitigation, compensation)
    if class_margin is not None:
        u = u.scatter_add(1, index, -class_margin[index])
    return u


def seesaw_factor(x: Tensor, index: Tensor, class_mitigation: Tensor | None, compensation: float) -> Tensor:
    """The logarithm of Seesaw's factor [N, C]: of the class in ``index`` [N, 1] itself 0."""
    factor = compensation * (x - x.gather(1, index)).clamp(min=0)
    return factor if class_mitigation is None else factor + (class_mitigation - class_mitigation[index]).clamp(max=0)


def softmax_loss(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N] int64
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    complement_gamma: float = 0.0,
    class_bias: Tensor | None = None,
    class_margin: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    **tail: Any,
) -> Tensor:
    """Mean loss with the options of :func:`longtail.cross_entropy`; an option that is off costs nothing.

    Half logits are taken to float32 first, as autocast does. For the moderate margins of the benchmark only: 1 - p
    is computed from p.
    """
    num_classes, index = logits.shape[1], target.clamp(min=0)[:, None]
    u = effective_logits(logits, index, class_bias, class_margin, scale, softcap, **tail)
    log_p = F.log_softmax(u, 1)
    log_p_g = log_p.gather(1, index).squeeze(1)
    w_g = torch.ones_like(log_p_g) if weight is None else weight[index].squeeze(1)
    loss = -w_g * log_p_g
    if label_smoothing:
        smooth = log_p.sum(1) if weight is None else log_p @ weight
        loss = (1 - label_smoothing) * loss - label_smoothing / num_classes * smooth
    if focal_gamma:
        loss = (1 - log_p_g.exp()) ** focal_gamma * loss
    if complement_gamma:
        loss = loss + complement_gamma / (num_classes - 1) * w_g * complement_entropy(u, index.squeeze(1))
    if sample_weight is not None:
        loss = sample_weight * loss
    if z_loss:
        loss = loss + z_loss * u.logsumexp(1).square()
    ignored = target == ignore_index
    return loss.masked_fill(ignored, 0.0).sum() / w_g.masked_fill(ignored, 0.0).sum()


def policy_loss(log_prob: Tensor, entropy: Tensor) -> Tensor:
    """Mean negative log-probability with an entropy bonus, from a number [N] of each for every row."""
    return -(log_prob + 0.1 * entropy).mean()


def statistics_loss(logits: Tensor, target: Tensor) -> Tensor:
    """:func:`policy_loss` of logits [N, C], float32; half logits are taken to float32 first."""
    log_p = F.log_softmax(logits.float(), 1)
    return policy_loss(log_p.gather(1, target[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1))


def hierarchical_loss(logits: Tensor, target: Tensor, *, levels: Sequence[Level], alpha: float) -> Tensor:
    """Mean hierarchical cross-entropy (Bertinetto et al. 2020, section 3.1) of logits [N, C] and target [N] int64.

    The authors multiply probabilities by two one-hot tables [C, C, depth], of 17 GB each at 32768 classes; this gathers
    the classes of the nodes above the target, and stays with logarithms. ``levels``: from below the root down to the
    nodes above the classes. Half logits are taken to float32 first, as autocast does.
    """
    log_p = F.log_softmax(logits.float(), 1)
    log_nodes = [torch.zeros_like(log_p[:, 0])]  # of the root
    for level in levels:
        members = level.members[level.node[target]]
        log_members = log_p.gather(1, members.clamp(min=0)).masked_fill(members < 0, -torch.inf)
        log_nodes.append(log_members.logsumexp(1))
    log_nodes.append(log_p.gather(1, target[:, None]).squeeze(1))
    loss = torch.zeros_like(log_nodes[0])
    for depth, (above, below) in enumerate(pairwise(log_nodes), 1):
        loss = loss + math.exp(-alpha * depth) * (above - below)
    return loss.mean()


def asymmetric_loss(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N, C], 0 or 1
    *,
    gamma_positive: float = 1.0,
    gamma_negative: float = 4.0,
    clip: float = 0.05,
) -> Tensor:
    """Mean asymmetric loss (Ridnik et al. 2021, p_m of eq. 4), with timm 1.0.31's operations and its floor of 1e-8.

    The gradient takes the focusing factors for constants, as the authors' and timm's option
    ``disable_torch_grad_focal_loss`` does: without it eager PyTorch differentiates the powers, too, and is slower.
    Half logits are taken to float32 first, as in timm.
    """
    p, y = torch.sigmoid(logits.float()), target.float()
    q = (1 - p + clip).clamp(max=1)  # 1 - p_m
    loss = y * p.clamp(min=1e-8).log()
    loss = loss + (1 - y) * q.clamp(min=1e-8).log()
    with torch.no_grad():
        p_t = p * y + q * (1 - y)
        factor = (1 - p_t) ** (gamma_positive * y + gamma_negative * (1 - y))
    return -(loss * factor).mean()


def distribution_balanced_loss(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N, C], 0 or 1
    *,
    class_bias: Tensor,
    inverse_counts: Tensor,
    gamma: float = 2.0,
    negative_scale: float = 2.0,
    rebalance_alpha: float,
    rebalance_beta: float,
    rebalance_mu: float,
) -> Tensor:
    """Mean distribution-balanced loss (Wu et al. 2020, with the focal factor) for given class vectors [C].

    timm 1.0.31's operations, but for a factor of 2 that is not in the paper. Half logits are taken to float32 first, as
    in timm.
    """
    u, y = logits.float() + class_bias, target.float()
    # Of a row without labels the ratio is to be large, not infinite.
    drawn = (y * inverse_counts).sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    weight = rebalance_alpha + torch.sigmoid(rebalance_beta * (inverse_counts / drawn - rebalance_mu))
    positive = torch.sigmoid(-u) ** gamma * F.softplus(-u)
    negative = torch.sigmoid(negative_scale * u) ** gamma * F.softplus(negative_scale * u) / negative_scale
    return (weight * (y * positive + (1 - y) * negative)).mean()


def _sides(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 logits [N, C] of what is no label, and with the other sign of the labels; -inf in the other's place."""
    u, label = logits.float(), target > 0
    return u.masked_fill(label, -torch.inf), (-u).masked_fill(~label, -torch.inf)


def zlpr_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean ZLPR (Su et al. 2022) of logits [N, C] and target [N, C], 0 or 1.

    timm 1.0.31 appends a logit of 0 to both sides, a copy of each more. Half logits are taken to float32 first, as in
    timm.
    """
    others, labels = (F.softplus(side.logsumexp(1)) for side in _sides(logits, target))
    return (others + labels).mean()


def two_way_loss(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N, C], 0 or 1
    *,
    positive_temperature: float = 4.0,
    negative_temperature: float = 1.0,
) -> Tensor:
    """Mean two-way loss over the classes of each row that has a label (Kobayashi 2023).

    timm 1.0.31 has these operations, and the same over the rows of each class. Half logits are taken to float32 first,
    as in timm.
    """
    others, labels = _sides(logits, target)
    hard_others = negative_temperature * (others / negative_temperature).logsumexp(1)
    hard_labels = positive_temperature * (labels / positive_temperature).logsumexp(1)  # -inf: no label, a loss of 0
    return F.softplus(hard_others + hard_labels).sum() / (target > 0).any(1).sum()


def one_hot(target: Tensor, like: Tensor) -> Tensor:
    """1 at the class of each row, else 0, in the shape and dtype of ``like``."""
    return torch.zeros_like(like).scatter_(1, target.unsqueeze(1), 1.0)


def sigmoid_loss(logits: Tensor, target: Tensor, *, alpha: float | None, gamma: float) -> Tensor:
    """Mean sigmoid focal loss as torchvision writes it, on a one-hot target where the target is a class.

    Half logits are taken to float32 first, as autocast does.
    """
    z = logits.float()
    y = target.float() if target.is_floating_point() else one_hot(target, z)
    loss = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    if gamma:
        p = torch.sigmoid(z)
        loss = loss * (1 - (p * y + (1 - p) * (1 - y))) ** gamma
    if alpha is not None:
        loss = (alpha * y + (1 - alpha) * (1 - y)) * loss
    return loss.mean()
