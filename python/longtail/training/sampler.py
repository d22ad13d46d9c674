"""Re-sampling: a sampler whose epochs hold chosen shares of the classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..arguments import check_choice, check_number
from ..class_balance import effective_number
from ..counting import Array, check_positive_int, class_counts, integer_labels
from ..ranks import rank_and_world_size

SamplingMode: TypeAlias = Literal["oversample", "undersample", "square_root", "effective_number"]
MODES = ("oversample", "undersample", "square_root", "effective_number")
_STEPS = 1 << 20


class ClassBalancedSampler(Sampler[int]):
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

    An epoch depends on ``seed`` and ``set_epoch`` alone. Over several ranks it is one epoch dealt out in turn, as
    ``DistributedSampler`` deals: equal lengths, no position twice. Lightning and the Hugging Face Trainer call
    ``set_epoch`` themselves. Both would deal the epoch out once more: tell Lightning ``use_distributed_sampler=False``,
    and give the sampler ``rank=0, world_size=1`` where it goes to the Trainer (or through accelerate).

    Args:
        targets: the class of each sample, integers [N], N >= 1; negative ones are refused.
        mode: as above.
        num_samples: of an epoch over all ranks, rounded up to a multiple of ``world_size`` (down when under-sampling).
        beta: in [0, 1]; for "effective_number", which has no default for it.
        replacement: whether a class's samples are drawn independently.
        rank, world_size: of this process; default those of ``torch.distributed`` where it is initialised, else 0, 1.
        seed: the same on every rank.

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
        check_choice("mode", mode, MODES)
        labels = integer_labels(targets).cpu()
        if labels.dim() != 1 or labels.numel() < 1:
            raise ValueError(f"targets have shape {list(labels.shape)}, expected [N] with N >= 1")
        self.mode = mode
        self.replacement = replacement
        self.rank, self.world_size = rank_and_world_size(rank, world_size)
        self.seed = seed
        self.epoch = 0
        counts = class_counts(labels, int(labels.max().clamp(min=0)) + 1)
        present = counts > 0
        self._counts = counts[present]
        self._members = labels.argsort(stable=True)  # by class; class c starts where the smaller classes end
        self._shares = torch.zeros_like(counts, dtype=torch.float64)
        self._shares[present] = _shares(self._counts, mode, beta)
        self._present = present
        self._total = self._epoch_length(num_samples)

    @property
    def class_shares(self) -> Tensor:
        """Expected share of each class in an epoch, float64 [max(targets) + 1], summing to 1."""
        return self._shares.clone()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration goes through."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        """Samples of this rank."""
        return self._total // self.world_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator("cpu").manual_seed(self.seed + self.epoch)
        quotas = self._quotas(generator)
        drawn, start = [], 0
        for count, quota in zip(self._counts.tolist(), quotas.tolist(), strict=True):
            drawn.append(self._members[start + self._draw(count, quota, generator)])
            start += count
        epoch = torch.cat(drawn)
        epoch = epoch[_randperm(epoch.numel(), generator)]
        return iter(epoch[self.rank :: self.world_size].tolist())

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

    def _quotas(self, generator: torch.Generator) -> Tensor:
        """Samples of each present class in this epoch, int64: one random offset rounds all the running sums."""
        ends = self._shares[self._present].cumsum(0) * self._total
        # In steps of 2^-20: sums that are whole but for rounding become whole, and no offset can move them.
        steps = (ends * _STEPS).round().to(torch.int64) + torch.randint(_STEPS, (), generator=generator, device="cpu")
        return steps.div(_STEPS, rounding_mode="floor").diff(prepend=steps.new_zeros(1))

    def _draw(self, count: int, quota: int, generator: torch.Generator) -> Tensor:
        """``quota`` numbers below ``count``."""
        if self.replacement:
            return torch.randint(count, (quota,), generator=generator, device="cpu")
        rounds = [_randperm(count, generator) for _ in range(-(-quota // count))]
        return torch.cat(rounds)[:quota] if rounds else self._members[:0]


def _randperm(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device="cpu")


def _shares(counts: Tensor, mode: str, beta: float | None) -> Tensor:
    """Share of each present class in an epoch."""
    if (beta is None) != (mode != "effective_number"):
        raise ValueError(f'beta is {beta}, expected a number with mode="effective_number" and None without it')
    sizes = counts.double()
    if mode == "square_root":
        sizes = sizes.sqrt()
    elif beta is not None:
        sizes = sizes / effective_number(counts, check_number("beta", beta, 0.0, 1.0), dtype=torch.float64)
    else:
        sizes = torch.ones_like(sizes)
    return sizes / sizes.sum()
