"""One shard of the classes: its steps by the operators, and how the statistics of shards combine to those of a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import operators
from ..options import SoftmaxOptions
from ..reference.effective import TargetTerms
from ..reference.softmax import RowGrad, shifted_exp

IGNORED, ELSEWHERE = -100, -1
"""Local targets that are no class of this rank: of an ignored row, and of a class that another rank holds."""


def local_target(target: Tensor, start: int, size: int, ignore_index: int) -> Tensor:
    """Global classes as the operators of the shard of ``size`` classes from ``start`` on take them."""
    local = target - start
    elsewhere = (local < 0) | (local >= size)
    return local.masked_fill(elsewhere, ELSEWHERE).masked_fill(target == ignore_index, IGNORED)


def target_terms(target_logits: Tensor, local_target: Tensor, options: SoftmaxOptions, dtype: torch.dtype) -> Tensor:
    """What the targets' classes of this shard bring to the effective logits of all others, [N, 3] of ``dtype``.

    ``target_logits`` [N]: the logits of the targets, anything where they are in another shard. ``options`` with the
    vectors of the shard's classes.
    """
    return torch.stack(TargetTerms.of(target_logits.to(dtype), local_target, options), 1)


def _of_logits(options: SoftmaxOptions, terms: Tensor | None) -> tuple[Tensor | None, ...]:
    return (options.class_scale, options.target_scale, options.class_mitigation, terms)


def accumulate(logits: Tensor, local_target: Tensor, options: SoftmaxOptions, terms: Tensor | None = None) -> Tensor:
    """The statistics [N, 5] of a shard; ``options`` with the vectors of its classes, ``terms`` of all shards."""
    vectors = (options.weight, options.class_bias, options.class_margin, *_of_logits(options, terms))
    numbers = (options.label_smoothing != 0, options.scale, options.softcap or 0.0, options.compensation)
    return operators.softmax_loss_accumulate(logits, local_target, *vectors, IGNORED, *numbers)


def apply_options(
    options: SoftmaxOptions, ignore_index: int, weight: Tensor | None = None, terms: Tensor | None = None
) -> tuple[Any, ...]:
    """What ``softmax_loss_apply`` takes after the coefficients."""
    numbers = (options.scale, options.softcap or 0.0, options.compensation)
    return (weight, options.class_bias, *_of_logits(options, terms), ignore_index, *numbers)


def packed(row_grad: RowGrad, upstream: Tensor) -> Tensor:
    """[N, 5], of all shards of a row: what :func:`apply` takes; ``upstream`` [N]."""
    return torch.stack(row_grad.times(upstream), 1)


def apply(
    logits: Tensor,
    local_target: Tensor,
    row_grad: Tensor,
    options: SoftmaxOptions,
    inplace: bool,
    terms: Tensor | None = None,
) -> Tensor:
    """The gradient of a shard's logits, written over them where ``inplace``; ``row_grad`` :func:`packed`."""
    weight = options.weight if options.label_smoothing else None  # times 0 otherwise, which may be NaN
    others = (row_grad, *apply_options(options, IGNORED, weight, terms))
    if not inplace:
        return operators.softmax_loss_apply(logits, local_target, *others)
    operators.softmax_loss_apply_(logits, local_target, *others)
    return logits


def sum_in_rank_order(x: Tensor) -> Tensor:
    """The sum of ``x`` [P, ...] over shards, as a tree over neighbours: the same bits wherever the same ``x`` is."""
    while x.shape[0] > 1:
        pairs = x.shape[0] // 2
        joined = x[0 : 2 * pairs : 2] + x[1 : 2 * pairs : 2]
        x = joined if 2 * pairs == x.shape[0] else torch.cat([joined, x[-1:]])
    return x[0]


def combine_shards(columns: dict[int, Tensor], omega: Tensor, owner: Tensor) -> Tensor:
    """The statistics [N, 5] of whole rows from those of their shards, in order.

    ``columns``: [P, N] by their place among the statistics; t and U may be absent. ``omega`` [P]: the sum of each
    shard's class weights, by which ``U = sum_s U_s + omega_s (r_s - u_g)`` moves from a shard's own reference logit r_s
    to that of the target. ``owner`` [N]: the shard that holds the target.
    """
    shard_m, shard_d, references = columns[0], columns[1], columns[3]
    m = shard_m.amax(0)
    factor, shift = shifted_exp(shard_m, m)
    d = sum_in_rank_order(factor * shard_d)
    zero = torch.zeros_like(d)
    t = sum_in_rank_order(factor * (columns[2] + shard_d * shift)) if 2 in columns else zero
    u_g = references.gather(0, owner[None])[0]
    U = zero
    if 4 in columns:
        finite = references.masked_fill(references == -torch.inf, 0.0)
        distance = finite - finite.gather(0, owner[None])
        ranks = torch.arange(len(omega), device=owner.device)[:, None]
        settled = (ranks == owner) | (omega[:, None] == 0)
        U = sum_in_rank_order(torch.where(settled, columns[4], columns[4] + omega[:, None] * distance))
    return torch.stack([m, d, t, u_g, U], 1)
