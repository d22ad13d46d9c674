"""Counting targets: of tensors, arrays, memory-mapped files and data loaders, in bounded memory, across ranks."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence, Set
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..parallel.ranks import checked_sum, group_or_alone
from .arrays import (
    Array,
    as_tensor,
    check_ignore_index,
    check_positive_int,
    is_numpy,
    is_sparse,
    split_mask,
    target_of,
)
from .chunks import count_indices, sum_chunk
from .label_rows import LabelRows, label_lists, rows_of_lists, rows_of_sparse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

CHUNK = 1 << 22  # elements converted and counted at a time: 32 MiB as int64


Targets: TypeAlias = Tensor | Sequence[Any] | Array | DataLoader[Any] | Iterator[Any]


class Counted(NamedTuple):
    """Of each class: its targets, and those that say whether it is there."""

    counts: Tensor
    totals: Tensor
    rows: bool
    """Whether all are of integers in the shape of multi-hot rows."""

    def add(self, other: Counted) -> Counted:
        """The sum, on this one's device."""
        counts, totals = (mine + its.to(mine.device) for mine, its in zip(self[:2], other[:2], strict=True))
        return Counted(counts, totals, self.rows and other.rows)


@overload
def class_counts(
    targets: Targets,
    num_classes: int,
    ignore_index: int | None = None,
    *,
    get_target: Callable[[Any], Any] | None = None,
    return_totals: Literal[False] = False,
    reduce: bool = False,
    group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor: ...


@overload
def class_counts(
    targets: Targets,
    num_classes: int,
    ignore_index: int | None = None,
    *,
    get_target: Callable[[Any], Any] | None = None,
    return_totals: Literal[True],
    reduce: bool = False,
    group: ProcessGroup | DeviceMesh | None = None,
) -> tuple[Tensor, Tensor]: ...


def class_counts(
    targets: Targets,
    num_classes: int,
    ignore_index: int | None = None,
    *,
    get_target: Callable[[Any], Any] | None = None,
    return_totals: bool = False,
    reduce: bool = False,
    group: ProcessGroup | DeviceMesh | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Number of targets of each class, [num_classes], on the device of ``targets`` (loaders and lists: the CPU).

    Integers are class indices, and their counts int64. Several labels a row, C = num_classes, are one of

    - floating-point or bool targets (N, C) or (N, C, d1, ...), multi-hot: their sums over all dimensions but the
      classes', float64 of floating-point targets (0, 1, or soft in between; 1e-3 beyond counts as rounded), int64 of
      bools;
    - sparse matrices (N, C) of torch (COO, CSR, ...) or scipy, of any real dtype, likewise;
    - a list, set, tensor or array of class indices for each row, ``[[3, 7], [], [1]]``, each label once in its row.

    Integers (N, C) or (N, C, d1, ...) that hold nothing but 0 and 1, in all batches of a loader and on all ranks, could
    be multi-hot or indices, and are refused: ``targets.bool()`` is multi-hot, ``targets.flatten()`` indices, and sets
    of integers labels.

    Tensors and numpy arrays of any integer dtype and shape are read a chunk at a time, so that token files larger than
    memory can be counted: ``class_counts(numpy.memmap("train.bin", dtype="uint16", mode="r"), vocab_size)``. Masked
    entries of ``numpy.ma`` and ``torch.masked`` are not counted.

    Args:
        targets: integers of any shape, or several labels a row; a tensor, sequence, array or sparse matrix. Or a
            ``DataLoader`` or an iterator, whose batches are gone through once.
        num_classes: at least 1.
        ignore_index: a value that is not counted, of multi-hot rows and lists of labels too, or None.
        get_target: takes the targets out of a batch of a loader. Default: the second of a tuple or list, "labels" of
            a mapping, a tensor, array or sparse matrix itself.
        return_totals: also how many targets say whether a class is there or not, [num_classes], int64: of class indices
            and lists of labels their number (of rows), the same for all classes; of multi-hot rows the elements that
            are not ignored. For :func:`longtail.positive_weight`.
        reduce: add up over the ranks of ``group`` (a collective call), each having counted its own shard. A process
            without ``torch.distributed`` is alone. What one rank refuses, or its loader raises, every rank raises:
            "rank 1: ...".
        group: default all ranks; a process group or a 1-d DeviceMesh.

    Returns:
        The counts; with ``return_totals`` the pair of counts and totals.

    Raises:
        IndexError: a class index is out of range; names the first one and its place.
        TypeError: the targets are neither integers nor multi-hot, or there is no telling where a batch has them; they
            are a mapping, a set or a ``Dataset``; a sparse matrix has another shape; ``group`` is no process group.
        ValueError: a multi-hot target is not in [0, 1]; a row has a label twice; integers (N, C) hold nothing but 0 and
            1, or with ``return_totals`` have several dimensions; the ranks disagree on ``num_classes``,
            ``ignore_index`` or ``return_totals``; this process is not in ``group``.
    """
    given = (targets, num_classes, ignore_index, get_target, bool(return_totals))
    counts, totals, rows = _counts_of_ranks(*given, group_or_alone(group)) if reduce else _local_counts(*given)
    if rows and counts[:2].any() and not counts[2:].any():
        raise ValueError(
            f"targets are integers of shape [N, {num_classes}] that hold nothing but 0 and 1, which could be multi-hot "
            "rows or class indices: expected targets.bool() for multi-hot rows, targets.flatten() for class indices, "
            "sets for lists of labels"
        )
    return (counts, totals) if return_totals else counts


def _counts_of_ranks(
    targets: Targets,
    num_classes: int,
    ignore_index: int | None,
    get_target: Callable[[Any], Any] | None,
    return_totals: bool,
    group: ProcessGroup | None,
) -> Counted:
    """What :func:`_local_counts` returns, of all ranks together."""
    part: Tensor | Exception
    device, options = torch.device("cpu"), {}
    try:
        counts, totals, rows = _local_counts(targets, num_classes, ignore_index, get_target, return_totals)
        device = counts.device
        others = {"return_totals": int(return_totals)}
        options = options_of_ranks("class_counts", num_classes, ignore_index, **others)
        # On a rank without batches the counts are neither soft nor of anything but rows. They are exact to 2^53.
        kind = torch.tensor([counts.is_floating_point(), not rows], dtype=torch.float64, device="cpu")
        sums = [counts, totals] if return_totals else [counts]
        part = torch.cat([*(x.cpu().double() for x in sums), kind])
    except Exception as error:
        part = error
    total = checked_sum(part, options, group, torch.device("cpu"))
    soft, other = (total[-2:] > 0).tolist()
    counts = total[:num_classes].to(device, torch.float64 if soft else torch.int64)
    return Counted(counts, total[num_classes:-2].to(device, torch.int64), not other)


def _local_counts(
    targets: Targets,
    num_classes: int,
    ignore_index: int | None,
    get_target: Callable[[Any], Any] | None,
    return_totals: bool,
) -> Counted:
    """Of this process alone."""
    check_positive_int("num_classes", num_classes)
    check_ignore_index(ignore_index)
    if not isinstance(targets, DataLoader | Iterator):
        return _counts(targets, num_classes, ignore_index, return_totals)
    zeros = torch.zeros(num_classes, dtype=torch.int64, device="cpu")
    counted = Counted(zeros, zeros, True)
    for batch in targets:
        found = get_target(batch) if get_target is not None else target_of(batch)
        counted = counted.add(_counts(found, num_classes, ignore_index, return_totals))
    return counted


def options_of_ranks(call: str, num_classes: int, ignore_index: int | None, **others: Any) -> dict[str, Any]:
    """What ranks that add up their counts compare, for :func:`longtail.parallel.ranks.checked_sum`."""
    ignored = None if ignore_index is None else operator.index(ignore_index)
    return {"the call": call, "num_classes": operator.index(num_classes), "ignore_index": ignored, **others}


def _counts(targets: Any, num_classes: int, ignore_index: int | None, return_totals: bool) -> Counted:
    """Of one tensor, array, sequence or sparse matrix."""
    if is_sparse(targets):
        return _counts_of_rows(rows_of_sparse(targets, num_classes, ignore_index), num_classes, False)
    lists = label_lists(targets)
    if lists is not None:
        lengths = set(map(len, lists))
        unclear = len(lengths) == 1 and 0 not in lengths and not any(isinstance(row, Set) for row in lists)
        if unclear and return_totals:  # torch's default_collate makes a tensor of the first labels of all rows, ...
            raise _unclear_totals([len(lists), *lengths])
        rows = unclear and lengths == {num_classes}
        return _counts_of_rows(rows_of_lists(lists, num_classes, ignore_index), num_classes, rows)
    targets, mask, counted = split_mask(targets)
    if isinstance(targets, Tensor) or not is_numpy(targets):
        targets = as_tensor(targets)
    shape = tuple(targets.shape)
    device = targets.device if isinstance(targets, Tensor) else "cpu"
    counts, totals = (torch.zeros(num_classes, dtype=torch.int64, device=device) for _ in range(2))
    multi_hot = False
    for place in _places(shape):
        chunk = as_tensor(targets[place])
        kept = None if mask is None else as_tensor(mask[place]) == counted
        starts = tuple(cut.start for cut in place)
        multi_hot = len(shape) > 0 and (chunk.dtype == torch.bool or chunk.is_floating_point())
        if not multi_hot:
            if return_totals and len(shape) > 1 and chunk.numel():
                raise _unclear_totals(shape)
            found = count_indices(chunk, num_classes, ignore_index, starts, kept)
            counts, totals = counts + found, totals + found.sum()
            continue
        if len(shape) < 2 or shape[1] != num_classes:
            raise TypeError(
                f"targets have dtype {chunk.dtype}, expected integers, or multi-hot rows of shape [N, {num_classes}]"
            )
        sums, known = sum_chunk(chunk, ignore_index, starts, kept)
        counts = counts.to(sums.dtype)
        counts[place[1]] += sums
        totals[place[1]] += known
    return Counted(counts, totals, not multi_hot and len(shape) > 1 and shape[1] == num_classes)


def _unclear_totals(shape: Sequence[int]) -> ValueError:
    return ValueError(
        f"targets are integers of shape {list(shape)}, expected with return_totals targets.flatten() for class "
        "indices, targets.bool() for multi-hot rows, or for lists of labels a set for each row"
    )


def _counts_of_rows(labels: LabelRows, num_classes: int, rows: bool) -> Counted:
    ignored = torch.bincount(labels.ignored, minlength=num_classes)
    return Counted(labels.of_classes(labels.values, num_classes), labels.shape[0] - ignored, rows)


def _places(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Slices of all dimensions that cut an array into chunks, in its order; one at least, of nothing too."""
    cut = 0  # this dimension is cut into ranges, those before it into single indices
    while cut < len(shape) - 1 and math.prod(shape[cut + 1 :]) > CHUNK:
        cut += 1
    steps = [1] * cut + [max(1, CHUNK // max(1, math.prod(shape[cut + 1 :])))] + list(shape[cut + 1 :])
    ranges = [range(0, max(1, size), max(1, step)) for size, step in zip(shape, steps, strict=False)]
    for starts in itertools.product(*ranges):
        yield tuple(slice(start, start + step) for start, step in zip(starts, steps, strict=False))
