"""The class vectors of the distribution-balanced loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype, check_choice, check_number
from ..errors import ArgumentValueError
from .counts import Counts, checked_counts, finished, without_empty
from .scales import Clamp


class Rebalancing(NamedTuple):
    """Of :func:`longtail.distribution_balanced_loss`, each [C]."""

    class_bias: Tensor
    """-kappa / lambda log(N / n_c - 1)."""
    inverse_counts: Tensor
    """1 / n_c, relative to that of the rarest class."""


def rebalancing(
    samples_per_class: Counts,
    num_samples: int,
    kappa: float = 0.05,
    negative_scale: float = 2.0,
    empty: Clamp = "error",
    *,
    dtype: torch.dtype = torch.float32,
) -> Rebalancing:
    """Both, from how many of ``num_samples`` rows have each label."""
    counts, device = checked_counts(samples_per_class)
    total = check_number("num_samples", num_samples, 2.0)
    kappa = check_number("kappa", kappa, dtype=arithmetic_dtype(dtype))
    scale = check_number("negative_scale", negative_scale, 0.0, dtype=arithmetic_dtype(dtype), vanishes=False)
    check_choice("empty", empty, ("error", "clamp"))
    over = counts > total if empty == "clamp" else counts >= total
    if over.any():
        c = int(over.nonzero()[0])
        way = "" if counts[c] > total else ', or empty="clamp" (counted as all but one)'
        raise ArgumentValueError(
            f"samples_per_class[{c}] is {counts[c].item():g}, expected fewer than num_samples, {total:g}{way}"
        )
    if scale == 0:
        raise ArgumentValueError("negative_scale is 0, expected a positive number")
    counts = without_empty(counts, empty, ("clamp",))
    counts = torch.where(counts == total, total - 1, counts)
    bias = -kappa / scale * (total / counts - 1).log()
    return Rebalancing(
        finished("class_bias", bias, dtype, device),
        finished("inverse_counts", counts.min() / counts, dtype, device, counts > 0),
    )
