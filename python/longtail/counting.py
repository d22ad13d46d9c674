"""Counting targets: of tensors, arrays, memory-mapped files and data loaders, in bounded memory, across ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .arguments import ROUNDING, shown
from .ranks import all_reduce_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK = 1 << 22  # elements converted and counted at a time: 32 MiB as int64


class Array(Protocol):
    """A numpy array, a pandas series, or whatever else turns itself into a list."""

    def tolist(self) -> Any: ...


Targets: TypeAlias = Tensor | Sequence[Any] | Array | DataLoader[Any] | Iterator[Any]


def class_counts(
    targets: Targets,
    num_classes: int,
    ignore_index: int | None = None,
    *,
    get_target: Callable[[Any], Tensor | Sequence[Any] | Array] | None = None,
    reduce: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Number of targets of each class, [num_classes], on the device of ``targets`` (loaders: the CPU).

    Integers are class indices, and their counts int64. Floating-point or bool targets (N, C) or (N, C, d1, ...) with
    ``C = num_classes`` are multi-hot: their sums over all dimensions but the classes', float64 of floating-point
    targets (0, 1, or soft in between; 1e-3 beyond counts as rounded), int64 of bools. Integers (N, C) that hold nothing
    but 0 and 1, in all batches of a loader, could be either, and are refused: ``targets.bool()`` is multi-hot,
    ``targets.flatten()`` indices.

    Tensors and numpy arrays of any integer dtype and shape are read a chunk at a time, so that token files larger than
    memory can be counted: ``class_counts(numpy.memmap("train.bin", dtype="uint16", mode="r"), vocab_size)``.

    Args:
        targets: integers of any shape, or multi-hot rows; a tensor, sequence or array. Or a ``DataLoader`` or an
            iterator, whose batches are gone through once.
        num_classes: at least 1.
        ignore_index: a value that is not counted, of multi-hot rows too, or None.
        get_target: takes the targets out of a batch of a loader. Default: the second of a tuple or list, "labels" of
            a mapping, a tensor or array itself.
        reduce: add up over the ranks of ``group`` (a collective call), each having counted its own shard. A process
            without ``torch.distributed`` is alone.
        group: default all ranks.

    Raises:
        IndexError: a class index is out of range; names the first one and its place.
        TypeError: the targets are neither integers nor multi-hot, or there is no telling where a batch has them.
        ValueError: a multi-hot target is not in [0, 1]; integers (N, C) hold nothing but 0 and 1.
    """
    check_positive_int("num_classes", num_classes)
    if isinstance(targets, DataLoader | Iterator):
        counts, rows = torch.zeros(num_classes, dtype=torch.int64, device="cpu"), True
        for batch in targets:
            found = get_target(batch) if get_target is not None else _target_of(batch)
            of_batch, as_rows = _counts(found, num_classes, ignore_index)
            counts, rows = counts + of_batch.cpu(), rows and as_rows
    else:
        counts, rows = _counts(targets, num_classes, ignore_index)
    if rows and counts[:2].any() and not counts[2:].any():
        raise ValueError(
            f"targets are integers of shape [N, {num_classes}] that hold nothing but 0 and 1, which could be multi-hot "
            "rows or class indices: expected targets.bool() for multi-hot rows, targets.flatten() for class indices"
        )
    return _over_ranks(counts, group) if reduce else counts


def _over_ranks(counts: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over ranks, of which some may hold integers and some float64: a rank without batches, for one."""
    soft = counts.new_full((1,), float(counts.is_floating_point()), dtype=torch.float64)
    total = all_reduce_sum(torch.cat([counts.double(), soft]), group)  # counts are exact to 2^53
    return total[:-1] if total[-1] > 0 else total[:-1].to(torch.int64)


def integer_labels(targets: Tensor | Sequence[int] | Array) -> Tensor:
    """Targets of any kind as an int64 tensor of the same shape."""
    labels = _as_tensor(targets)
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"targets have dtype {labels.dtype}, expected integers")
    return labels.to(torch.int64)


def _as_tensor(targets: Tensor | Sequence[Any] | Array) -> Tensor:
    """Targets of any kind as a tensor of the same shape; arrays of integers as int64."""
    if isinstance(targets, Tensor):
        return targets.detach()
    if _is_numpy(targets):
        return _from_numpy(targets)
    try:
        plain = targets.tolist() if hasattr(targets, "tolist") else list(targets)
        return torch.tensor(plain, dtype=None if plain != [] else torch.int64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"targets make no tensor ({error}), expected integers") from error


def check_positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is a {type(value).__name__}, expected an int")
    if value < 1:
        raise ValueError(f"{name} is {shown(value)}, expected at least 1")
    if value > 2**63 - 1:
        raise ValueError(f"{name} is {shown(value)}, expected at most {2**63 - 1}")


def _counts(targets: Any, num_classes: int, ignore_index: int | None) -> tuple[Tensor, bool]:
    """Counts of one tensor, array or sequence, by chunks of its first dimension.

    And whether they are of integers in the shape of multi-hot rows.
    """
    if not (isinstance(targets, Tensor) or _is_numpy(targets)):
        targets = _as_tensor(targets)
    shape = tuple(targets.shape)
    if len(shape) == 0:
        return count_indices(_as_tensor(targets), num_classes, ignore_index), False
    device = targets.device if isinstance(targets, Tensor) else "cpu"
    counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
    step = max(1, CHUNK // max(1, math.prod(shape[1:])))
    multi_hot = False
    for start in range(0, max(1, shape[0]), step):  # once at least: the dtype of nothing is checked too
        chunk = _as_tensor(targets[start : start + step])
        multi_hot = chunk.dtype == torch.bool or chunk.is_floating_point()
        count = _sum_chunk if multi_hot else count_indices
        counts = counts + count(chunk, num_classes, ignore_index, start)
    return counts, not multi_hot and len(shape) == 2 and shape[1] == num_classes > 1


def count_indices(targets: Tensor, num_classes: int, ignore_index: int | None, start: int = 0) -> Tensor:
    """Counts of class indices, which begin at row ``start`` of the targets."""
    labels = integer_labels(targets)
    kept = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    wrong = kept & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        raise IndexError(f"{_first(wrong, labels, start)} is out of range, expected 0 to {num_classes - 1}")
    return torch.bincount(labels[kept], minlength=num_classes)


def _sum_chunk(targets: Tensor, num_classes: int, ignore_index: int | None, start: int) -> Tensor:
    """Sums over everything but the classes, int64 of bools and float64 of floats, that begin at row ``start``."""
    if targets.dim() < 2 or targets.shape[1] != num_classes:
        raise TypeError(
            f"targets have dtype {targets.dtype}, expected integers, or multi-hot rows of shape [N, {num_classes}]"
        )
    values = targets if targets.dtype == torch.bool else targets.double()
    if ignore_index is not None:
        values = values.masked_fill(targets == ignore_index, 0)
    wrong = ~((values >= -ROUNDING) & (values <= 1 + ROUNDING))
    if wrong.any():
        raise ValueError(f"{_first(wrong, values, start)} is no multi-hot target, expected a number in [0, 1]")
    if values.is_floating_point():
        values = values.clamp(0, 1)
    return values.sum([d for d in range(values.dim()) if d != 1])


def _first(wrong: Tensor, values: Tensor, start: int) -> str:
    """The first wrong value and its place, in targets of which ``values`` are the rows from ``start`` on."""
    position = tuple(wrong.nonzero()[0].tolist())
    value = values[position].item()
    if not position:
        return f"targets = {value}"
    return f"targets[{', '.join(map(str, (start + position[0], *position[1:])))}] = {value}"


def _is_numpy(targets: object) -> bool:
    """Whether it is a numpy array or scalar; numpy itself is not imported."""
    return hasattr(targets, "__array_interface__") and hasattr(targets, "astype")


def _from_numpy(array: Any) -> Tensor:
    """A copy as int64, float64 or bool, whatever byte order, strides and write protection the array has."""
    kinds = {"i": "int64", "u": "int64", "f": "float64", "b": "bool"}
    if array.dtype.kind not in kinds:
        raise TypeError(f"targets have dtype {array.dtype}, expected integers")
    return torch.as_tensor(array.astype(kinds[array.dtype.kind]), device="cpu")


def _target_of(batch: Any) -> Any:
    """The targets of a batch, where they usually are."""
    if isinstance(batch, Tensor) or _is_numpy(batch):
        return batch
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[1]
    raise TypeError(f"no targets found in a batch ({type(batch).__name__}), expected get_target= to take them out")
