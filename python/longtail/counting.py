"""Counting targets: of tensors, arrays, memory-mapped files and data loaders, in bounded memory, across ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .ranks import all_reduce_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK = 1 << 22  # elements converted and counted at a time: 32 MiB as int64


class Array(Protocol):
    """A numpy array, a pandas series, or whatever else turns itself into a list."""

    def tolist(self) -> Any: ...


Targets: TypeAlias = Tensor | Sequence[int] | Array | DataLoader[Any] | Iterator[Any]


def class_counts(
    targets: Targets,
    num_classes: int,
    ignore_index: int | None = None,
    *,
    get_target: Callable[[Any], Tensor | Sequence[int] | Array] | None = None,
    reduce: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Number of targets of each class, int64 [num_classes], on the device of ``targets`` (loaders: the CPU).

    Tensors and numpy arrays of any integer dtype and shape are read a chunk at a time, so that token files larger than
    memory can be counted: ``class_counts(numpy.memmap("train.bin", dtype="uint16", mode="r"), vocab_size)``.

    Args:
        targets: integers of any shape; a tensor, sequence or array. Or a ``DataLoader`` or an iterator, whose batches
            are gone through once.
        num_classes: at least 1.
        ignore_index: a value that is not counted, or None.
        get_target: takes the targets out of a batch of a loader. Default: the second of a tuple or list, "labels" of
            a mapping, a tensor or array itself.
        reduce: add up over the ranks of ``group`` (a collective call), each having counted its own shard. A process
            without ``torch.distributed`` is alone.
        group: default all ranks.

    Raises:
        IndexError: a target is out of range; names the first one and its place.
        TypeError: the targets are not integers, or there is no telling where a batch has them.
    """
    check_positive_int("num_classes", num_classes)
    if isinstance(targets, DataLoader | Iterator):
        counts = torch.zeros(num_classes, dtype=torch.int64, device="cpu")
        for batch in targets:
            found = get_target(batch) if get_target is not None else _target_of(batch)
            counts += _counts(found, num_classes, ignore_index).cpu()
    else:
        counts = _counts(targets, num_classes, ignore_index)
    return all_reduce_sum(counts, group) if reduce else counts


def integer_labels(targets: Tensor | Sequence[int] | Array) -> Tensor:
    """Targets of any kind as an int64 tensor of the same shape."""
    if isinstance(targets, Tensor):
        labels = targets.detach()
    elif _is_numpy(targets):
        labels = _from_numpy(targets)
    else:
        try:
            plain = targets.tolist() if hasattr(targets, "tolist") else list(targets)
            labels = torch.tensor(plain, dtype=None if plain != [] else torch.int64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"targets make no tensor ({error}), expected integers") from error
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"targets have dtype {labels.dtype}, expected integers")
    return labels.to(torch.int64)


def check_positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is a {type(value).__name__}, expected an int")
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")


def _counts(targets: Any, num_classes: int, ignore_index: int | None) -> Tensor:
    """Counts of one tensor, array or sequence, by chunks of its first dimension."""
    if not (isinstance(targets, Tensor) or _is_numpy(targets)):
        targets = integer_labels(targets)
    if len(targets.shape) == 0:
        return _count_chunk(integer_labels(targets), 0, num_classes, ignore_index)
    device = targets.device if isinstance(targets, Tensor) else "cpu"
    counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
    step = max(1, CHUNK // max(1, math.prod(targets.shape[1:])))
    for start in range(0, max(1, targets.shape[0]), step):  # once at least: the dtype of nothing is checked too
        counts += _count_chunk(integer_labels(targets[start : start + step]), start, num_classes, ignore_index)
    return counts


def _count_chunk(labels: Tensor, start: int, num_classes: int, ignore_index: int | None) -> Tensor:
    """Counts of int64 labels that begin at row ``start`` of the targets."""
    kept = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    wrong = kept & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        position = tuple(wrong.nonzero()[0].tolist())
        value = labels[position].item()
        if position:
            position = (start + position[0], *position[1:])
        where = f"targets[{', '.join(map(str, position))}]" if position else "targets"
        raise IndexError(f"{where} = {value} is out of range, expected 0 to {num_classes - 1}")
    return torch.bincount(labels[kept], minlength=num_classes)


def _is_numpy(targets: object) -> bool:
    """Whether it is a numpy array or scalar; numpy itself is not imported."""
    return hasattr(targets, "__array_interface__") and hasattr(targets, "astype")


def _from_numpy(array: Any) -> Tensor:
    """A copy as int64, whatever byte order, strides and write protection the array has."""
    if array.dtype.kind not in "iu":
        raise TypeError(f"targets have dtype {array.dtype}, expected integers")
    return torch.as_tensor(array.astype("int64"), device="cpu")


def _target_of(batch: Any) -> Any:
    """The targets of a batch, where they usually are."""
    if isinstance(batch, Tensor) or _is_numpy(batch):
        return batch
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[1]
    raise TypeError(f"no targets found in a batch ({type(batch).__name__}), expected get_target= to take them out")
