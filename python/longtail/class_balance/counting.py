"""Counting targets: of tensors, arrays, memory-mapped files and data loaders, in bounded memory, across ranks."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..arguments import ROUNDING, check_integer, check_tensors, is_dtensor, shown
from ..parallel.ranks import checked_sum, group_or_alone

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

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
    group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """Number of targets of each class, [num_classes], on the device of ``targets`` (loaders: the CPU).

    Integers are class indices, and their counts int64. Floating-point or bool targets (N, C) or (N, C, d1, ...) with
    ``C = num_classes`` are multi-hot: their sums over all dimensions but the classes', float64 of floating-point
    targets (0, 1, or soft in between; 1e-3 beyond counts as rounded), int64 of bools. Integers (N, C) that hold nothing
    but 0 and 1, in all batches of a loader and on all ranks, could be either, and are refused: ``targets.bool()`` is
    multi-hot, ``targets.flatten()`` indices.

    Tensors and numpy arrays of any integer dtype and shape are read a chunk at a time, so that token files larger than
    memory can be counted: ``class_counts(numpy.memmap("train.bin", dtype="uint16", mode="r"), vocab_size)``. Masked
    entries of ``numpy.ma`` and ``torch.masked`` are not counted.

    Args:
        targets: integers of any shape, or multi-hot rows; a tensor, sequence or array. Or a ``DataLoader`` or an
            iterator, whose batches are gone through once.
        num_classes: at least 1.
        ignore_index: a value that is not counted, of multi-hot rows too, or None.
        get_target: takes the targets out of a batch of a loader. Default: the second of a tuple or list, "labels" of
            a mapping, a tensor or array itself.
        reduce: add up over the ranks of ``group`` (a collective call), each having counted its own shard. A process
            without ``torch.distributed`` is alone. What one rank refuses, or its loader raises, every rank raises:
            "rank 1: ...".
        group: default all ranks; a process group or a 1-d DeviceMesh.

    Raises:
        IndexError: a class index is out of range; names the first one and its place.
        TypeError: the targets are neither integers nor multi-hot, or there is no telling where a batch has them; they
            are a mapping, a set or a ``Dataset``; ``group`` is no process group.
        ValueError: a multi-hot target is not in [0, 1]; integers (N, C) hold nothing but 0 and 1; the ranks disagree on
            ``num_classes`` or ``ignore_index``; this process is not in ``group``.
    """
    if reduce:
        counts, rows = _counts_of_ranks(targets, num_classes, ignore_index, get_target, group_or_alone(group))
    else:
        counts, rows = _local_counts(targets, num_classes, ignore_index, get_target)
    if rows and counts[:2].any() and not counts[2:].any():
        raise ValueError(
            f"targets are integers of shape [N, {num_classes}] that hold nothing but 0 and 1, which could be multi-hot "
            "rows or class indices: expected targets.bool() for multi-hot rows, targets.flatten() for class indices"
        )
    return counts


def _counts_of_ranks(
    targets: Targets,
    num_classes: int,
    ignore_index: int | None,
    get_target: Callable[[Any], Any] | None,
    group: ProcessGroup | None,
) -> tuple[Tensor, bool]:
    """What :func:`_local_counts` returns, of all ranks together."""
    part: Tensor | Exception
    device, options = torch.device("cpu"), {}
    try:
        counts, rows = _local_counts(targets, num_classes, ignore_index, get_target)
        device, options = counts.device, options_of_ranks("class_counts", num_classes, ignore_index)
        # On a rank without batches the counts are neither soft nor of anything but rows. They are exact to 2^53.
        kind = torch.tensor([counts.is_floating_point(), not rows], dtype=torch.float64, device="cpu")
        part = torch.cat([counts.cpu().double(), kind])
    except Exception as error:
        part = error
    total = checked_sum(part, options, group, torch.device("cpu"))
    soft, other = (total[-2:] > 0).tolist()
    return total[:-2].to(device, torch.float64 if soft else torch.int64), not other


def _local_counts(
    targets: Targets, num_classes: int, ignore_index: int | None, get_target: Callable[[Any], Any] | None
) -> tuple[Tensor, bool]:
    """Counts of this process alone, and whether all are of integers in the shape of multi-hot rows."""
    check_positive_int("num_classes", num_classes)
    check_ignore_index(ignore_index)
    if isinstance(targets, DataLoader | Iterator):
        counts, rows = torch.zeros(num_classes, dtype=torch.int64, device="cpu"), True
        for batch in targets:
            found = get_target(batch) if get_target is not None else _target_of(batch)
            of_batch, as_rows = _counts(found, num_classes, ignore_index)
            counts, rows = counts + of_batch.cpu(), rows and as_rows
    else:
        counts, rows = _counts(targets, num_classes, ignore_index)
    return counts, rows


def integer_labels(targets: Tensor | Sequence[int] | Array) -> Tensor:
    """Targets of any kind as an int64 tensor of the same shape."""
    labels = _as_tensor(targets)
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"targets have dtype {labels.dtype}, expected integers")
    return labels.to(torch.int64)


def _as_tensor(targets: Tensor | Sequence[Any] | Array) -> Tensor:
    """Targets of any kind as a tensor of the same shape; arrays of integers as int64."""
    if _is_masked(targets):
        raise TypeError(f"targets are a {type(targets).__name__}, expected none with masked entries")
    if isinstance(targets, Tensor):
        check_tensors(targets=targets)
        if is_dtensor(targets):
            raise TypeError("targets are a DTensor, expected targets.full_tensor(), or its shard with reduce=True")
        return targets.detach()
    if _is_numpy(targets):
        return _from_numpy(targets)
    # What makes a list of its keys (pandas' frames too), has no order, or pairs its targets with inputs.
    keyed = isinstance(targets, Mapping) or (hasattr(targets, "keys") and not hasattr(targets, "tolist"))
    if keyed or isinstance(targets, Set | Dataset):
        raise TypeError(
            f"targets are a {type(targets).__name__}, expected the targets themselves: a tensor, array or sequence, or "
            "a DataLoader"
        )
    try:
        plain = targets.tolist() if hasattr(targets, "tolist") else list(targets)
        return torch.tensor(plain, dtype=None if plain != [] else torch.int64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"targets make no tensor ({error}), expected integers") from error


def check_positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is a {type(value).__name__}, expected an int")
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name} is {shown(number)}, expected at least 1")
    if number > 2**63 - 1:
        raise ValueError(f"{name} is {shown(number)}, expected at most {2**63 - 1}")


def check_ignore_index(value: int | None) -> None:
    if value is not None:
        check_integer("ignore_index", value, expected="an int or None")


def options_of_ranks(call: str, num_classes: int, ignore_index: int | None, **others: Any) -> dict[str, Any]:
    """What ranks that add up their counts compare, for :func:`longtail.parallel.ranks.checked_sum`."""
    ignored = None if ignore_index is None else operator.index(ignore_index)
    return {"the call": call, "num_classes": operator.index(num_classes), "ignore_index": ignored, **others}


def _counts(targets: Any, num_classes: int, ignore_index: int | None) -> tuple[Tensor, bool]:
    """Counts of one tensor, array or sequence, by chunks.

    And whether they are of integers in the shape of multi-hot rows.
    """
    targets, mask, counted = _split_mask(targets)
    if isinstance(targets, Tensor) or not _is_numpy(targets):
        targets = _as_tensor(targets)
    shape = tuple(targets.shape)
    device = targets.device if isinstance(targets, Tensor) else "cpu"
    counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
    multi_hot = False
    for place in _places(shape):
        chunk = _as_tensor(targets[place])
        kept = None if mask is None else _as_tensor(mask[place]) == counted
        starts = tuple(cut.start for cut in place)
        multi_hot = len(shape) > 0 and (chunk.dtype == torch.bool or chunk.is_floating_point())
        if not multi_hot:
            counts = counts + count_indices(chunk, num_classes, ignore_index, starts, kept)
            continue
        if len(shape) < 2 or shape[1] != num_classes:
            raise TypeError(
                f"targets have dtype {chunk.dtype}, expected integers, or multi-hot rows of shape [N, {num_classes}]"
            )
        sums = _sum_chunk(chunk, ignore_index, starts, kept)
        counts = counts.to(sums.dtype)
        counts[place[1]] += sums
    return counts, not multi_hot and len(shape) == 2 and shape[1] == num_classes > 1


def _places(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Slices of all dimensions that cut an array into chunks, in its order; one at least, of nothing too."""
    cut = 0  # this dimension is cut into ranges, those before it into single indices
    while cut < len(shape) - 1 and math.prod(shape[cut + 1 :]) > CHUNK:
        cut += 1
    steps = [1] * cut + [max(1, CHUNK // max(1, math.prod(shape[cut + 1 :])))] + list(shape[cut + 1 :])
    ranges = [range(0, max(1, size), max(1, step)) for size, step in zip(shape, steps, strict=False)]
    for starts in itertools.product(*ranges):
        yield tuple(slice(start, start + step) for start, step in zip(starts, steps, strict=False))


def count_indices(
    targets: Tensor,
    num_classes: int,
    ignore_index: int | None,
    starts: tuple[int, ...] = (),
    kept: Tensor | None = None,
) -> Tensor:
    """Counts of class indices, at ``starts`` of the targets; of those that are ``kept``, default all."""
    labels = integer_labels(targets)
    if kept is None:
        kept = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        kept = kept & (labels != ignore_index)
    wrong = kept & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        raise IndexError(f"{_first(wrong, labels, starts)} is out of range, expected 0 to {num_classes - 1}")
    return torch.bincount(labels[kept], minlength=num_classes)


def _sum_chunk(targets: Tensor, ignore_index: int | None, starts: tuple[int, ...], kept: Tensor | None) -> Tensor:
    """Sums over everything but the classes, int64 of bools and float64 of floats, at ``starts`` of the targets."""
    values = targets if targets.dtype == torch.bool else targets.double()
    if ignore_index is not None:
        values = values.masked_fill(targets == ignore_index, 0)
    if kept is not None:
        values = values.masked_fill(~kept, 0)
    wrong = ~((values >= -ROUNDING) & (values <= 1 + ROUNDING))
    if wrong.any():
        raise ValueError(f"{_first(wrong, values, starts)} is no multi-hot target, expected a number in [0, 1]")
    if values.is_floating_point():
        values = values.clamp(0, 1)
    return values.sum([d for d in range(values.dim()) if d != 1])


def _first(wrong: Tensor, values: Tensor, starts: tuple[int, ...]) -> str:
    """The first wrong value and its place, in targets of which ``values`` are those from ``starts`` on."""
    position = tuple(wrong.nonzero()[0].tolist())
    value = values[position].item()
    if not position:
        return f"targets = {value}"
    place = (start + offset for start, offset in itertools.zip_longest(starts, position, fillvalue=0))
    return f"targets[{', '.join(map(str, place))}] = {value}"


def _is_masked(targets: object) -> bool:
    """Whether it is an array of ``numpy.ma`` or a tensor of ``torch.masked``, neither of which is imported."""
    return hasattr(targets, "get_mask") or (_is_numpy(targets) and hasattr(targets, "mask"))


def _split_mask(targets: Any) -> tuple[Any, Any, bool]:
    """The data, the mask in their shape or None, and what the mask says of entries that count."""
    if not _is_masked(targets):
        return targets, None, True
    if isinstance(targets, Tensor):
        return targets.get_data(), targets.get_mask(), True  # type: ignore[attr-defined]
    return targets.data, targets.mask if targets.mask.shape == targets.shape else None, False


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
