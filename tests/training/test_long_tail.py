"""Long-tailed subsets equal the published construction; accuracy by class frequency equals a plain count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longtail.training import LongTailAccuracy, long_tailed_counts, long_tailed_indices

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


SAMPLES = [500, 101, 100, 20, 19, 1]


def test_accuracy_against_a_plain_count():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 6, (900,), generator=generator)
    correct = torch.rand(900, generator=generator) < 0.4 + 0.1 * target
    metric = LongTailAccuracy(SAMPLES)
    for part in torch.arange(900).split(128):
        metric.update(correct[part], target[part])
    scores = metric.compute()
    share = [correct[target == c].double().mean().item() for c in range(6)]
    assert scores.overall == pytest.approx(correct.double().mean().item())
    assert scores.per_class.tolist() == pytest.approx(share)
    assert scores.balanced == pytest.approx(sum(share) / 6)
    assert scores.many == pytest.approx((share[0] + share[1]) / 2)
    assert scores.medium == pytest.approx((share[2] + share[3]) / 2)
    assert scores.few == pytest.approx((share[4] + share[5]) / 2)


def test_accuracy_of_empty_groups_and_unseen_classes_is_nan():
    metric = LongTailAccuracy([50, 50, 50])
    assert all(math.isnan(metric.compute()[i]) for i in (0, 1, 3, 4, 5))
    metric.update(torch.tensor([True, False, True]), torch.tensor([0, 0, 2]))
    scores = metric.compute()
    assert scores.balanced == scores.medium == 0.75
    assert math.isnan(scores.many)
    assert math.isnan(scores.few)
    assert math.isnan(scores.per_class[1])


def test_accuracy_ignores_rows_and_resets():
    metric = LongTailAccuracy([5, 5])
    metric.update(torch.tensor([[True, False], [False, True]]), torch.tensor([[0, -100], [1, 1]]))
    assert metric.compute().overall == pytest.approx(2 / 3)
    metric.reset()
    assert math.isnan(metric.compute().overall)
    strict = LongTailAccuracy([5, 5], ignore_index=None)
    with pytest.raises(IndexError, match=r"targets\[0\] = -100 is out of range"):
        strict.update(torch.tensor([False]), torch.tensor([-100]))


def test_thresholds():
    metric = LongTailAccuracy([9, 5, 1], many=5, few=5)
    metric.update(torch.tensor([True, False, True]), torch.tensor([0, 1, 2]))
    assert metric.compute()[3:] == (1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="few is 6, expected at most many = 5"):
        LongTailAccuracy([9, 5, 1], many=5, few=6)


def test_accuracy_of_wrong_arguments():
    with pytest.raises(ValueError, match=r"samples_per_class\[0\] is -1"):
        LongTailAccuracy([-1])
    for value, message in ((10**400, "an int of 1329 bits"), ("a", "a str")):
        with pytest.raises((TypeError, ValueError), match=f"ignore_index is {message}, expected an int or None"):
            LongTailAccuracy([5, 5], ignore_index=value)
    metric = LongTailAccuracy([5, 5])
    with pytest.raises(TypeError, match="correct is a list, expected a Tensor"):
        metric.update([True, False], torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"correct has dtype torch\.float32, expected torch\.bool"):
        metric.update(torch.ones(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"correct has shape \[2\], expected \[1\]"):
        metric.update(torch.tensor([True, True]), torch.tensor([0]))
    with pytest.raises(IndexError, match=r"targets\[0\] = 2 is out of range, expected 0 to 1"):
        metric.update(torch.tensor([True]), torch.tensor([2]))
