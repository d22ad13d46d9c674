"""Counting several labels a row: lists of labels, sparse matrices, totals, and what could be read in two ways."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import longtail
from longtail import class_counts
from longtail.class_balance.arrays import is_sparse

LISTS = [[3, 7], [], [1], [7, 0, 3]]
COUNTS = [1, 1, 0, 2, 0, 0, 0, 2]


def multi_hot(lists, num_classes):
    y = torch.zeros(len(lists), num_classes, dtype=torch.bool)
    for row, labels in zip(y, lists, strict=True):
        row[list(labels)] = True
    return y


def sparse_forms(y):
    """Of dense y, in all layouts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse", UserWarning)
        return [y.to_sparse(), y.to_sparse_csr(), y.to_sparse_csc(), y.float().to_sparse_bsr((1, 2)).to(y.dtype)]


class Coordinates:
    """A sparse matrix as scipy's look."""

    def __init__(self, y):
        self.row, self.col = np.nonzero(y)
        self.data, self.shape = y[self.row, self.col], y.shape

    def tocoo(self):
        return self


def test_label_lists_of_every_kind():
    array = np.empty(4, dtype=object)
    array[:] = LISTS
    for targets in (
        LISTS,
        tuple(map(tuple, LISTS)),
        [set(row) for row in LISTS],
        [torch.tensor(row, dtype=torch.int32) for row in LISTS],
        [torch.tensor(row) for row in LISTS],
        [np.array(row, dtype=np.uint8) for row in LISTS],
        array,
        iter([([0] * 3, LISTS[:3]), ([0], LISTS[3:])]),
        iter([{"labels": [LISTS[0]]}, {"labels": LISTS[1:]}]),
        DataLoader(LISTS, batch_size=3, collate_fn=lambda rows: {"labels": rows}),
    ):
        counts = class_counts(targets, 8)
        assert (counts.dtype, counts.tolist()) == (torch.int64, COUNTS)
    assert class_counts([[3, 7], [-100], [1, -100]], 8, ignore_index=-100).tolist() == [0, 1, 0, 1, 0, 0, 0, 1]
    assert class_counts([[], []], 3).tolist() == [0, 0, 0]
    assert class_counts([{0}, {1}], 2).tolist() == [1, 1]
    assert class_counts([{1, 0}, {0, 1}], 2).tolist() == [2, 2]


@given(lists=st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=20))
def test_label_lists_are_multi_hot_rows(lists):
    expected, totals = class_counts(multi_hot(lists, 6), 6, return_totals=True)
    assert totals.tolist() == [len(lists)] * 6
    for found in (lists, multi_hot(lists, 6).to_sparse()):
        counts, of_found = class_counts(found, 6, return_totals=True)
        assert (counts.tolist(), of_found.tolist()) == (expected.tolist(), totals.tolist())
    assert class_counts([list(labels) for labels in lists] + [[]], 6).tolist() == expected.tolist()


def test_sparse_matrices_of_torch():
    y = multi_hot(LISTS, 8)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        for targets in sparse_forms(y.to(dtype)):
            counts = class_counts(targets, 8)
            assert counts.dtype == (torch.float64 if dtype == torch.float32 else torch.int64)
            assert counts.tolist() == COUNTS
    soft = torch.tensor([[0.5, 0, 1.0004], [-100, 0.25, 0]])
    for targets in (soft.to_sparse(), iter([soft[:1].to_sparse(), (None, soft[1:].to_sparse())])):
        counts, totals = class_counts(targets, 3, -100, return_totals=True)
        assert (counts.tolist(), totals.tolist()) == ([0.5, 0.25, 1], [1, 2, 2])
    place = torch.tensor([[0, 0], [1, 1]])
    twice = torch.sparse_coo_tensor(place, torch.tensor([0.5, 0.25]), (1, 3), check_invariants=True)
    assert class_counts(twice, 3).tolist() == [0, 0.75, 0], "entries of one place stand for their sum"
    set_twice = torch.sparse_coo_tensor(place, torch.tensor([True, True]), (1, 3), check_invariants=True)
    assert class_counts(set_twice, 3).tolist() == [0, 1, 0]


def test_sparse_matrices_of_scipy():
    y = multi_hot(LISTS, 8).numpy()
    forms = [Coordinates(y.astype(np.int8))]
    try:
        from scipy import sparse
    except ImportError:
        pass
    else:
        kinds = (sparse.csr_matrix, sparse.coo_array, sparse.csc_array, sparse.lil_matrix, sparse.dok_array)
        forms += [kind(y.astype(dtype)) for kind in kinds for dtype in (bool, "float32", "int32")]
    for targets in forms:
        assert is_sparse(targets)
        counts, totals = class_counts(targets, 8, return_totals=True)
        assert (counts.tolist(), totals.tolist()) == (COUNTS, [4] * 8)
        assert class_counts(iter([targets]), 8).tolist() == COUNTS


def test_totals():
    y = torch.tensor([[1.0, 0, -1], [0, 0.5, 1], [-1, -1, -1]])
    for targets in (y, y.numpy(), iter(y.split(1)), iter(y.split(2))):
        counts, totals = class_counts(targets, 3, -1, return_totals=True)
        assert (counts.tolist(), totals.tolist()) == ([1, 0.5, 1], [2, 2, 1])
        assert totals.dtype == torch.int64
    for reduce in (False, True):
        _, totals = class_counts(y.expand(2, 3, 3).mT > 0, 3, return_totals=True, reduce=reduce)
        assert totals.tolist() == [6, 6, 6]
    counts, totals = class_counts([0, 2, 2, -100], 3, -100, return_totals=True)
    assert (counts.tolist(), totals.tolist()) == ([1, 0, 2], [3, 3, 3])
    _, totals = class_counts(np.ma.masked_array([[True, False], [True, True]], [[1, 0], [0, 0]]), 2, return_totals=True)
    assert totals.tolist() == [1, 2]
    for targets in (torch.tensor([[3, 7], [2, 1]]), [[3, 7], [2, 1]], [torch.tensor([3, 2]), torch.tensor([7, 1])]):
        assert class_counts(targets, 8).sum() == 4
        with pytest.raises(ValueError, match=r"shape \[2, 2\], expected with return_totals .*\.flatten\(\)"):
            class_counts(targets, 8, return_totals=True)
    _, totals = class_counts([{3, 7}, {2, 1}], 8, return_totals=True)
    assert totals.tolist() == [2] * 8


@pytest.mark.parametrize(
    ("targets", "exception", "message"),
    [
        ([[0, 1], [2]], IndexError, r"targets\[1\] has label 2, which is out of range, expected 0 to 1"),
        ([[0, 1], [-1]], IndexError, r"targets\[1\] has label -1, which is out of range"),
        ([[0], [1, 0, 1]], ValueError, r"targets\[1\] has label 1 twice, expected the labels of one row, each once"),
        ([[0], [0.5, 1]], TypeError, r"targets have dtype torch\.float32, expected integers"),
        ([[0], ["a"]], TypeError, "targets make no tensor"),
        ([[0], [[0], [1]]], TypeError, "targets make no tensor"),
        (
            [torch.tensor([True, False])] * 2,
            TypeError,
            r"targets\[0\] has dtype torch\.bool, .*torch\.stack\(targets\)",
        ),
        ([torch.tensor([1, 0]), torch.tensor([0, 1])], ValueError, r"could be multi-hot .* sets for lists of labels"),
        (torch.eye(3).to_sparse(), TypeError, r"targets are sparse of shape \[3, 3\], expected .* shape \[N, 2\]"),
        (torch.eye(2)[None].to_sparse(), TypeError, r"targets are sparse of shape \[1, 2, 2\]"),
        (torch.eye(2).to_sparse(1), TypeError, "targets have 1 dense dimensions, expected a sparse matrix"),
        (2 * torch.eye(2).to_sparse(), ValueError, r"targets\[0, 0\] = 2\.0 is no multi-hot target, expected a number"),
        (torch.eye(2, dtype=torch.complex64).to_sparse(), TypeError, r"targets have dtype torch\.complex64"),
        (Coordinates(np.eye(2, dtype=object)), TypeError, "targets have dtype object"),
        (iter([[{1}, {0}]]), TypeError, r"no targets found in a batch \(list\), expected get_target="),
        (iter([[[1], [1, 0]]]), TypeError, r"no targets found in a batch \(list\), expected get_target="),
    ],
)
def test_what_is_refused(targets, exception, message):
    with pytest.raises(exception, match=message):
        class_counts(targets, 2)


def test_zeros_of_a_sparse_matrix_are_not_ignored():
    with pytest.raises(ValueError, match="ignore_index is 0, which every entry left out of a sparse matrix is"):
        class_counts(torch.eye(2).to_sparse(), 2, 0)
    assert class_counts([[0, 1], [0]], 2, 0).tolist() == [0, 1]


def test_the_other_aids_refuse_them():
    for targets in (LISTS, torch.eye(3).to_sparse()):
        with pytest.raises((TypeError, ValueError), match="targets"):
            longtail.training.ClassBalancedSampler(targets)
        with pytest.raises((TypeError, ValueError), match="targets"):
            longtail.training.StreamingClassFrequency(8).update(targets)
