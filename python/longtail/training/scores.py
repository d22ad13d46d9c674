"""Scores by how often a class was seen in training."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..class_balance.counting import class_counts
from ..class_balance.counts import Counts, checked_counts


class LongTailScores(NamedTuple):
    """Accuracies in [0, 1]; NaN where nothing was seen to average over."""

    overall: float  # share of correct samples
    balanced: float  # mean of per_class
    per_class: Tensor  # float64 [C], on the CPU
    many: float  # mean of per_class over the classes with more than ``many`` training samples
    medium: float
    few: float  # over the classes with fewer than ``few`` training samples


class LongTailAveragePrecisions(NamedTuple):
    """Average precisions in [0, 1]; NaN where no positive was seen to average over."""

    mean: float  # of per_class: mAP, macro
    per_class: Tensor  # float64 [C], on the CPU
    many: float  # mean of per_class over the classes with more than ``many`` training samples
    medium: float
    few: float  # over the classes with fewer than ``few`` training samples


def scores_of_samples(
    correct: Tensor, target: Tensor, samples_per_class: Counts, many: float, few: float
) -> LongTailScores:
    """The scores of all samples at once: whether each is ``correct``, bool [N], and its class."""
    counts, _ = checked_counts(samples_per_class)
    seen, right = (class_counts(x, counts.numel()).cpu() for x in (target, target[correct]))
    return scores_of(seen, right, counts, many, few)


def scores_of(seen: Tensor, correct: Tensor, samples_per_class: Tensor, many: float, few: float) -> LongTailScores:
    """The scores of ``correct`` [C] among the samples ``seen`` [C], all on the CPU."""
    per_class = correct.double() / seen.double()
    return LongTailScores(
        overall=(correct.sum().double() / seen.sum()).item(),
        balanced=per_class.nanmean().item(),
        per_class=per_class,
        **means_by_frequency(per_class, samples_per_class, many, few),
    )


def means_by_frequency(per_class: Tensor, samples_per_class: Tensor, many: float, few: float) -> dict[str, float]:
    """Of scores [C], NaN left out, all on the CPU."""
    is_many, is_few = samples_per_class > many, samples_per_class < few
    groups = {"many": is_many, "medium": ~is_many & ~is_few, "few": is_few}
    return {name: per_class[group].nanmean().item() for name, group in groups.items()}
