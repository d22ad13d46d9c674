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

from ..options import SoftmaxOptions
from ..softmax.shards import combine_shards, sum_in_rank_order
from .handshake import Handshake


class Traffic(NamedTuple):
    """What of a row travels besides m, d and the reference logit."""

    entropy: bool
    """t"""
    smoothing: bool
    """U"""
    weight: bool
    """w_g"""

    @classmethod
    def of(cls, options: SoftmaxOptions, return_stats: bool, own_weights: bool) -> Traffic:
        """``own_weights``: whether ranks know the weights of their own classes alone."""
        entropy = options.complement_coefficient != 0 or return_stats
        return cls(entropy, options.label_smoothing != 0, own_weights)

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
    terms: Tensor | None = None
    """[N, 3], what the targets bring to the effective logits of all classes, where they bring anything."""


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
