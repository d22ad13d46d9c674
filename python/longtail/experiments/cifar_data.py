"""CIFAR-10 and CIFAR-100 from the files of their home page, binary or Python pickles; nothing is downloaded.

The pickles are read without numpy and without running anything that they name: the few constructors that an array
of bytes needs are replaced by plain records, everything else is refused. (torchvision reads the pickles alone, none but
the published ones, and installing it may replace the torch that is there.)
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import brief, one_line, read_whole
from .pickles import check_pickle

PIXELS = 3 * 32 * 32


class Format(NamedTuple):
    """Files of one data set in one format."""

    folder: str  # as unpacked
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int  # in front of each image of the binary format; the last one is the class
    labels: str  # key of the pickle


class Dataset(NamedTuple):
    """A data set in both formats."""

    num_classes: int
    train_images: int  # published, in each file
    test_images: int
    binary: Format
    pickled: Format


DATASETS = {
    "cifar10": Dataset(
        *(10, 10000, 10000),
        Format(
            *("cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)), 1, ""
        ),
        Format("cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), 0, "labels"),
    ),
    "cifar100": Dataset(
        *(100, 50000, 10000),
        Format("cifar-100-binary", ("train.bin",), ("test.bin",), 2, ""),
        Format("cifar-100-python", ("train",), ("test",), 0, "fine_labels"),
    ),
}


class Images(NamedTuple):
    """Training and test images [N, 3, 32, 32] uint8, labels [N] int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    incomplete: str = ""  # files that have not as many images as the published ones; a file may be cut between two


def load_images(folder: Path, dataset: str) -> Images:
    """Reads a data set from ``folder``, or from the folder of the unpacked archive in it.

    Raises:
        ValueError: the files are not there, cut short, or not what they should be; names the file.
        OSError: a file cannot be read.
    """
    known = DATASETS[dataset]
    for form, read in ((known.binary, _read_binary), (known.pickled, _read_pickle)):
        for place in (folder, folder / form.folder):
            names = (*form.train, *form.test)
            present = [name for name in names if (place / name).is_file()]
            if present == list(names):
                train, test = ([read(place / name, form, known.num_classes) for name in part] for part in form[1:3])
                published = [known.train_images] * len(train) + [known.test_images] * len(test)
                sizes = zip(names, (labels.numel() for _, labels in train + test), published, strict=True)
                incomplete = (f"{name} ({size} of {whole} images)" for name, size, whole in sizes if size != whole)
                return Images(*_join(train), *_join(test), ", ".join(incomplete))
            if present:
                missing = next(name for name in names if name not in present)
                raise ValueError(
                    f"{str(place)!r} has {present[0]} but no {missing}, expected all of {', '.join(names)}"
                )
    raise ValueError(
        f"no {dataset} under {str(folder)!r}, expected {', '.join((*known.binary.train, *known.binary.test))} "
        f"or {', '.join((*known.pickled.train, *known.pickled.test))}, there or in {known.binary.folder} or "
        f"{known.pickled.folder}"
    )


Batch = tuple[Tensor, Tensor]


def _join(batches: list[Batch]) -> Batch:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def _checked(path: Path, images: Tensor, labels: Tensor, num_classes: int) -> Batch:
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(f"{str(path)!r}: label {i} is {int(labels[i])}, expected 0 to {num_classes - 1}")
    return images.reshape(-1, 3, 32, 32), labels


def _read_binary(path: Path, form: Format, num_classes: int) -> Batch:
    """Records of one or two label bytes and 3072 pixels, channel by channel."""
    content, record = read_whole(path), form.label_bytes + PIXELS
    if not content or len(content) % record:
        raise ValueError(f"{str(path)!r} has {len(content)} bytes, expected a multiple of {record}: is it cut short?")
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
    return _checked(path, rows[:, form.label_bytes :], rows[:, form.label_bytes - 1].long(), num_classes)


class _Record:
    """What stands for a numpy object: how it was made, and its state."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: Any) -> None:  # which a pickle may leave out
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Record):
    pass


class _Dtype(_Record):
    pass


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into the old protocols."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _latin1,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The records above, for the names that an array needs; anything else is an error, and is not imported."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which an array of bytes does not need")
        return _ALLOWED[module, name]


def _read_pickle(path: Path, form: Format, num_classes: int) -> Batch:
    """A dictionary of b"data", uint8 [N, 3072], and a list of labels; keys as bytes or text."""
    raw = read_whole(path)
    try:
        check_pickle(raw)
        content = _RestrictedUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises almost anything
        reason = one_line(error, 200) or type(error).__name__
        raise ValueError(f"{str(path)!r} is no CIFAR pickle, or is cut short: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, expected a dictionary")
    data, labels = (content.get(key.encode(), content.get(key)) for key in ("data", form.labels))
    pixels = _bytes_of(path, data)
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise ValueError(f"{str(path)!r}: {form.labels} is a {type(labels).__name__}, expected a list of integers")
    if not labels or len(pixels) != len(labels) * PIXELS:
        raise ValueError(
            f"{str(path)!r} has {len(pixels)} bytes of pixels and {len(labels)} labels, {PIXELS} bytes each"
        )
    wrong = next((i for i, label in enumerate(labels) if not 0 <= label < num_classes), None)
    if wrong is not None:
        raise ValueError(f"{str(path)!r}: label {wrong} is {brief(labels[wrong])}, expected 0 to {num_classes - 1}")
    return _checked(path, torch.frombuffer(bytearray(pixels), dtype=torch.uint8), torch.tensor(labels), num_classes)


def _bytes_of(path: Path, array: Any) -> bytes:
    """The content of a pickled numpy array, after a look at its shape, dtype and order."""
    if not isinstance(array, _Array):
        raise ValueError(f"{str(path)!r}: data is a {type(array).__name__}, expected a numpy array")
    if not (isinstance(array.state, tuple) and len(array.state) == 5):
        raise ValueError(f"{str(path)!r}: data is an array without content, expected [N, {PIXELS}] bytes")
    _, shape, dtype, fortran, content = array.state
    kind = dtype.arguments[0] if isinstance(dtype, _Dtype) and dtype.arguments else None
    if kind not in ("u1", b"u1") or fortran or not isinstance(content, bytes):
        raise ValueError(f"{str(path)!r}: data is no array of bytes in row order (dtype {brief(kind)})")
    if not isinstance(shape, tuple) or any(type(size) is not int for size in shape):
        raise ValueError(f"{str(path)!r}: the shape of data is no tuple of integers")
    if len(shape) != 2 or shape[1] != PIXELS or shape[0] * PIXELS != len(content):
        sizes = ", ".join(map(brief, shape[:5]))
        raise ValueError(f"{str(path)!r}: data has shape ({sizes}) and {len(content)} bytes, expected (N, {PIXELS})")
    return content
