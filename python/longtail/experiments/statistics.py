"""Means over seeds, the paired t-test, and Holm's correction for many comparisons; needs scipy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Comparison(NamedTuple):
    """Paired differences ``treated - control`` over the seeds."""

    difference: float  # mean
    half_width: float  # of its two-sided 95 % confidence interval; NaN for fewer than two pairs
    p: float  # two-sided, of the paired t-test; NaN for fewer than two pairs


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the latter is NaN for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def paired_comparison(treated: Sequence[float], control: Sequence[float]) -> Comparison:
    """Student's paired t-test, two-sided: ``t = mean(d) / (std(d) / sqrt(n))`` with n - 1 degrees of freedom.

    Differences that are all equal have no spread to judge by: p is 1 if they are 0, else 0.

    Raises:
        ValueError: the numbers of values differ, or there are none.
    """
    if len(treated) != len(control) or not treated:
        raise ValueError(f"got {len(treated)} and {len(control)} values, expected as many of each, at least 1")
    from scipy import stats

    mean, spread = mean_and_std([a - b for a, b in zip(treated, control, strict=True)])
    n = len(treated)
    if n == 1:
        return Comparison(mean, math.nan, math.nan)
    error = spread / math.sqrt(n)
    if error == 0:
        return Comparison(mean, 0.0, float(mean == 0))
    p = 2 * stats.t.sf(abs(mean) / error, n - 1)
    return Comparison(mean, float(error * stats.t.ppf(0.975, n - 1)), float(p))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for the whole family (Holm 1979), in the order given; NaN stays out of it.

    The k-th smallest of m is multiplied by m - k + 1, never below the one before it, never above 1: those below a
    level alpha make a false discovery with a probability of at most alpha, whatever the dependence between them.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for k, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - k) * p_values[i]))
        adjusted[i] = largest
    return adjusted
