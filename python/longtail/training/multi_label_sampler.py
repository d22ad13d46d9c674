"""Re-sampling of rows with several labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..arguments import check_choice, check_number
from ..class_balance.arrays import Array, check_positive_int
from ..class_balance.label_rows import LabelRows, label_rows
from ..class_balance.weights import effective_number
from .epoch_sampler import EpochSampler, quotas, randperm

MultiLabelSamplingMode: TypeAlias = Literal["oversample", "square_root", "effective_number"]
MODES = ("oversample", "square_root", "effective_number")
ROW_WEIGHTS = ("rarest", "mean")


class MultiLabelSampler(EpochSampler):
    """Indices of a data set whose rows have several labels, or none, drawn by the frequency of a row's labels.

    ======================  ============================================
    mode                    weight of class c
    ======================  ============================================
    "oversample"            ``1 / n_c``
    "square_root"           ``n_c^(-1/2)``
    "effective_number"      ``1 / effective_number(n_c, beta)``
    ======================  ============================================

    A row weighs as its rarest label (the largest of its labels' weights, as with the repeat factors of Gupta et al.
    2019, LVIS, which are those of "square_root" with a threshold) or as the mean of its labels. Rows without labels are
    a class of their own. With one label a row the classes' shares are those of :class:`ClassBalancedSampler`; with
    several, common labels come along with the rare ones beside them: ``label_shares`` tells how often.

    A row's expected number of times in an epoch is ``num_samples * row_shares``, and each epoch has it that often,
    rounded down or up at random (systematic sampling, in random order), or, with ``replacement``, rows are drawn
    independently. Epochs, ``seed``, ``set_epoch`` and ranks are as in :class:`ClassBalancedSampler`.

    Args:
        targets: the labels of N >= 1 rows: multi-hot [N, C], bool or floating point in [0, 1], dense, or sparse of
            torch or scipy; or a list, set, tensor or array of class indices for each row. Soft targets y weigh as in
            :func:`longtail.class_balanced_loss`: ``max(y w) / max(y)`` and ``sum(y w) / sum(y)``.
        mode: as above.
        num_samples: of an epoch over all ranks, rounded up to a multiple of ``world_size``; default N.
        row_weight: "rarest" or "mean".
        beta: in [0, 1]; for "effective_number", which has no default for it.
        replacement: whether rows are drawn independently.
        rank, world_size: of this process; default those of ``torch.distributed`` where it is initialised, else 0, 1.
        seed: the same on every rank; an int as ``torch.manual_seed`` takes it, from -2^63 to 2^64 - 1.

    Raises:
        TypeError, ValueError, IndexError: an argument is of the wrong type or out of range; the targets could be read
            in two ways.
    """

    def __init__(
        self,
        targets: Tensor | Sequence[Any] | Array,
        mode: MultiLabelSamplingMode = "oversample",
        num_samples: int | None = None,
        *,
        row_weight: Literal["rarest", "mean"] = "rarest",
        beta: float | None = None,
        replacement: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rank, world_size, seed)
        check_choice("mode", mode, MODES)
        check_choice("row_weight", row_weight, ROW_WEIGHTS)
        if (beta is None) != (mode != "effective_number"):
            raise ValueError(f'beta is {beta}, expected a number with mode="effective_number" and None without it')
        labels = label_rows(targets).cpu()
        count = labels.shape[0]
        if count < 1:
            raise ValueError(f"targets have shape {list(labels.shape)}, expected [N, C] with N >= 1")
        self.mode, self.row_weight, self.replacement = mode, row_weight, replacement
        weights = _row_weights(labels, mode, row_weight, beta)
        bits = min(52, 62 - count.bit_length())  # so that int64 holds their sum
        self._sizes = (weights / weights.max() * 2.0**bits).round().long().clamp(min=1)
        shares = self.row_shares[labels.rows]
        self._label_shares = labels.of_classes(shares, labels.shape[1])
        total = count if num_samples is None else num_samples
        check_positive_int("num_samples", total)
        self._total = -(-total // self.world_size) * self.world_size

    @property
    def row_shares(self) -> Tensor:
        """Expected share of each row in an epoch, float64 [N], summing to 1."""
        return self._sizes.double() / self._sizes.sum()

    @property
    def label_shares(self) -> Tensor:
        """Expected share of an epoch's rows that have each label, float64 [C]; no sum of 1."""
        return self._label_shares.clone()

    def _draw_epoch(self, step: int, generator: torch.Generator) -> Tensor:
        if self.replacement:
            ends = self._sizes.cumsum(0)
            places = torch.randint(int(ends[-1]), (self._total,), generator=generator, device="cpu")
            return torch.searchsorted(ends, places, right=True)
        order = randperm(self._sizes.numel(), generator)  # else neighbours would always take each other's turn
        times = quotas(self._sizes[order].tolist(), self._total, step)
        return order.repeat_interleave(torch.tensor(times, device="cpu"))


def _row_weights(labels: LabelRows, mode: str, row_weight: str, beta: float | None) -> Tensor:
    """float64 [N]."""
    values = labels.values.double()
    every = torch.zeros(labels.shape[0], dtype=torch.float64, device="cpu")
    bare = every.index_fill(0, labels.rows, 1.0) == 0
    counts = torch.cat([labels.of_classes(values, labels.shape[1]), bare.sum()[None]])
    weights = torch.where(counts > 0, _class_weights(counts.clamp(min=1e-300), mode, beta), 0.0)
    weighted = values * weights[labels.classes]
    if row_weight == "rarest":
        of_rows, norms = (every.scatter_reduce(0, labels.rows, x, "amax") for x in (weighted, values))
    else:
        of_rows, norms = (every.index_add(0, labels.rows, x) for x in (weighted, values))
    return torch.where(bare, weights[-1], of_rows / torch.where(bare, 1.0, norms))


def _class_weights(counts: Tensor, mode: str, beta: float | None) -> Tensor:
    if beta is not None:
        return 1 / effective_number(counts, check_number("beta", beta, 0.0, 1.0), dtype=torch.float64)
    return counts.rsqrt() if mode == "square_root" else counts.reciprocal()
