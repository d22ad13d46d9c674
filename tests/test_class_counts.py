"""Counting targets: tensors, arrays, files and loaders of integers, and an error that says which is out of range."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import longtail
from longtail import class_counts, counting, effective_number_weight


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


TOKEN_FILES = ["uint16", "uint32", ">u2", "int64"]


@pytest.mark.parametrize("dtype", TOKEN_FILES)
def test_class_counts_of_memory_mapped_files(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(counting, "CHUNK", 1000)
    tokens = np.random.default_rng(0).integers(0, 50_000, 4321).astype(dtype)
    tokens.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=dtype, mode="r")
    expected = np.bincount(tokens.astype("int64"), minlength=50_000).tolist()
    assert class_counts(mapped, 50_000).tolist() == expected
    assert class_counts(mapped[::-1], 50_000).tolist() == expected
    assert class_counts(mapped[:4320].reshape(8, 540).T, 50_000).sum() == 4320
    limit = int(tokens.max())
    first = int((tokens == limit).argmax())
    with pytest.raises(IndexError, match=rf"targets\[{first}\] = {limit} is out of range, expected 0 to {limit - 1}"):
        class_counts(mapped, limit)
    place = rf"targets\[{first // 29}, {first % 29}\] = {limit} is out of range"
    with pytest.raises(IndexError, match=place):
        class_counts(mapped.reshape(149, 29), limit)


def test_class_counts_reads_files_in_bounded_memory(tmp_path, monkeypatch):
    """No step converts more than a chunk: 8 bytes for each of its tokens, whatever the length of the file."""
    monkeypatch.setattr(counting, "CHUNK", 10_000)
    np.zeros(2_000_000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    for targets in (mapped, torch.zeros(2_000_000, dtype=torch.uint8)):
        tracemalloc.start()
        with torch.profiler.profile(profile_memory=True) as profile:
            assert class_counts(targets, 3).tolist() == [2_000_000, 0, 0]
        assert tracemalloc.get_traced_memory()[1] < 16_000_000  # the profiler's own records among it
        tracemalloc.stop()
        largest = max(abs(event.self_cpu_memory_usage) for event in profile.events())
        assert 0 < largest <= 80_000


def batches_of(labels, kind):
    for part in torch.tensor(labels).split(7):
        yield {"pair": (part.double(), part), "mapping": {"ids": part, "labels": part}, "tensor": part}[kind]


@pytest.mark.parametrize("kind", ["pair", "mapping", "tensor"])
def test_class_counts_of_iterators(kind):
    labels = [0, 1, 1, 3, -100] * 9
    assert class_counts(batches_of(labels, kind), 5, ignore_index=-100).tolist() == [9, 18, 0, 9, 0]


def test_class_counts_of_a_data_loader():
    labels = torch.tensor([0, 1, 1, 3] * 9)
    loader = DataLoader(TensorDataset(torch.randn(36, 2), labels), batch_size=5)
    assert class_counts(loader, 5).tolist() == [9, 18, 0, 9, 0]
    triples = DataLoader(TensorDataset(labels, torch.randn(36, 2), labels + 1), batch_size=5)
    with pytest.raises(TypeError, match=r"no targets found in a batch \(\w+\), expected get_target="):
        class_counts(triples, 5)
    assert class_counts(triples, 5, get_target=lambda batch: batch[2]).tolist() == [0, 9, 18, 0, 9]
    with pytest.raises(IndexError, match="= 3 is out of range, expected 0 to 2"):
        class_counts(loader, 3)
    assert class_counts(iter([]), 2).tolist() == [0, 0]


def test_class_counts_alone_is_reduced_already():
    assert class_counts([0, 1, 1], 2, reduce=True).tolist() == [1, 2]


MULTI_HOT = [[1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 1]]
SOFT = [[0.5, 0.0, 1.0], [0.0, 0.25, 1.0], [1.0, 0.0, 0.0], [-100.0, 0.0, -100.0]]


@pytest.mark.parametrize("chunk", [3, 1 << 22])
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
    for chunk in (3, 1 << 22):
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
        DataLoader(TensorDataset(torch.tensor(MULTI_HOT), torch.tensor(MULTI_HOT)), batch_size=3),
    ):
        with pytest.raises(
            ValueError, match=r"expected targets\.bool\(\) for multi-hot rows, targets\.flatten\(\) for"
        ):
            class_counts(targets, 3)
    targets = torch.tensor(MULTI_HOT)
    assert class_counts(targets.flatten(), 3).tolist() == [7, 5, 0]
    assert class_counts(targets, 4).tolist() == [7, 5, 0, 0]
    assert class_counts(targets[None], 4).tolist() == [7, 5, 0, 0]
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
