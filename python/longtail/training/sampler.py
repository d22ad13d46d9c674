"""Re-sampling: a sampler whose epochs hold chosen shares of the classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..arguments import check_choice, check_number
from ..class_balance.arrays import Array, check_positive_int, integer_labels
from ..class_balance.counting import class_counts
from ..class_balance.weights import effective_number
from .epoch_sampler import EpochSampler, quotas, randperm

SamplingMode: TypeAlias = Literal["oversample", "undersample", "square_root", "effective_number"]
MODES = ("oversample", "undersample", "square_root", "effective_number")


class ClassBalancedSampler(EpochSampler):
    """Indices of a data set, drawn so that each class has a chosen share of every epoch.

    ======================  =====================================  ======================================
    mode                    share of class c                       samples per epoch, unless given
    ======================  =====================================  ======================================
    "oversample"            equal (Kang et al. 2020, q = 0)        C * n_max: the largest class once
    "undersample"           equal                                  C * n_min: nothing is repeated
    "square_root"           ``n_c^(1/2)`` (Mahajan et al. 2018)    N, the size of the data set
    "effective_number"      ``n_c / effective_number(n_c, beta)``  N
    ======================  =====================================  ======================================

    C counts the classes that occur. The last mode gives each sample the probability that class-balanced weights would
    give it as a weight (Cui et al. 2019). A class gets its share of the epoch, rounded down or up at random such that
    its expected number of samples is exactly the share (systematic sampling), and these are drawn from all its samples
    at random: each used once before any is used twice, or, with ``replacement``, independently.

    An epoch depends on ``seed`` and ``set_epoch`` alone: a second pass through the same one warns, once, that it draws
    the same samples again. Over several ranks it is one epoch dealt out in turn, as ``DistributedSampler`` deals: equal
    lengths, no position twice. Lightning and the Hugging Face Trainer call ``set_epoch`` themselves. Both would deal
    the epoch out once more: tell Lightning ``use_distributed_sampler=False``, and give the sampler
    ``rank=0, world_size=1`` where it goes to the Trainer (or through accelerate).

    Args:
        targets: the class of each sample, integers [N], N >= 1; negative ones are refused.
        mode: as above.
        num_samples: of an epoch over all ranks, rounded up to a multiple of ``world_size`` (down when under-sampling).
        beta: in [0, 1]; for "effective_number", which has no default for it.
        replacement: whether a class's samples are drawn independently.
        rank, world_size: of this process; default those of ``torch.distributed`` where it is initialised, else 0, 1.
        seed: the same on every rank; an int as ``torch.manual_seed`` takes it, from -2^63 to 2^64 - 1.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range; under-sampling without replacement
            is asked for more than C * n_min samples.
    """

    def __init__(
        self,
        targets: Tensor | Sequence[int] | Array,
        mode: SamplingMode = "oversample",
        num_samples: int | None = None,
        *,
        beta: float | None = None,
        replacement: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rank, world_size, seed)
        check_choice("mode", mode, MODES)
        labels = integer_labels(targets).cpu()
        if labels.dim() != 1 or labels.numel() < 1:
            raise ValueError(f"targets have shape {list(labels.shape)}, expected [N] with N >= 1")
        self.mode = mode
        self.replacement = replacement
        counts = class_counts(labels, int(labels.max().clamp(min=0)) + 1)
        present = counts > 0
        self._counts = counts[present]
        self._members = labels.argsort(stable=True)  # by class; class c starts where the smaller classes end
        self._shares = torch.zeros_like(counts, dtype=torch.float64)
        sizes = _sizes(self._counts, mode, beta)
        self._shares[present] = sizes / sizes.sum()
        self._sizes = [int(math.ldexp(size, 52)) for size in sizes.tolist()]  # exact but for a bit: none is below 1
        self._total = self._epoch_length(num_samples)

    @property
    def class_shares(self) -> Tensor:
        """Expected share of each class in an epoch, float64 [max(targets) + 1], summing to 1."""
        return self._shares.clone()

    def _epoch_length(self, num_samples: int | None) -> int:
        classes, ranks = self._counts.numel(), self.world_size
        once = classes * int(self._counts.min())
        defaults = {"oversample": classes * int(self._counts.max()), "undersample": once}
        total = defaults.get(self.mode, int(self._counts.sum())) if num_samples is None else num_samples
        check_positive_int("num_samples", total)
        if self.mode != "undersample":
            return -(-total // ranks) * ranks
        if total > once and not self.replacement:
            raise ValueError(f"num_samples is {total}, expected at most {once}, so that no sample is repeated")
        if total < ranks:
            raise ValueError(f"num_samples is {total}, expected at least world_size = {ranks}")
        return total // ranks * ranks

    def _draw_epoch(self, step: int, generator: torch.Generator) -> Tensor:
        drawn, start = [], 0
        for count, quota in zip(self._counts.tolist(), quotas(self._sizes, self._total, step), strict=True):
            drawn.append(self._members[start + self._draw(count, quota, generator)])
            start += count
        return torch.cat(drawn)

    def _draw(self, count: int, quota: int, generator: torch.Generator) -> Tensor:
        """``quota`` numbers below ``count``."""
        if self.replacement:
            return torch.randint(count, (quota,), generator=generator, device="cpu")
        rounds = [randperm(count, generator) for _ in range(-(-quota // count))]
        return torch.cat(rounds)[:quota] if rounds else self._members[:0]


def _sizes(counts: Tensor, mode: str, beta: float | None) -> Tensor:
    """What the shares of the present classes are proportional to, float64."""
    if (beta is None) != (mode != "effective_number"):
        raise ValueError(f'beta is {beta}, expected a number with mode="effective_number" and None without it')
    sizes = counts.double()
    if mode == "square_root":
        sizes = sizes.sqrt()
    elif beta is not None:
        sizes = sizes / effective_number(counts, check_number("beta", beta, 0.0, 1.0), dtype=torch.float64)
    else:
        sizes = torch.ones_like(sizes)
    return sizes
