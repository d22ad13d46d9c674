"""What samplers share: epochs that a seed fixes, dealt out among ranks."""

from __future__ import annotations

import hashlib
import itertools
import operator
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..arguments import check_integer
from ..parallel.ranks import rank_and_world_size

_STEPS = 1 << 62  # of the random offset


class EpochSampler(Sampler[int]):
    """Indices of an epoch that depends on ``seed`` and ``set_epoch`` alone; a subclass draws it."""

    _total: int
    """Samples of an epoch, over all ranks a multiple of their number."""

    def __init__(self, rank: int | None, world_size: int | None, seed: int) -> None:
        self.rank, self.world_size = rank_and_world_size(rank, world_size)
        check_integer("seed", seed, high=2**64 - 1)
        self.seed = operator.index(seed)
        self.epoch = 0
        self._gone_through: int | None = None  # the last epoch, unless set_epoch was called since
        self._warned = False

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, an int >= 0, that the next iteration goes through."""
        check_integer("epoch", epoch, 0)
        self.epoch = operator.index(epoch)
        self._gone_through = None

    def __len__(self) -> int:
        """Samples of this rank."""
        return self._total // self.world_size

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        if epoch == self._gone_through and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} goes through epoch {epoch} once more, the same samples in the same order: call "
                "set_epoch(epoch) before every epoch",
                stacklevel=2,
            )
        *others, last = self._drawn(epoch)
        yield from others
        self._gone_through = epoch  # before the last: who counts batches never asks for the end
        yield last

    def _drawn(self, epoch: int) -> list[int]:
        """This rank's indices."""
        generator = torch.Generator("cpu").manual_seed(_mixed(self.seed, epoch))
        step = int(torch.randint(_STEPS, (), generator=generator, device="cpu"))
        whole = self._draw_epoch(step, generator)
        return whole[randperm(whole.numel(), generator)][self.rank :: self.world_size].tolist()

    def _draw_epoch(self, step: int, generator: torch.Generator) -> Tensor:
        """The epoch's indices in any order; ``step`` is for :func:`quotas`."""
        raise NotImplementedError


def randperm(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device="cpu")


def quotas(sizes: Sequence[int], total: int, step: int) -> list[int]:
    """``total`` shared out by size, each share rounded down or up: one offset rounds all the running sums.

    The offset is ``step`` of 2^62. In whole numbers alone, so that nothing drifts: the last sum is the total.
    """
    whole = sum(sizes)
    offset = whole * step // _STEPS
    ends = [(end * total + offset) // whole for end in itertools.accumulate(sizes)]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _mixed(seed: int, epoch: int) -> int:
    """A seed of 64 bits; their sum would make epoch 1 of a seed epoch 0 of the next."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "little", signed=True)
