"""CIFAR files of both formats and data sets: read as written, and explained where they are not what they should be."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

pytest.importorskip("numpy")
import numpy as np

from cifar_files import PIXELS, doubled, make_batches, nested, write_binary, write_pickles
from longtail.experiments.cifar_data import DATASETS, load_images

WRITERS = {"binary": write_binary, "pickle": write_pickles}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_images_come_back_as_written(dataset, form, inside, tmp_path):
    batches = make_batches(dataset)
    known = getattr(DATASETS[dataset], {"binary": "binary", "pickle": "pickled"}[form])
    folder = tmp_path / known.folder if inside else tmp_path
    folder.mkdir(exist_ok=True)
    WRITERS[form](folder, dataset, batches)
    found = load_images(tmp_path, dataset)
    *train, test = batches.values()
    assert torch.equal(found.train_images.flatten(1), torch.cat([pixels for pixels, _ in train]))
    assert torch.equal(found.train_labels, torch.cat([labels for _, labels in train]))
    assert torch.equal(found.test_images, test[0].view(-1, 3, 32, 32))
    assert torch.equal(found.test_labels, test[1])
    assert found.train_images.dtype == torch.uint8
    assert found.test_labels.dtype == torch.int64


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_pickles_of_every_protocol_before_5(protocol, tmp_path):
    batches = make_batches("cifar100", images=2)
    write_pickles(tmp_path, "cifar100", batches, protocol)
    assert torch.equal(load_images(tmp_path, "cifar100").train_images.flatten(1), batches["train"][0])


def python2_pickle(pixels, labels):
    """As Python 2 wrote the published files: byte strings for text, numpy's old names."""
    raw = pixels.numpy().tobytes()

    def text(value):
        return b"U" + bytes([len(value)]) + value

    numbers = b"(" + b"".join(b"K" + bytes([label]) for label in labels.tolist()) + b"e"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    shape = b"K" + bytes([len(pixels)]) + b"M" + PIXELS.to_bytes(2, "little") + b"\x86"
    array += b"(K\x01" + shape + dtype + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"]" + numbers + b"u."


def test_a_pickle_of_python_2(tmp_path):
    batches = make_batches("cifar10", images=3)
    for name, (pixels, labels) in batches.items():
        content = python2_pickle(pixels, labels)
        assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], pixels.numpy())
        (tmp_path / name).write_bytes(content)
    assert torch.equal(load_images(tmp_path, "cifar10").test_labels, batches["test_batch"][1])


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("left", [0, 1, 100, PIXELS, -1])
def test_truncated_files_are_explained(form, left, tmp_path):
    WRITERS[form](tmp_path, "cifar10", make_batches("cifar10"))
    path = tmp_path / ("data_batch_3.bin" if form == "binary" else "data_batch_3")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"data_batch_3.*cut short"):
        load_images(tmp_path, "cifar10")


@pytest.mark.parametrize("form", WRITERS)
def test_missing_files_and_wrong_labels_are_named(form, tmp_path):
    ending = ".bin" if form == "binary" else ""
    with pytest.raises(ValueError, match=r"no cifar10 under .*data_batch_1.bin.*test_batch"):
        load_images(tmp_path, "cifar10")
    batches = make_batches("cifar10")
    batches["data_batch_2"][1][4] = 10
    WRITERS[form](tmp_path, "cifar10", batches)
    with pytest.raises(ValueError, match=rf"data_batch_2{ending}'?: label 4 is 10, expected 0 to 9"):
        load_images(tmp_path, "cifar10")
    (tmp_path / f"data_batch_4{ending}").unlink()
    with pytest.raises(ValueError, match=rf"but no data_batch_4{ending}"):
        load_images(tmp_path, "cifar10")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_cannot_run_anything(protocol, tmp_path):
    write_pickles(tmp_path, "cifar100", make_batches("cifar100"))
    marker = tmp_path / "was_run"
    content = pickle.dumps({b"data": Malicious(str(marker)), b"fine_labels": []}, protocol=protocol)
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(ValueError, match=r"asks for \w+\.mkdir"):
        load_images(tmp_path, "cifar100")
    assert not marker.exists()
    pickle.loads(content)  # it would have been
    assert marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({b"data": np.zeros((2, 3071), np.uint8)}, r"shape \(2, 3071\)"),
        ({b"data": np.zeros((2, 3072), np.float32)}, "no array of bytes"),
        ({b"data": np.asfortranarray(np.zeros((2, 3072), np.uint8))}, "no array of bytes"),
        ({b"data": [0] * 3072}, "data is a list"),
        ({b"fine_labels": [1]}, "1 labels"),
        ({b"fine_labels": [1, 2.0]}, "expected a list of integers"),
        ({b"fine_labels": [1, 100]}, "label 1 is 100"),
        ({b"fine_labels": [-1, 0]}, "label 0 is -1"),
        ({b"fine_labels": [10**30, 0]}, "label 0 is 1000"),
        ({b"fine_labels": None}, "NoneType"),
    ],
)
def test_pickles_of_something_else_are_explained(changes, message, tmp_path):
    write_pickles(tmp_path, "cifar100", make_batches("cifar100"))
    content = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1, 2]} | changes
    (tmp_path / "train").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, "cifar100")


def in_a_dictionary(data, labels=b"]"):
    return b"\x80\x02}(U\x04data" + data + b"U\x0bfine_labels" + labels + b"u."


ARRAY = b"cnumpy\nndarray\n"
DTYPE = b"cnumpy\ndtype\nU\x02u1\x85R"


def array_of(shape, dtype=DTYPE):
    return ARRAY + b")\x81(K\x01" + shape + dtype + b"\x89U\x00tb"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (in_a_dictionary(ARRAY + b")\x81"), "data is an array without content"),
        (in_a_dictionary(ARRAY + b")R"), "data is an array without content"),
        (in_a_dictionary(ARRAY + b")RNb"), "data is an array without content"),
        (in_a_dictionary(b"cnumpy\ndtype\n)\x81"), "data is a _Dtype"),
        (in_a_dictionary(array_of(b"K\x00M\x00\x0c\x86", b"cnumpy\ndtype\n)\x81")), r"row order \(dtype None\)"),
        (in_a_dictionary(array_of(b"K\x00M\x00\x0c\x86", b"cnumpy\ndtype\n]\x85R")), r"row order \(dtype a list\)"),
        (in_a_dictionary(array_of(b"]M\x00\x0c\x86")), "no tuple of integers"),
        (in_a_dictionary(array_of(nested(100000))), "more than 1000 elements"),
        (in_a_dictionary(array_of(doubled(60))), "more than 1000 elements"),
        (b"\x80\x02}" + nested(1000000) + b"K\x01s.", "more than 1000 elements"),
        (b"\x80\x02}" + nested(100000, b"]") + b"K\x01s.", "more than 1000 elements"),
        (b"\x80\x02}" + doubled(60) + b"K\x01s.", "more than 1000 elements"),
        (b"\x80\x02}(" + b"]" * 50000 + b"a" * 49999 + b"K\x01u.", "unhashable"),
        (in_a_dictionary(b"]" * 50000 + b"a" * 49999), "data is a list"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "object 2147483647 is stored, of 2 so far"),
        (b"\x80\x02h\x07.", "no CIFAR pickle"),
        (b"\x80\x02a.", "APPEND finds nothing on the stack"),
        (b"\x80\x02u.", "no CIFAR pickle"),
        (b"cos\x1b]0;title\x07\nsystem\n.", r"asks for os\\x1b\]0;title\\x07\.system"),
        (b"c" + b"x" * 100000 + b"\nsystem\n.", r"x\.\.\.$"),
    ],
)
def test_hostile_pickles_are_explained_in_one_line(content, message, tmp_path):
    write_pickles(tmp_path, "cifar100", make_batches("cifar100"))
    (tmp_path / "test").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_images(tmp_path, "cifar100")
    said = str(caught.value)
    assert str(tmp_path / "test") in said
    assert said.isprintable()
    assert len(said) < 500


def test_a_label_of_many_digits(tmp_path):
    write_pickles(tmp_path, "cifar100", make_batches("cifar100"))
    content = {b"data": np.zeros((1, PIXELS), np.uint8), b"fine_labels": [10**5000]}
    (tmp_path / "train").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=r"train': label 0 is an integer of more than 100 bits, expected 0 to 99"):
        load_images(tmp_path, "cifar100")


@pytest.mark.parametrize("form", WRITERS)
def test_files_with_other_numbers_of_images_than_published_are_named(form, tmp_path, monkeypatch):
    """A binary file may be cut between two images, where nothing else tells."""
    monkeypatch.setitem(DATASETS, "cifar10", DATASETS["cifar10"]._replace(train_images=6, test_images=6))
    batches = make_batches("cifar10")
    WRITERS[form](tmp_path, "cifar10", batches)
    assert load_images(tmp_path, "cifar10").incomplete == ""
    for name, images in (("data_batch_3", 5), ("test_batch", 2)):
        batches[name] = tuple(values[:images] for values in batches[name])
    WRITERS[form](tmp_path, "cifar10", batches)
    ending = ".bin" if form == "binary" else ""
    expected = f"data_batch_3{ending} (5 of 6 images), test_batch{ending} (2 of 6 images)"
    assert load_images(tmp_path, "cifar10").incomplete == expected


def test_a_pickle_of_no_dictionary(tmp_path):
    write_pickles(tmp_path, "cifar100", make_batches("cifar100"))
    (tmp_path / "test").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match="holds a list, expected a dictionary"):
        load_images(tmp_path, "cifar100")
