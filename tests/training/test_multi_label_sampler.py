"""The sampler of rows with several labels: shares of rows, reproducible epochs, ranks that share an epoch out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from longtail import effective_number
from longtail.training import ClassBalancedSampler, MultiLabelSampler

LISTS = [[0]] * 20 + [[0, 1]] * 6 + [[1, 2, 0]] * 2 + [[]] * 8 + [[4]]
COUNTS = {0: 28, 1: 8, 2: 2, None: 8, 4: 1}


def multi_hot(lists):
    y = torch.zeros(len(lists), 5, dtype=torch.bool)
    for row, labels in zip(y, lists, strict=True):
        row[list(labels)] = True
    return y


def drawn(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def shares_by_hand(mode, row_weight, beta):
    weigh = {
        "oversample": lambda n: 1 / n,
        "square_root": lambda n: n**-0.5,
        "effective_number": lambda n: 1 / effective_number([n], beta, dtype=torch.float64).item(),
    }[mode]
    weights = []
    for row in LISTS:
        of_labels = [weigh(COUNTS[c]) for c in row or [None]]
        weights.append(max(of_labels) if row_weight == "rarest" else sum(of_labels) / len(of_labels))
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


@pytest.mark.parametrize(
    ("mode", "beta", "row_weight", "replacement"),
    [
        ("oversample", None, "rarest", False),
        ("oversample", None, "mean", True),
        ("square_root", None, "mean", False),
        ("square_root", None, "rarest", True),
        ("effective_number", 0.9, "rarest", False),
        ("effective_number", 0.9, "mean", False),
    ],
)
def test_row_shares(mode, beta, row_weight, replacement) -> None:
    sampler = MultiLabelSampler(LISTS, mode, 100, row_weight=row_weight, beta=beta, replacement=replacement)
    expected = shares_by_hand(mode, row_weight, beta)
    torch.testing.assert_close(sampler.row_shares, expected, rtol=1e-9, atol=0)
    y = multi_hot(LISTS).double()
    torch.testing.assert_close(sampler.label_shares, expected @ y, rtol=1e-9, atol=0)
    epochs = torch.stack([torch.tensor(drawn(sampler, e)).bincount(minlength=len(LISTS)) for e in range(100)]).double()
    assert (epochs.sum(1) == 100).all()
    if not replacement:
        assert ((epochs - 100 * expected).abs() < 1).all(), "in every epoch the share, rounded down or up"
    error = (0.25 if not replacement else 100 * expected) ** 0.5 / 100**0.5  # a coin's, or about Poisson's
    assert ((epochs.mean(0) - 100 * expected).abs() < 5 * error).all()


def test_neighbours_are_drawn_together_too() -> None:
    """Systematic sampling in the order of the data would take one of two rows at half a share, never both."""
    sampler = MultiLabelSampler([{0}] * 10, num_samples=5)
    together = sum({0, 1} <= set(drawn(sampler, epoch)) for epoch in range(300))
    assert 30 < together < 110  # 2/9 of 300 is 67


@pytest.mark.parametrize(("mode", "beta"), [("oversample", None), ("square_root", None), ("effective_number", 0.9)])
def test_one_label_a_row_has_the_shares_of_classes(mode, beta) -> None:
    targets = torch.tensor([0] * 30 + [1] * 9 + [3] * 2)
    sampler = MultiLabelSampler(torch.nn.functional.one_hot(targets).bool(), mode, beta=beta)
    expected = ClassBalancedSampler(targets, mode, beta=beta).class_shares
    torch.testing.assert_close(sampler.label_shares, expected, rtol=1e-9, atol=0)
    assert len(sampler) == 41


def test_targets_of_any_kind() -> None:
    y = multi_hot(LISTS)
    expected = list(MultiLabelSampler(LISTS, seed=2))
    ways = [[set(row) for row in LISTS], y, y.double(), y.numpy(), y.tolist(), y.to_sparse(), y.half().to_sparse()]
    ways += [[torch.tensor(row, dtype=torch.int64) for row in LISTS], [np.array(row, dtype=int) for row in LISTS]]
    for targets in ways:
        assert list(MultiLabelSampler(targets, seed=2)) == expected
    equal = [[0, 1], [3, 2], [1, 0]]
    assert list(MultiLabelSampler(equal)) == list(MultiLabelSampler([set(row) for row in equal]))
    soft = torch.tensor([[1.0, 0.5], [0.5, 0], [0, 0.25], [0, 0]])
    weights = {
        "rarest": [1 / 1.5, 1 / 1.5, 1 / 0.75, 1.0],
        "mean": [(1 / 1.5 + 0.5 / 0.75) / 1.5, 1 / 1.5, 1 / 0.75, 1],
    }
    for row_weight, of_rows in weights.items():
        expected = torch.tensor(of_rows, dtype=torch.float64) / sum(of_rows)
        shares = MultiLabelSampler(soft, row_weight=row_weight).row_shares
        torch.testing.assert_close(shares, expected, rtol=1e-9, atol=0)


def test_epochs_are_reproducible_and_differ() -> None:
    for replacement in (False, True):
        first, again, other = (MultiLabelSampler(LISTS, seed=s, replacement=replacement) for s in (5, 5, 6))
        torch.manual_seed(1)
        expected = drawn(first, 3)
        torch.manual_seed(2)
        assert drawn(again, 3) == expected == drawn(first, 3)
        assert expected not in (drawn(other, 3), drawn(first, 4))
        first.set_epoch(1)
        list(first)
        with pytest.warns(UserWarning, match=r"MultiLabelSampler goes through epoch 1 once more"):
            list(first)


@settings(max_examples=30)
@given(
    lists=st.lists(st.sets(st.integers(0, 4)), min_size=2, max_size=40),
    num_samples=st.integers(1, 90),
    world_size=st.integers(1, 5),
    replacement=st.booleans(),
)
def test_ranks_deal_one_epoch_out(lists, num_samples, world_size, replacement) -> None:
    total = -(-num_samples // world_size) * world_size
    alone = MultiLabelSampler(lists, num_samples=total, rank=0, world_size=1, replacement=replacement)
    ranks = [
        MultiLabelSampler(lists, num_samples=num_samples, rank=r, world_size=world_size, replacement=replacement)
        for r in range(world_size)
    ]
    dealt = [drawn(rank, 2) for rank in ranks]
    assert {len(part) for part in dealt} == {len(rank) for rank in ranks} == {total // world_size}
    assert [index for turn in zip(*dealt, strict=True) for index in turn] == drawn(alone, 2)


def test_data_loader() -> None:
    sampler = MultiLabelSampler(LISTS, num_samples=40)
    loader = DataLoader(TensorDataset(torch.arange(len(LISTS))), batch_size=16, sampler=sampler)
    assert torch.cat([indices for (indices,) in loader]).tolist() == drawn(sampler, 0)


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"targets": []}, (TypeError, ValueError), "targets have"),
        ({"targets": torch.zeros(0, 3)}, ValueError, r"targets have shape \[0, 3\], expected \[N, C\] with N >= 1"),
        ({"targets": [0, 1]}, TypeError, r"targets have dtype torch\.int64 and shape \[2\], expected multi-hot rows"),
        ({"targets": torch.eye(3).long()}, TypeError, r"targets have dtype torch\.int64 and shape \[3, 3\], expected"),
        ({"targets": [[1, 0], [0, 1]]}, ValueError, "could be multi-hot rows or labels: expected a bool tensor"),
        (
            {"targets": [[0], [-1, 2]]},
            IndexError,
            r"targets\[1\] has label -1, which is out of range, expected at",
        ),
        ({"targets": [[0], [2, 2]]}, ValueError, r"targets\[1\] has label 2 twice"),
        ({"targets": torch.tensor([[0.0, 1.5]])}, ValueError, r"targets\[0, 1\] = 1\.5 is no multi-hot target"),
        ({"targets": torch.tensor([[0.0, torch.nan]])}, ValueError, r"targets\[0, 1\] = nan is no multi-hot target"),
        ({"targets": np.ma.masked_array([[True]], [[1]])}, TypeError, "expected none with masked entries"),
        ({"mode": "undersample"}, ValueError, "mode is 'undersample', expected one of 'oversample'"),
        ({"row_weight": "max"}, ValueError, "row_weight is 'max', expected one of 'rarest', 'mean'"),
        ({"num_samples": 0}, ValueError, "num_samples is 0, expected at least 1"),
        ({"beta": 0.9}, ValueError, 'beta is 0.9, expected a number with mode="effective_number"'),
        ({"mode": "effective_number"}, ValueError, "beta is None, expected a number"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank is 2, expected 0 to 1"),
        ({"seed": True}, TypeError, "seed is a bool, expected an int"),
    ],
)
def test_wrong_arguments(arguments, exception, message) -> None:
    with pytest.raises(exception, match=message):
        MultiLabelSampler(**{"targets": [[0], [1, 2]], **arguments})
