"""Means over seeds, scipy's paired t-test, and Holm's correction for many comparisons."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Comparison(NamedTuple):
    """Paired differences ``treated - control`` over the seeds."""

    difference: float  # mean
    half_width: float  # of its two-sided 95 % confidence interval; NaN where there is no test
    p: float  # two-sided, of the paired t-test; NaN where there is none


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the latter is NaN for a single value, both where a value is."""
    if any(map(math.isnan, values)):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def paired_comparison(treated: Sequence[float], control: Sequence[float]) -> Comparison:
    """Student's paired t-test, two-sided (``scipy.stats.ttest_rel``), with its 95 % confidence interval.

    Equal results differ by 0 and have p = 1. There is no test of a single pair, of NaN, or of differences that are not
    0 but equal up to rounding: without a spread t is infinite, whatever n.

    Raises:
        ValueError: the numbers of values differ, or there are none.
    """
    if len(treated) != len(control) or not treated:
        raise ValueError(f"got {len(treated)} and {len(control)} values, expected as many of each, at least 1")
    from scipy import stats

    mean, spread = mean_and_std([a - b for a, b in zip(treated, control, strict=True)])
    n, rounding = len(treated), 4 * sys.float_info.epsilon * max(map(abs, (*treated, *control)))
    if n > 1 and mean == spread == 0:
        return Comparison(0.0, 0.0, 1.0)
    if not (n > 1 and spread > rounding):  # NaN too
        return Comparison(mean, math.nan, math.nan)
    test = stats.ttest_rel(treated, control)
    interval = test.confidence_interval(0.95)
    return Comparison(mean, float(interval.high - interval.low) / 2, float(test.pvalue))


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
