"""What both demos share: how the two forms of a loss are timed, and how figures of several seeds are written."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LossTime(NamedTuple):
    """Median seconds of forward + backward of the loss alone, on the logits of one training batch."""

    fused: float
    plain: float


def time_both(
    fused: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], logits: Tensor, rounds: int, atol: float
) -> LossTime:
    """Times two forms of a loss of the logits, alternating, and checks that they agree.

    Args:
        atol: of the comparison; it is 1e-4 relative.

    Raises:
        AssertionError: loss or gradient differ.
    """
    logits = logits.detach().requires_grad_()
    losses = {"fused": fused, "plain": plain}
    results: dict[str, tuple[Tensor, Tensor]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, function in losses.items():
            start = time.perf_counter()
            loss = function(logits)
            (grad,) = torch.autograd.grad(loss, logits)
            seconds[name].append(time.perf_counter() - start)
            results[name] = loss.detach(), grad
    torch.testing.assert_close(results["fused"], results["plain"], rtol=1e-4, atol=atol)
    return LossTime(**{name: statistics.median(values) for name, values in seconds.items()})


def spread(values: Sequence[float]) -> float:
    """Standard deviation over the seeds; NaN for a single one."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def mean_and_spread(shares: list[float]) -> str:
    """Percentages as "mean±spread", without the latter for a single seed; "-" for a group without classes."""
    if any(math.isnan(share) for share in shares):
        return "-"
    mean = f"{100 * statistics.mean(shares):.1f}"
    return f"{mean}±{100 * spread(shares):.1f}" if len(shares) > 1 else mean


def over_seeds(seeds: int) -> str:
    return "1 seed" if seeds == 1 else f"{seeds} seeds, ± is the standard deviation over them"
