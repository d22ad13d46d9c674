"""Statistics of rows whose classes are shared out over ranks: what each rank sends, and how the pieces combine.

    accumulate (local) -> pack -> all-gather -> combine in rank order -> finish

A rank sends few numbers per row: m, d and its reference logit; t where the complement entropy is wanted, U under label
smoothing, the target's class weight where every rank knows only its own. Before that, three more: what the target
brings to the logits of all classes, where its rank alone knows.
"""

from __future__ import annotations

from collections.abc import Callable, Container
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
    terms: bool
    """Of the target's class, ahead."""
    scales: tuple[str, ...]
    """Class vectors of which a rank says how large its own are."""

    @classmethod
    def of(cls, options: SoftmaxOptions, return_stats: bool, own: Container[str]) -> Traffic:
        """``own``: the class vectors of which ranks know their own classes alone."""
        entropy = options.complement_coefficient != 0 or return_stats
        terms = options.compensation != 0 or "target_scale" in own or "class_mitigation" in own
        scales = tuple(name for name in ("class_scale", "target_scale") if name in own)
        return cls(entropy, options.label_smoothing != 0, "weight" in own, terms, scales)

    @property
    def columns(self) -> tuple[int, ...]:
        """Of the statistics m, d, t, u_g, U."""
        return tuple(k for k, sent in enumerate((True, True, self.entropy, True, self.smoothing)) if sent)


class Gathered(NamedTuple):
    """What every rank knows of all rows after the collective."""

    stats: Tensor
    """[N, S], as of an unsharded row; of softmax t and U are 0 where they did not travel."""
    w_g: Tensor | None
    """[N], where it travelled."""
    weight_sum: Tensor
    """Sum of the class weights of all ranks, or the number of classes, 0-d."""
    terms: Tensor | None = None
    """[N, 3], what the targets bring to the effective logits of all classes, where they bring anything."""
    scales: Tensor | None = None
    """The largest of all ranks, of each that travels, where one does."""


class Spent(NamedTuple):
    """What of rows makes the gradient of their logits."""

    row_grad: Tensor
    """[N, 5], times the upstream gradients of the rows."""
    terms: Tensor | None
    """[N, 3], as gathered."""


class Local(NamedTuple):
    """What this rank finds of all rows."""

    stats: Tensor
    """[N, 5]"""
    w_g: Tensor | None
    """[N]"""
    weight_sum: Tensor
    """0-d, of this rank's classes."""
    scales: Tensor
    """The largest of this rank's classes, of each that travels."""

    def packed(self, traffic: Traffic) -> Tensor:
        """What travels."""
        parts = [self.stats[:, k] for k in traffic.columns]
        if traffic.weight:
            assert self.w_g is not None
            parts.append(self.w_g)
        weight_sum = self.weight_sum.to(self.stats.dtype)
        return torch.cat([torch.stack(parts).reshape(-1), self.scales, weight_sum.reshape(1)])


def gather(local: Callable[[], Local], target: Tensor, traffic: Traffic, handshake: Handshake) -> Gathered:
    """One all-gather of the ranks' statistics, and their combination: bitwise the same on every rank.

    ``target``: [N] global classes.
    """
    received = handshake.gather(lambda: local().packed(traffic))
    sent = len(traffic.columns) + traffic.weight
    rows, scales, omega = received.tensor_split((sent * len(target), received.shape[1] - 1), 1)
    columns = rows.unflatten(1, (sent, len(target))).transpose(0, 1)  # [columns, P, N]
    owner = handshake.owners(target)
    found = dict(zip(traffic.columns, columns, strict=False))
    owned_w = columns[-1].gather(0, owner[None])[0] if traffic.weight else None
    stats, weight_sum = combine_shards(found, omega[:, 0], owner), sum_in_rank_order(omega[:, 0])
    return Gathered(stats, owned_w, weight_sum, scales=scales.amax(0) if traffic.scales else None)
