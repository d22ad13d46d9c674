"""Counting targets: tensors, arrays, files and loaders of integers, and an error that says which is out of range."""

from __future__ import annotations

import math
import tracemalloc
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import longtail
from allocations import peak_while
from longtail import class_counts
from longtail.class_balance import counting


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


@pytest.mark.parametrize("targets", [["cat", "dog"], [[0, 1], 2], 3, None])
def test_class_counts_of_what_is_no_tensor(targets):
    with pytest.raises(TypeError, match=r"targets make no tensor \(.*\), expected integers"):
        class_counts(targets, 2)


class Labels(torch.utils.data.Dataset):
    """With a length, and pairs that would make a tensor of two columns."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index > 1:
            raise IndexError(index)
        return index, 0


class Frame:
    """Iterates its columns' names, as a pandas.DataFrame does."""

    def keys(self):
        return [0, 1]

    def __iter__(self):
        return iter(self.keys())


@pytest.mark.parametrize("targets", [{0: 5, 1: 7}, Counter([0, 0, 1]), {0, 1}, frozenset([0]), Labels(), Frame()])
def test_class_counts_of_what_holds_no_targets(targets):
    """Their elements are keys, each once, or pairs of inputs and targets."""
    message = rf"targets are a {type(targets).__name__}, expected the targets themselves"
    with pytest.raises(TypeError, match=message):
        class_counts(targets, 8)
    with pytest.raises(TypeError, match=message):
        class_counts(iter([0]), 8, get_target=lambda _: targets)


def masked(values, mask):
    values, mask = np.array(values), np.array(mask, dtype=bool)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of MaskedTensors", UserWarning)
        tensor = torch.masked.masked_tensor(torch.from_numpy(values), torch.from_numpy(~mask))
    return [np.ma.masked_array(values, mask), tensor, iter([np.ma.masked_array(values, mask)])]


@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_class_counts_leaves_out_masked_entries(monkeypatch, chunk):
    monkeypatch.setattr(counting, "CHUNK", chunk)
    for targets in masked([[0, 7, 2], [2, 1, -1]], [[0, 1, 0], [0, 0, 1]]):
        assert class_counts(targets, 4, ignore_index=0).tolist() == [0, 1, 2, 0]
    for targets in masked([[0.5, math.nan, 1], [0, 1, 1]], [[0, 1, 0], [0, 0, 1]]):
        assert class_counts(targets, 3).tolist() == [0.5, 1, 1]
    for targets in masked([[True, True], [True, False]], [[0, 1], [0, 0]]):
        assert class_counts(targets, 2).tolist() == [2, 0]
    for targets in masked([0, 7, 9], [0, 1, 0]):
        with pytest.raises(IndexError, match=r"targets\[2\] = 9 is out of range"):
            class_counts(targets, 4)
    unmasked = np.ma.masked_array([0, 1, 1])
    assert class_counts(unmasked, 2).tolist() == class_counts(unmasked[::-1], 2).tolist() == [1, 2]
    assert class_counts(np.ma.masked_array([0, 1, 1], [0, 0, 1])[::-1], 2).tolist() == [1, 1]


def test_training_aids_refuse_masked_targets():
    for targets in masked([0, 1, 2], [0, 1, 0])[:2]:
        with pytest.raises(TypeError, match=r"targets are a Masked\w+, expected none with masked entries"):
            longtail.training.ClassBalancedSampler(targets)
        with pytest.raises(TypeError, match="expected none with masked entries"):
            longtail.training.StreamingClassFrequency(3).update(targets)


@pytest.mark.parametrize(
    ("ignore_index", "exception", "message"),
    [
        ("a", TypeError, "ignore_index is a str, expected an int or None"),
        (1.0, TypeError, "ignore_index is a float, expected an int or None"),
        (True, TypeError, "ignore_index is a bool, expected an int or None"),
        (2**70, ValueError, f"ignore_index is {2**70}, expected an int or None in"),
    ],
)
def test_class_counts_ignore_index(ignore_index, exception, message):
    with pytest.raises(exception, match=message):
        class_counts([0], 2, ignore_index)


class Sharded(torch.Tensor):
    """What tells a DTensor."""

    full_tensor = torch.Tensor.clone


def test_class_counts_of_tensors_that_are_not_plain():
    with pytest.raises(TypeError, match=r"targets are a DTensor, expected targets\.full_tensor\(\)"):
        class_counts(torch.tensor([0]).as_subclass(Sharded), 3)
    nested = torch.nested.as_nested_tensor([torch.tensor([0, 1]), torch.tensor([2])], layout=torch.jagged)
    with pytest.raises(TypeError, match="targets is a nested tensor"):
        class_counts(nested, 3)


def test_class_counts_num_classes():
    with pytest.raises(ValueError, match="num_classes is 0, expected at least 1"):
        class_counts([0], 0)
    with pytest.raises(ValueError, match="num_classes is an int of 1329 bits, expected at most"):
        class_counts([0], 10**400)
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


@pytest.mark.parametrize("shape", [(500_000,), (1, 500_000), (2, 1, 250_000), (50, 10_000)])
def test_class_counts_reads_in_bounded_memory(tmp_path, monkeypatch, shape):
    """No step converts more than a chunk, however long the file and its rows are: 8 bytes for each, a few times."""
    monkeypatch.setattr(counting, "CHUNK", 10_000)
    np.zeros(500_000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r").reshape(shape)
    tracemalloc.start()
    assert class_counts(mapped, 3).tolist() == [500_000, 0, 0]
    assert tracemalloc.get_traced_memory()[1] < 800_000  # numpy's arrays among it
    tracemalloc.stop()
    for targets in (mapped, torch.zeros(shape, dtype=torch.uint8)):
        peak, counts = peak_while(lambda targets=targets: class_counts(targets, 3))
        assert counts.tolist() == [500_000, 0, 0]
        assert peak < 800_000


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
