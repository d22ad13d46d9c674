"""The losses as one writes them in PyTorch, torch's own functions where it has them: the fused ones are timed beside.

All take logits [N, C] and classes [N], and return a mean, 0-d.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    class_bias: Tensor | None = None,
    focal_gamma: float = 0.0,
    complement_gamma: float = 0.0,
) -> Tensor:
    """Mean over the rows, whatever their weights: ``longtail.cross_entropy`` with these options, normalizer "count".

    The entropy of the others is that of their own log-softmax. Taking the target's part off the entropy of all needs no
    second one, and is about 1.5 times as fast, but nothing is left of it in confident rows.
    """
    z = logits if class_bias is None else logits + class_bias
    if not focal_gamma and not complement_gamma:
        return F.cross_entropy(z, target, weight, reduction="sum") / target.numel()
    loss = F.cross_entropy(z, target, reduction="none")
    if focal_gamma:
        loss = (1 - (-loss).exp()) ** focal_gamma * loss
    if complement_gamma:
        loss = loss + complement_gamma / (z.shape[1] - 1) * complement_entropy(z, target)
    return (loss if weight is None else weight[target] * loss).mean()


def complement_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Entropy [N] of the other classes among themselves (Chen et al. 2019)."""
    index = target[:, None]
    log_q = logits.scatter(1, index, -math.inf).log_softmax(1)
    return -(log_q.exp() * log_q.scatter(1, index, 0.0)).sum(1)  # 0 * -inf would be NaN at the target


def margin_loss(logits: Tensor, target: Tensor, margin: Tensor, scale: float, weight: Tensor) -> Tensor:
    """Of cosines, a margin [C] taken off the target's, then scaled (Cao et al. 2019); mean by the weights [C]."""
    shifted = logits.scatter_add(1, target[:, None], -margin[target][:, None])
    return F.cross_entropy(scale * shifted, target, weight)


def sigmoid_focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float) -> Tensor:
    """C binary problems a row, their sum times the weight [C] of the row's class."""
    labels = F.one_hot(target, logits.shape[1]).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    missed = 1 - (-losses).exp()
    return (weight[target] * (missed**gamma * losses).sum(1)).mean()


class Level(NamedTuple):
    """The nodes of one depth of a tree, V of them, of at most M classes; int64."""

    node: Tensor  # that each class is below, [C]
    members: Tensor  # the classes below each node, padded by -1, [V, M]


def level_of(node: Tensor) -> Level:
    """Of the nodes [C] that the classes are below, numbered from 0."""
    order = node.argsort(stable=True)
    sizes = node.bincount()
    column = torch.arange(len(node)) - (sizes.cumsum(0) - sizes)[node[order]]
    members = torch.full((len(sizes), int(sizes.max())), -1)
    members[node[order], column] = order
    return Level(node, members)


def levels_of(paths: list[tuple[str, ...]]) -> list[Level]:
    """From below the root down to the nodes above the classes.

    Raises:
        ValueError: paths differ in length.
    """
    lengths = sorted({len(path) for path in paths})
    if len(lengths) > 1:
        raise ValueError(f"got paths of lengths {lengths[0]} to {lengths[-1]}, expected one length")
    levels = []
    for depth in range(1, len(paths[0])):
        numbers: dict[tuple[str, ...], int] = {}
        levels.append(level_of(torch.tensor([numbers.setdefault(path[:depth], len(numbers)) for path in paths])))
    return levels


def hierarchical_loss(logits: Tensor, target: Tensor, levels: list[Level], alpha: float) -> Tensor:
    """Hierarchical cross-entropy (Bertinetto et al. 2020): lambda of the l-th node of a path is exp(-alpha l), from 1.

    A node is as likely as its classes together. Only those above the target are summed, and as logarithms: their
    normalizer cancels.
    """
    of_nodes = [logits.logsumexp(1)]  # of the root
    for level in levels:
        members = level.members[level.node[target]]
        inside = logits.gather(1, members.clamp(min=0)).masked_fill(members < 0, -math.inf)
        of_nodes.append(inside.logsumexp(1))
    of_nodes.append(logits.gather(1, target[:, None]).squeeze(1))
    terms = [math.exp(-alpha * depth) * (above - below) for depth, (above, below) in enumerate(pairwise(of_nodes), 1)]
    return torch.stack(terms).sum(0).mean()
