"""The statistics of the experiments: the paired t-test and Holm's correction against their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("scipy")
from scipy import stats

from longtail.experiments.statistics import holm, mean_and_std, paired_comparison


@pytest.mark.parametrize("n", [2, 3, 10, 40])
def test_paired_t_test_is_its_definition(n):
    control = torch.randn(n, dtype=torch.float64).tolist()
    treated = [x + 0.3 + 0.5 * y for x, y in zip(control, torch.randn(n, dtype=torch.float64).tolist(), strict=True)]
    found = paired_comparison(treated, control)
    mean, std = mean_and_std([a - b for a, b in zip(treated, control, strict=True)])
    error = std / math.sqrt(n)
    assert found.difference == pytest.approx(mean, rel=1e-9)
    assert found.half_width == pytest.approx(error * stats.t.ppf(0.975, n - 1), rel=1e-9)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(mean) / error, n - 1), rel=1e-9)


def test_pairing_matters():
    """Seeds that differ far more than the methods do: the unpaired test sees nothing."""
    control = [0.1, 0.3, 0.5, 0.7, 0.9]
    treated = [x + 0.02 + 0.001 * i for i, x in enumerate(control)]
    assert paired_comparison(treated, control).p < 1e-4
    assert stats.ttest_ind(treated, control).pvalue > 0.9


def test_equal_differences_and_single_seeds():
    assert paired_comparison([1.0, 2.0], [1.0, 2.0]) == (0.0, 0.0, 1.0)
    untested = {
        "one pair": ([1.0], [0.5], 0.5),
        "one pair of equals": ([1.0], [1.0], 0.0),
        "equal differences": ([1.5, 2.5], [1.0, 2.0], 0.5),
        "equal differences but for rounding": ([0.1 + 0.3, 0.2 + 0.3, 0.7 + 0.3], [0.1, 0.2, 0.7], 0.3),
        "NaN": ([1.0, math.nan], [1.0, 2.0], math.nan),
        "NaN in both": ([math.nan] * 3, [math.nan] * 3, math.nan),
    }
    for what, (treated, control, difference) in untested.items():
        found = paired_comparison(treated, control)
        assert found.difference == pytest.approx(difference, nan_ok=True), what
        assert math.isnan(found.p), what
        assert math.isnan(found.half_width), what
    assert mean_and_std([1.0, math.nan]) == pytest.approx((math.nan, math.nan), nan_ok=True)
    with pytest.raises(ValueError, match="got 2 and 1 values"):
        paired_comparison([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="got 0 and 0 values"):
        paired_comparison([], [])


def closed_bonferroni(p_values):
    """Holm's procedure as what it is: the closure of Bonferroni's test over all subsets."""
    indices = range(len(p_values))
    subsets = [s for k in range(1, len(p_values) + 1) for s in itertools.combinations(indices, k)]
    return [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in subsets if i in s) for i in indices]


@pytest.mark.parametrize(
    "p_values", [[0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 0.001], [0.9, 0.8], [0.05], [0.0, 1.0, 0.5]]
)
def test_holm_is_the_closure_of_bonferroni(p_values):
    assert holm(p_values) == pytest.approx(closed_bonferroni(p_values))


def test_holm_on_random_p_values():
    for _ in range(20):
        p_values = torch.rand(7, dtype=torch.float64).pow(3).tolist()
        assert holm(p_values) == pytest.approx(closed_bonferroni(p_values))


def test_holm_leaves_missing_p_values_out():
    found = holm([0.01, math.nan, 0.03])
    assert math.isnan(found[1])
    assert [found[0], found[2]] == pytest.approx([0.02, 0.03])
    assert holm([]) == []


def test_mean_and_std():
    mean, std = mean_and_std([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert std == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std().item())
    assert math.isnan(mean_and_std([1.0])[1])
