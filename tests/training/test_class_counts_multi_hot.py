"""Counting multi-hot rows: sums per class, what is no multi-hot target, and integers that could be multi-hot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import longtail
from allocations import peak_while
from longtail import class_counts, effective_number_weight
from longtail.class_balance import counting

MULTI_HOT = [[1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 1]]
SOFT = [[0.5, 0.0, 1.0], [0.0, 0.25, 1.0], [1.0, 0.0, 0.0], [-100.0, 0.0, -100.0]]


@pytest.mark.parametrize("chunk", [2, 3, 1 << 22])
def test_class_counts_of_multi_hot_rows(monkeypatch, chunk):
    monkeypatch.setattr(counting, "CHUNK", chunk)
    bools, floats = torch.tensor(MULTI_HOT).bool(), torch.tensor(MULTI_HOT).float()
    cases = {torch.int64: [bools, bools.numpy(), bools.tolist(), iter([bools[:1], bools[1:]])]}
    cases[torch.float64] = [floats, floats.half(), floats.numpy()[:, ::-1][:, ::-1], floats.tolist(), iter([floats])]
    cases[torch.float64].append(DataLoader(TensorDataset(floats, floats), batch_size=3))
    for dtype, ways in cases.items():
        for targets in ways:
            counts = class_counts(targets, 3)
            assert counts.dtype == dtype
            assert counts.tolist() == [2, 0, 3]
    images = floats[:, :, None, None].expand(4, 3, 2, 5)
    assert class_counts(images, 3).tolist() == [20, 0, 30]
    assert class_counts(images > 0, 3).tolist() == [20, 0, 30]
    assert class_counts(SOFT, 3, ignore_index=-100).tolist() == [1.5, 0.25, 2.0]
    assert class_counts(SOFT, 3, ignore_index=-100, reduce=True).tolist() == [1.5, 0.25, 2.0]
    assert class_counts(torch.empty(0, 3), 3).tolist() == [0, 0, 0]


def test_class_counts_of_rounded_multi_hot_rows():
    assert class_counts(torch.tensor([[1.0005, -0.0005], [0.5, -0.001]], dtype=torch.float64), 2).tolist() == [1.5, 0]


@pytest.mark.parametrize("value", [-1.0, 1.5, 1.002, -0.002, float("nan"), float("inf")])
def test_class_counts_of_wrong_multi_hot_rows(monkeypatch, value):
    for chunk in (1, 2, 3, 1 << 22):
        monkeypatch.setattr(counting, "CHUNK", chunk)
        targets = torch.zeros(4, 3)
        targets[2, 1] = value
        with pytest.raises(ValueError, match=r"targets\[2, 1\] = \S+ is no multi-hot target, expected a number"):
            class_counts(targets, 3)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 2, 3)])
def test_class_counts_of_floats_that_are_no_rows_of_the_classes(shape):
    with pytest.raises(TypeError, match=r"expected integers, or multi-hot rows of shape \[N, 3\]"):
        class_counts(torch.zeros(shape), 3)


def test_class_counts_of_integers_that_could_be_multi_hot():
    """Nothing but 0 and 1 in rows as wide as there are classes; maps of the classes 0 and 1 are another matter."""
    for targets in (
        torch.tensor(MULTI_HOT),
        torch.tensor(MULTI_HOT, dtype=torch.uint8),
        np.array(MULTI_HOT),
        MULTI_HOT,
        iter(torch.tensor(MULTI_HOT).split(1)),
        torch.tensor(MULTI_HOT)[:, :, None, None].expand(4, 3, 2, 2),
        DataLoader(TensorDataset(torch.tensor(MULTI_HOT), torch.tensor(MULTI_HOT)), batch_size=3),
    ):
        with pytest.raises(
            ValueError, match=r"expected targets\.bool\(\) for multi-hot rows, targets\.flatten\(\) for"
        ):
            class_counts(targets, 3)
    with pytest.raises(ValueError, match=r"could be multi-hot rows or class indices"):
        class_counts([[0], [0]], 1)
    assert class_counts([0, 0], 1).tolist() == [2]
    targets = torch.tensor(MULTI_HOT)
    assert class_counts(targets.flatten(), 3).tolist() == [7, 5, 0]
    assert class_counts(targets, 4).tolist() == [7, 5, 0, 0]
    assert class_counts(targets[None], 5).tolist() == [7, 5, 0, 0, 0]
    assert class_counts([[0, 1, 0], [1, 2, 0]], 3).tolist() == [3, 2, 1]
    unlucky = torch.tensor([[0, 1, 1], [0, 0, 0]])
    assert class_counts(iter([unlucky, torch.tensor([[0, 2, 0]])]), 3).tolist() == [6, 2, 1]
    assert class_counts(iter([unlucky[:, :2], unlucky]), 3).tolist() == [7, 3, 0]
    assert class_counts(iter([unlucky, torch.tensor([], dtype=torch.int64)]), 3).tolist() == [4, 2, 0]


def test_class_counts_for_the_weights_of_a_multi_label_loss():
    targets = torch.tensor(MULTI_HOT).float()
    weight = effective_number_weight(class_counts(targets, 3), 0.9, "clamp")
    torch.testing.assert_close(weight, effective_number_weight([2, 1, 3], 0.9))


@pytest.mark.parametrize("targets", [torch.tensor(MULTI_HOT), torch.tensor(MULTI_HOT).float(), MULTI_HOT])
def test_training_aids_refuse_multi_hot_rows(targets):
    with pytest.raises((TypeError, ValueError), match=r"targets (have|are)"):
        longtail.training.ClassBalancedSampler(targets)
    with pytest.raises((TypeError, ValueError), match=r"targets (have|are)"):
        longtail.training.long_tailed_indices(targets, 10.0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3, 100_000), (1, 3, 2, 50_000), (100_000, 3)])
def test_class_counts_of_long_multi_hot_rows_in_bounded_memory(monkeypatch, dtype, shape):
    monkeypatch.setattr(counting, "CHUNK", 10_000)
    peak, counts = peak_while(lambda: class_counts(torch.ones(1, dtype=dtype).expand(shape), 3))
    assert counts.tolist() == [100_000] * 3
    assert peak < 800_000
