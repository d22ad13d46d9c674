"""Statistics of rows whose classes are shared out over ranks: what each rank sends, and how the pieces combine.

    accumulate (local) -> pack -> all-gather -> combine in rank order -> finish

A rank sends few numbers per row: m, d and its reference logit; t where the complement entropy is wanted, U under label
smoothing, the target's class weight where every rank knows only its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .distributed import sum_in_rank_order
from .handshake import Handshake
from .reference import shifted_exp


class Traffic(NamedTuple):
    """What of a row travels besides m, d and the reference logit."""

    entropy: bool
    """t"""
    smoothing: bool
    """U"""
    weight: bool
    """w_g"""

    @property
    def columns(self) -> tuple[int, ...]:
        """Of the statistics m, d, t, u_g, U."""
        return tuple(k for k, sent in enumerate((True, True, self.entropy, True, self.smoothing)) if sent)


class Gathered(NamedTuple):
    """What every rank knows of all rows after the collective."""

    stats: Tensor
    """[N, 5], as of an unsharded row; t and U are 0 where they did not travel."""
    w_g: Tensor | None
    """[N], where it travelled."""
    weight_sum: Tensor
    """Sum of the class weights of all ranks, or the number of classes, 0-d."""


class Local(NamedTuple):
    """What this rank finds of all rows."""

    stats: Tensor
    """[N, 5]"""
    w_g: Tensor | None
    """[N]"""
    weight_sum: Tensor
    """0-d, of this rank's classes."""

    def packed(self, traffic: Traffic) -> Tensor:
        """What travels."""
        parts = [self.stats[:, k] for k in traffic.columns]
        if traffic.weight:
            assert self.w_g is not None
            parts.append(self.w_g)
        return torch.cat([torch.stack(parts).reshape(-1), self.weight_sum.to(self.stats.dtype).reshape(1)])


def gather(local: Callable[[], Local], target: Tensor, traffic: Traffic, handshake: Handshake) -> Gathered:
    """One all-gather of the ranks' statistics, and their combination: bitwise the same on every rank.

    ``target``: [N] global classes.
    """
    received = handshake.gather(lambda: local().packed(traffic))
    sent = len(traffic.columns) + traffic.weight
    columns = received[:, :-1].unflatten(1, (sent, len(target))).transpose(0, 1)  # [columns, P, N]
    owner = handshake.owners(target)
    found = dict(zip(traffic.columns, columns, strict=False))
    omega = received[:, -1]
    owned_w = columns[-1].gather(0, owner[None])[0] if traffic.weight else None
    return Gathered(combine_shards(found, omega, owner), owned_w, sum_in_rank_order(omega))


def combine_shards(columns: dict[int, Tensor], omega: Tensor, owner: Tensor) -> Tensor:
    """The statistics [N, 5] of whole rows from those of their shards, in rank order.

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
