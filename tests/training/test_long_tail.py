"""Long-tailed subsets equal the published construction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longtail.training import long_tailed_counts, long_tailed_indices

PROFILES = ["exponential", "step"]


def test_counts_of_long_tailed_cifar10():
    assert long_tailed_counts(5000, 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert long_tailed_counts(5000, 10, 100, "step") == [5000] * 5 + [50] * 5


def test_counts_of_long_tailed_cifar100():
    """Sizes of the training sets that the class-balanced and LDAM papers use."""
    counts = long_tailed_counts(500, 100, 100)
    assert (counts[0], counts[-1], sum(counts)) == (500, 5, 10847)
    assert sum(long_tailed_counts(500, 100, 10)) == 19573
    assert sum(long_tailed_counts(500, 100, 50)) == 12608


@given(
    num_classes=st.integers(1, 50),
    rarest=st.integers(1, 40),
    factor=st.integers(1, 300),
    profile=st.sampled_from(PROFILES),
)
def test_counts_keep_the_imbalance_factor(num_classes, rarest, factor, profile):
    counts = long_tailed_counts(rarest * factor, num_classes, factor, profile)
    assert len(counts) == num_classes
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == rarest * factor
    assert counts[-1] == (rarest if num_classes > 1 else rarest * factor)


def test_no_class_is_larger_than_the_largest():
    assert long_tailed_counts(10**18, 3, 1) == [10**18] * 3


def test_step_profile_with_an_odd_number_of_classes():
    assert long_tailed_counts(100, 5, 10, "step") == [100, 100, 100, 10, 10]


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ((0, 10, 1), ValueError, "max_samples is 0, expected at least 1"),
        ((5.0, 10, 1), TypeError, "max_samples is a float, expected an int"),
        ((5, 0, 1), ValueError, "num_classes is 0, expected at least 1"),
        ((5, True, 1), TypeError, "num_classes is a bool, expected an int"),
        ((5, 10, 0.01), ValueError, "imbalance_factor is 0.01, expected a finite number in"),
        ((5, 10, math.nan), ValueError, "imbalance_factor is nan, expected a finite number in"),
        ((5, 10, "2"), TypeError, "imbalance_factor is a str, expected a number"),
        ((10**400, 10, 1), ValueError, "max_samples is an int of 1329 bits, expected at most"),
        ((5, 10**400, 1), ValueError, "num_classes is an int of 1329 bits, expected at most"),
        ((5, 10, 10**400), ValueError, "imbalance_factor is inf, expected a finite number in"),
        ((5, 10, 1e308), ValueError, r"imbalance_factor is 1e\+308, expected at most 5"),
        (
            (5, 10, 6),
            ValueError,
            "imbalance_factor is 6, expected at most 5, the size of the largest class",
        ),
        ((5, 10, 2, "exp"), ValueError, "profile is 'exp', expected one of 'exponential', 'step'"),
    ],
)
def test_wrong_counts(arguments, exception, message):
    with pytest.raises(exception, match=message):
        long_tailed_counts(*arguments)


@pytest.mark.parametrize("profile", PROFILES)
def test_indices_of_a_balanced_data_set_have_the_published_counts(profile):
    targets = torch.arange(10).repeat(500)
    indices = long_tailed_indices(targets, 100, profile)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, indices.unique())
    assert targets[indices].bincount().tolist() == long_tailed_counts(500, 10, 100, profile)


@given(
    available=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    factor=st.floats(1, 30),
    profile=st.sampled_from(PROFILES),
)
def test_indices_take_the_largest_feasible_subset(available, factor, profile):
    targets = torch.cat([torch.full((n,), c) for c, n in enumerate(available)])
    n_max = range(math.ceil(factor), available[0] + 1)
    candidates = [long_tailed_counts(n, len(available), factor, profile) for n in n_max]
    feasible = [c for c in candidates if all(want <= have for want, have in zip(c, available, strict=True))]
    if feasible:
        indices = long_tailed_indices(targets, factor, profile)
        assert targets[indices].bincount().tolist() == feasible[-1]
    else:
        with pytest.raises(ValueError, match=r"imbalance_factor is .*, expected at most"):
            long_tailed_indices(targets, factor, profile)


def test_indices_follow_the_generator():
    targets = torch.randint(0, 5, (2000,), generator=torch.Generator().manual_seed(0))
    first, again, other = (
        long_tailed_indices(targets, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert first.shape == other.shape
    assert not torch.equal(first, other)


def test_indices_of_lists_and_arrays():
    labels = [0, 1, 0, 1, 0, 1, 0, 1]
    for targets in (labels, np.array(labels, dtype=np.int16)):
        indices = long_tailed_indices(targets, 4)
        assert indices[torch.tensor(labels)[indices] == 0].tolist() == [0, 2, 4, 6]
        assert indices.numel() == 5


@pytest.mark.parametrize(
    ("targets", "exception", "message"),
    [
        ([0, 2, 2], ValueError, "targets hold no class 1, expected all of 0 to 2"),
        ([0, -1], IndexError, r"targets\[1\] = -1 is out of range"),
        ([0.0, 1.0], TypeError, "targets have dtype torch.float32, expected integers"),
        ([[0, 1]], ValueError, r"targets have shape \[1, 2\], expected \[N\] with N >= 1"),
        ([], ValueError, r"targets have shape \[0\], expected"),
    ],
)
def test_wrong_targets(targets, exception, message):
    with pytest.raises(exception, match=message):
        long_tailed_indices(targets, 1)


@pytest.mark.parametrize("profile", PROFILES)
def test_indices_of_any_factor(profile):
    with pytest.raises(ValueError, match=r"imbalance_factor is 1e\+308, expected at most 2, the size of the largest"):
        long_tailed_indices([0, 0, 1], 1e308, profile)
