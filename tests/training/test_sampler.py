"""The class-balanced sampler: class shares, reproducible epochs, ranks that share an epoch out."""

from __future__ import annotations

import itertools
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from longtail import class_counts, effective_number_weight
from longtail.training import ClassBalancedSampler
from longtail.training.sampler import quotas

COUNTS = [60, 17, 0, 5, 1]
PRESENT = torch.tensor([n for n in COUNTS if n], dtype=torch.float64)


def labels() -> Tensor:
    """Shuffled, with an empty class in the middle."""
    ordered = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    return ordered[torch.randperm(ordered.numel(), generator=torch.Generator().manual_seed(3))]


def drawn(sampler: ClassBalancedSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def counts_of(indices: list[int]) -> Tensor:
    return class_counts(labels()[indices], len(COUNTS))


def shares_by_hand(mode: str, beta: float | None) -> Tensor:
    if mode == "square_root":
        sizes = PRESENT**0.5
    elif mode == "effective_number":
        sizes = PRESENT * effective_number_weight(PRESENT, beta, dtype=torch.float64)
    else:
        sizes = torch.ones(4, dtype=torch.float64)
    return (sizes / sizes.sum())[[0, 1, 2, 2, 3]] * torch.tensor([1, 1, 0, 1, 1])


MODES = [("oversample", None, 240), ("undersample", None, 4), ("square_root", None, 83), ("effective_number", 0.9, 83)]


@pytest.mark.parametrize(("mode", "beta", "length"), MODES)
@pytest.mark.parametrize("replacement", [False, True])
def test_class_shares(mode, beta, length, replacement) -> None:
    sampler = ClassBalancedSampler(labels(), mode, beta=beta, replacement=replacement)
    expected = shares_by_hand(mode, beta)
    torch.testing.assert_close(sampler.class_shares, expected, rtol=1e-12, atol=0)
    epochs = [drawn(sampler, epoch) for epoch in range(300)]
    assert {len(epoch) for epoch in epochs} == {len(sampler)} == {length}
    held = torch.stack([counts_of(epoch) for epoch in epochs]).double()
    assert ((held - expected * length).abs() < 1).all(), "in every epoch the share, rounded down or up"
    # Rounding is a coin with the right odds: its standard deviation is at most 1/2, over 300 epochs 0.03.
    assert ((held.mean(0) - expected * length).abs() < 0.12).all()


def test_oversampling_uses_every_sample_equally_often() -> None:
    epoch = drawn(ClassBalancedSampler(labels(), "oversample"), 0)
    assert counts_of(epoch).tolist() == [60, 60, 0, 60, 60]
    times = torch.tensor(epoch).bincount(minlength=83)
    for c, n in enumerate(COUNTS):
        if n:
            assert set(times[labels() == c].tolist()) <= {60 // n, -(-60 // n)}


def test_undersampling_repeats_nothing() -> None:
    targets = torch.tensor([0] * 50 + [1] * 20 + [2] * 7)
    sampler = ClassBalancedSampler(targets, "undersample")
    seen = set()
    for epoch in range(100):
        indices = drawn(sampler, epoch)
        assert len(set(indices)) == len(indices) == 21
        assert targets[indices].bincount().tolist() == [7, 7, 7]
        seen |= set(indices)
    assert seen == set(range(77)), "over the epochs everything has its turn"
    with pytest.raises(ValueError, match="num_samples is 22, expected at most 21, so that no sample is repeated"):
        ClassBalancedSampler(targets, "undersample", 22)
    assert len(ClassBalancedSampler(targets, "undersample", 22, replacement=True)) == 22


def test_replacement_draws_independently() -> None:
    """Of 60 draws from the 60 samples of a class about 1 - 1/e are distinct; without replacement all."""
    distinct = []
    for replacement in (False, True):
        epoch = torch.tensor(drawn(ClassBalancedSampler(labels(), replacement=replacement), 0))
        distinct.append(epoch[labels()[epoch] == 0].unique().numel())
    assert distinct[0] == 60
    assert 30 < distinct[1] < 46


def test_epochs_are_reproducible_and_differ() -> None:
    first, again, other = (ClassBalancedSampler(labels(), seed=seed) for seed in (5, 5, 6))
    torch.manual_seed(1)
    expected = drawn(first, 3)
    torch.manual_seed(2)
    assert drawn(again, 3) == expected == drawn(first, 3)
    assert drawn(other, 3) != expected
    assert drawn(first, 4) != expected
    assert len({tuple(drawn(ClassBalancedSampler(labels(), seed=s), e)) for s in range(-4, 4) for e in range(8)}) == 64
    assert list(ClassBalancedSampler(labels(), seed=np.uint64(2**64 - 1)))


STEPS = st.one_of(st.sampled_from([0, 2**62 - 1]), st.integers(0, 2**62 - 1))


@given(sizes=st.lists(st.integers(1, 2**115), min_size=1, max_size=20), total=st.integers(1, 10**12), step=STEPS)
def test_an_epoch_is_shared_out_to_the_last_sample(sizes, total, step) -> None:
    shared = quotas(sizes, total, step)
    assert sum(shared) == total
    assert all(abs(n - Fraction(total * size, sum(sizes))) < 1 for n, size in zip(shared, sizes, strict=True))


def test_no_sum_drifts() -> None:
    for step in (0, 2**62 - 1):
        assert set(quotas([1 << 52] * 200_000, 2_000_000, step)) == {10}


def test_a_second_pass_through_an_epoch_warns_once() -> None:
    sampler = ClassBalancedSampler(labels(), "square_root", 40)
    loader = DataLoader(TensorDataset(labels()), batch_size=8, sampler=sampler)
    next(iter(loader))  # a look at a batch is no pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iter(sampler)  # nor is an iterator that nobody asks
        for epoch in (0, 1, 1):
            list(loader)
            sampler.set_epoch(epoch)
        list(itertools.islice(loader, 5))  # who counts the batches does not ask for the end
    with pytest.warns(UserWarning, match=r"goes through epoch 1 once more, .* call set_epoch\(epoch\)") as caught:
        passes = [list(sampler) for _ in range(3)]
    assert len(caught) == 1
    assert passes[0] == passes[1] == passes[2], "an epoch goes on until set_epoch says otherwise"


def test_wrong_epochs() -> None:
    for epoch, message in ((-1, r"-1, expected an int in \[0, "), (10**5000, "an int of 16610 bits"), (0.5, "a float")):
        with pytest.raises((ValueError, TypeError), match=f"epoch is {message}"):
            ClassBalancedSampler([0, 1]).set_epoch(epoch)


@given(
    targets=st.lists(st.integers(0, 6), min_size=8, max_size=60),
    mode=st.sampled_from(["oversample", "square_root", "effective_number"]),
    num_samples=st.integers(1, 90),
    world_size=st.integers(1, 5),
)
def test_ranks_deal_one_epoch_out(targets, mode, num_samples, world_size) -> None:
    beta = 0.9 if mode == "effective_number" else None
    total = -(-num_samples // world_size) * world_size
    alone = ClassBalancedSampler(targets, mode, total, beta=beta, rank=0, world_size=1, seed=1)
    ranks = [
        ClassBalancedSampler(targets, mode, num_samples, beta=beta, rank=r, world_size=world_size, seed=1)
        for r in range(world_size)
    ]
    dealt = [drawn(rank, 2) for rank in ranks]
    assert {len(part) for part in dealt} == {len(rank) for rank in ranks} == {total // world_size}
    assert [index for turn in zip(*dealt, strict=True) for index in turn] == drawn(alone, 2)


def test_ranks_of_an_undersampled_epoch_share_no_sample() -> None:
    targets = torch.tensor([0] * 50 + [1] * 20 + [2] * 7)
    dealt = [drawn(ClassBalancedSampler(targets, "undersample", rank=r, world_size=4), 0) for r in range(4)]
    assert [len(part) for part in dealt] == [5] * 4, "21 rounded down to a multiple of 4"
    assert len({index for part in dealt for index in part}) == 20


def test_data_loader() -> None:
    targets = labels()
    sampler = ClassBalancedSampler(targets, "square_root", 40)
    loader = DataLoader(TensorDataset(torch.arange(83), targets), batch_size=16, sampler=sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(loader)
        assert [len(indices) for indices, _ in batches] == [16, 16, 8]
        sampler.set_epoch(epoch)
        assert torch.cat([indices for indices, _ in batches]).tolist() == list(sampler)


def test_targets_of_any_kind() -> None:
    expected = list(ClassBalancedSampler(labels()))
    for targets in (labels().tolist(), labels().numpy().astype(np.uint16), labels().to(torch.uint8)):
        assert list(ClassBalancedSampler(targets)) == expected


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"targets": []}, ValueError, r"targets have shape \[0\], expected \[N\] with N >= 1"),
        ({"targets": [[0, 1]]}, ValueError, r"targets have shape \[1, 2\], expected"),
        ({"targets": [0, -1]}, IndexError, r"targets\[1\] = -1 is out of range"),
        ({"targets": [0.0]}, TypeError, "targets have dtype torch.float32, expected integers"),
        ({"mode": "over"}, ValueError, "mode is 'over', expected one of 'oversample'"),
        ({"num_samples": 0}, ValueError, "num_samples is 0, expected at least 1"),
        ({"num_samples": np.int64(-1)}, ValueError, "num_samples is -1, expected at least 1"),
        ({"num_samples": 10**400}, ValueError, "num_samples is an int of 1329 bits, expected at most"),
        ({"num_samples": 1.5}, TypeError, "num_samples is a float, expected an int"),
        ({"beta": 0.9}, ValueError, 'beta is 0.9, expected a number with mode="effective_number"'),
        ({"mode": "effective_number"}, ValueError, "beta is None, expected a number"),
        ({"mode": "effective_number", "beta": 2}, ValueError, r"beta is 2\.0, expected a finite number in"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank is 2, expected 0 to 1"),
        ({"rank": 0.5, "world_size": 2}, TypeError, "rank is a float, expected an int"),
        ({"world_size": 10**5000}, ValueError, "world_size is an int of 16610 bits, expected an int"),
        ({"seed": "a"}, TypeError, "seed is a str, expected an int"),
        ({"seed": True}, TypeError, "seed is a bool, expected an int"),
        ({"seed": 2**64}, ValueError, rf"seed is {2**64}, expected an int in \[-{2**63}, {2**64 - 1}\]"),
        ({"rank": -1}, ValueError, "rank is -1, expected 0 to 0"),
        ({"world_size": 0}, ValueError, "world_size is 0, expected at least 1"),
        (
            {"mode": "undersample", "world_size": 5, "rank": 0},
            ValueError,
            "num_samples is 2, expected at least world_size = 5",
        ),
    ],
)
def test_wrong_arguments(arguments, exception, message) -> None:
    with pytest.raises(exception, match=message):
        ClassBalancedSampler(**{"targets": [0, 0, 1], **arguments})
