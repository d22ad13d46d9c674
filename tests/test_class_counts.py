"""Counting targets: any integers of any shape, and an error that says which target is out of range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longtail import class_counts


@given(labels=st.lists(st.integers(0, 6), max_size=60))
def test_class_counts_counts(labels):
    expected = [labels.count(c) for c in range(7)]
    for targets in (labels, np.array(labels, dtype=np.int32), torch.tensor(labels, dtype=torch.uint8)):
        counts = class_counts(targets, 7)
        assert counts.dtype == torch.int64
        assert counts.tolist() == expected


def test_class_counts_of_any_shape_and_ignore_index():
    targets = torch.tensor([[[0, 2], [-100, 2]], [[1, 2], [-100, 0]]])
    assert class_counts(targets, 4, ignore_index=-100).tolist() == [2, 1, 3, 0]
    assert class_counts(targets.mT, 4, ignore_index=-100).tolist() == [2, 1, 3, 0]
    assert class_counts(torch.tensor(3), 4).tolist() == [0, 0, 0, 1]
    assert class_counts(torch.tensor([0, 1, 1]), 2, ignore_index=1).tolist() == [1, 0]
    assert class_counts(torch.empty(0, 5, dtype=torch.int64), 2).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0, 1, 4, 9], r"targets\[2\] = 4 is out of range, expected 0 to 3"),
        ([[0, 1], [-1, 4]], r"targets\[1, 0\] = -1 is out of range"),
        (torch.tensor(-100), r"targets = -100 is out of range"),
    ],
)
def test_class_counts_out_of_range(targets, message):
    with pytest.raises(IndexError, match=message):
        class_counts(targets, 4)


@pytest.mark.parametrize("targets", [[0.0, 1.0], torch.tensor([True]), torch.ones(3), torch.empty(0)])
def test_class_counts_of_what_is_not_integer(targets):
    with pytest.raises(TypeError, match=r"targets have dtype torch\.\w+, expected integers"):
        class_counts(targets, 2)


@pytest.mark.parametrize("targets", [["cat", "dog"], [[0, 1], [2]], 3, None])
def test_class_counts_of_what_is_no_tensor(targets):
    with pytest.raises(TypeError, match=r"targets make no tensor \(.*\), expected integers"):
        class_counts(targets, 2)


def test_class_counts_num_classes():
    with pytest.raises(ValueError, match="num_classes is 0, expected at least 1"):
        class_counts([0], 0)
    for value in (2.0, True, None):
        with pytest.raises(TypeError, match=r"num_classes is a \w+, expected an int"):
            class_counts([0], value)
