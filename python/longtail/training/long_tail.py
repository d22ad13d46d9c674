"""Long-tailed subsets of balanced data sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..arguments import check_choice, check_number
from ..class_balance.arrays import Array, check_positive_int, integer_labels
from ..class_balance.counting import class_counts

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


def _shares(num_classes: int, imbalance_factor: float, profile: str) -> list[float]:
    """Size of each class relative to the largest."""
    check_choice("profile", profile, ("exponential", "step"))
    factor = check_number("imbalance_factor", imbalance_factor, 1.0)
    if profile == "exponential":
        return [math.pow(1 / factor, c / max(num_classes - 1, 1)) for c in range(num_classes)]
    head = num_classes - num_classes // 2
    return [1.0] * head + [1 / factor] * (num_classes - head)
