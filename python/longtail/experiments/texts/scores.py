"""Calibration, and scores by how often a class was seen in training."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy in bins of equal width, by samples.

    Guo et al. 2017, eq. 3, with 15 bins. NaN without samples.

    Args:
        confidence: probabilities of the decisions, [N].
        correct: of the decisions, bool or 0 and 1, [N].
    """
    if not confidence.numel():
        return float("nan")
    bins = (confidence.double() * BINS).long().clamp(0, BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, correct.double() - confidence.double())
    return (gaps.abs().sum() / confidence.numel()).item()


def by_octave(per_class: Tensor, counts: Tensor) -> dict[int, float]:
    """Mean score [C] of the classes with 1, 2 to 3, 4 to 7, ... training samples [C], at least 1; NaN is left out.

    The keys are the lower ends of the octaves that have a score.
    """
    octave = counts.double().frexp().exponent - 1  # the logarithm to base 2, rounded down
    means = {2**k: per_class[octave == k].nanmean().item() for k in range(int(octave.max()) + 1)}
    return {count: mean for count, mean in means.items() if mean == mean}
