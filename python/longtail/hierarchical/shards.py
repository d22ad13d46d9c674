"""One shard of the classes: its steps by the operators, and how the statistics of shards combine to those of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import operators
from ..options import HierarchicalOptions
from ..reference.softmax import shifted_exp
from ..softmax.shards import sum_in_rank_order


def accumulate(logits: Tensor, target: Tensor, options: HierarchicalOptions) -> Tensor:
    """The statistics [N, 2 L + 1] of a shard; targets among all classes."""
    return operators.hierarchical_loss(logits, target, *options)[1]


def combine_shards(columns: Tensor, owner: Tensor) -> Tensor:
    """The statistics [N, 2 L + 1] of whole rows from those of their shards, [P, 2 L + 1, N], in order.

    ``owner`` [N]: the shard that holds the target.
    """
    shard_m, shard_d = columns[:, :-1:2], columns[:, 1::2]
    m = shard_m.amax(0)
    factor, _ = shifted_exp(shard_m, m)
    rings = torch.stack([m, sum_in_rank_order(factor * shard_d)], 1).flatten(0, 1)
    return torch.cat([rings, columns[:, -1].gather(0, owner[None])]).t().contiguous()


def apply(
    logits: Tensor, target: Tensor, factor: Tensor, stats: Tensor, options: HierarchicalOptions, inplace: bool
) -> Tensor:
    """The gradient of a shard's logits, written over them where ``inplace``.

    ``factor`` [N]: what multiplies that of each row's loss; ``stats``: of whole rows.
    """
    if not inplace:
        return operators.hierarchical_loss_backward(factor, logits, target, stats, *options)
    operators.hierarchical_loss_backward_(factor, logits, target, stats, *options)
    return logits
