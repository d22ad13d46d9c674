"""Long-tailed subsets of balanced data sets, and accuracy by how often a class was seen in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..arguments import check_choice, check_number, check_tensors
from ..class_balance.counting import (
    Array,
    check_ignore_index,
    check_positive_int,
    class_counts,
    count_indices,
    integer_labels,
)
from ..class_balance.weights import Counts, checked_counts
from ..parallel.ranks import checked_sum, group_or_alone

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Profile: TypeAlias = Literal["exponential", "step"]


def long_tailed_counts(
    max_samples: int, num_classes: int, imbalance_factor: float, profile: Profile = "exponential"
) -> list[int]:
    """Samples per class of a long-tailed data set, most frequent first (Cui et al. 2019; Cao et al. 2019).

    ``long_tailed_counts(5000, 10, 100)`` is long-tailed CIFAR-10.

    Args:
        max_samples: of the most frequent class.
        num_classes: C, at least 1.
        imbalance_factor: largest over smallest count, >= 1 (some papers state its inverse).
        profile: "exponential", ``n_c = int(max_samples * imbalance_factor^(-c / (C - 1)))``; or "step",
            max_samples in the first half of the classes (the larger half of an odd C) and
            ``int(max_samples / imbalance_factor)`` in the others.

    Raises:
        ValueError: the rarest class would be left with no sample at all; or an argument is out of its range.
    """
    check_positive_int("max_samples", max_samples)
    check_positive_int("num_classes", num_classes)
    shares = _shares(num_classes, imbalance_factor, profile)
    if imbalance_factor > max_samples:
        raise ValueError(
            f"imbalance_factor is {imbalance_factor:g}, expected at most {max_samples}, the size of the "
            "largest class, so that the rarest keeps a sample"
        )
    # 49 * (1 / 49) is just below 1 in floating point: a hair is added before the cut.
    return [min(int(max_samples * share * (1 + 1e-12)), max_samples) for share in shares]


def long_tailed_indices(
    targets: Tensor | Sequence[int] | Array,
    imbalance_factor: float,
    profile: Profile = "exponential",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Indices of a random long-tailed subset of a data set; class 0 is its most frequent class.

    The counts are ``long_tailed_counts(n_max, C, imbalance_factor, profile)`` with the largest n_max for
    which every class has enough samples: N / C for a balanced data set, as published. Returns int64 indices
    in increasing order, on the device of ``targets``.

    Args:
        targets: integers [N]; every class from 0 to their maximum occurs.
        imbalance_factor, profile: as in :func:`long_tailed_counts`.
        generator: a CPU generator, default torch's own.

    Raises:
        ValueError: a class does not occur, or the last one would be left empty.
    """
    labels = integer_labels(targets)
    if labels.dim() != 1 or labels.numel() < 1:
        raise ValueError(f"targets have shape {list(labels.shape)}, expected [N] with N >= 1")
    device, labels = labels.device, labels.cpu()
    available = class_counts(labels, int(labels.max().clamp(min=0)) + 1).tolist()
    if 0 in available:
        raise ValueError(f"targets hold no class {available.index(0)}, expected all of 0 to {len(available) - 1}")
    shares = _shares(len(available), imbalance_factor, profile)
    n_max = min(available[0], int(min((have + 1) / share for have, share in zip(available, shares, strict=True))))
    counts = long_tailed_counts(n_max, len(available), imbalance_factor, profile)
    while any(want > have for want, have in zip(counts, available, strict=True)):
        n_max -= 1
        counts = long_tailed_counts(n_max, len(available), imbalance_factor, profile)
    chosen = []
    for c, count in enumerate(counts):
        members = (labels == c).nonzero().flatten()
        chosen.append(members[torch.randperm(members.numel(), generator=generator, device="cpu")[:count]])
    return torch.cat(chosen).sort().values.to(device)


class LongTailScores(NamedTuple):
    """Accuracies in [0, 1]; NaN where nothing was seen to average over."""

    overall: float  # share of correct samples
    balanced: float  # mean of per_class
    per_class: Tensor  # float64 [C]
    many: float  # mean of per_class over the classes with more than ``many`` training samples
    medium: float
    few: float  # over the classes with fewer than ``few`` training samples


class LongTailAccuracy:
    """Streaming accuracy: overall, balanced, per class, many-, medium- and few-shot (Liu et al. 2019).

    Means are over the classes seen in ``update``, each counting the same.

    Args:
        samples_per_class: counts of the *training* set, [C].
        many: classes with more training samples than this are many-shot.
        few: classes with fewer are few-shot; those that are neither are medium-shot.
        ignore_index: target value that does not count, or None.
    """

    def __init__(
        self,
        samples_per_class: Counts,
        many: float = 100,
        few: float = 20,
        *,
        ignore_index: int | None = -100,
    ) -> None:
        self.samples_per_class, _ = checked_counts(samples_per_class)
        self.many = check_number("many", many)
        self.few = check_number("few", few)
        if self.few > self.many:
            raise ValueError(f"few is {few}, expected at most many = {many}, so that no class is in both")
        check_ignore_index(ignore_index)
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Forgets everything seen."""
        self._seen = torch.zeros_like(self.samples_per_class, dtype=torch.int64)
        self._correct = torch.zeros_like(self._seen)

    def update(self, correct: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            correct: bool, such as ``RowStats.correct`` or ``logits.argmax(-1) == target``.
            target: integers of the same shape.
        """
        check_tensors(correct=correct, target=target)
        if correct.dtype != torch.bool:
            raise TypeError(f"correct has dtype {correct.dtype}, expected torch.bool")
        if correct.shape != target.shape:
            raise ValueError(f"correct has shape {list(correct.shape)}, expected {list(target.shape)}, as target")
        num_classes = self._seen.numel()
        self._seen += count_indices(target, num_classes, self.ignore_index).cpu()
        self._correct += count_indices(target[correct], num_classes, self.ignore_index).cpu()

    def compute(self, *, reduce: bool = False, group: ProcessGroup | DeviceMesh | None = None) -> LongTailScores:
        """The scores of everything seen since construction or ``reset``.

        Args:
            reduce: of everything that the ranks of ``group`` have seen together (a collective call). The state stays
                each rank's own. A process without ``torch.distributed`` is alone.
            group: default all ranks; a process group or a 1-d DeviceMesh.

        Raises:
            TypeError: ``group`` is no process group.
            ValueError: the ranks' numbers of classes differ; this process is not in ``group``.
        """
        seen, correct = self._seen, self._correct
        if reduce:
            both = torch.cat([seen, correct]).double()  # exact to 2^53
            options = {"the call": "LongTailAccuracy.compute", "num_classes": seen.numel()}
            seen, correct = checked_sum(both, options, group_or_alone(group), seen.device).to(torch.int64).chunk(2)
        per_class = correct.double() / seen.double()
        many, few = self.samples_per_class > self.many, self.samples_per_class < self.few
        return LongTailScores(
            overall=(correct.sum().double() / seen.sum()).item(),
            balanced=per_class.nanmean().item(),
            per_class=per_class,
            many=per_class[many].nanmean().item(),
            medium=per_class[~many & ~few].nanmean().item(),
            few=per_class[few].nanmean().item(),
        )


def _shares(num_classes: int, imbalance_factor: float, profile: str) -> list[float]:
    """Size of each class relative to the largest."""
    check_choice("profile", profile, ("exponential", "step"))
    factor = check_number("imbalance_factor", imbalance_factor, 1.0)
    if profile == "exponential":
        return [math.pow(1 / factor, c / max(num_classes - 1, 1)) for c in range(num_classes)]
    head = num_classes - num_classes // 2
    return [1.0] * head + [1 / factor] * (num_classes - head)
