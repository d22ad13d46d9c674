"""Several labels a row, in memory of the labels alone: of lists of labels, of sparse matrices, of multi-hot rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import ROUNDING
from .arrays import as_tensor, from_numpy, integer_labels, is_masked, is_numpy, is_sparse


class LabelRows(NamedTuple):
    """The labels of N rows, one entry for each."""

    rows: Tensor
    classes: Tensor
    values: Tensor
    """1, int64, or in (0, 1], float64, where the targets are floating-point numbers."""
    ignored: Tensor
    """The classes of entries of which nothing is known."""
    shape: tuple[int, int]
    """N, and the number of classes: of lists one more than the largest label."""

    def cpu(self) -> LabelRows:
        return LabelRows(self.rows.cpu(), self.classes.cpu(), self.values.cpu(), self.ignored.cpu(), self.shape)

    def of_classes(self, values: Tensor, num_classes: int) -> Tensor:
        """Sums of the entries' ``values`` by class."""
        return values.new_zeros(num_classes).index_add_(0, self.classes, values)


def label_lists(targets: Any) -> Sequence[Any] | None:
    """The rows of what can only be a list of labels for each row; None of what may be a tensor."""
    if is_numpy(targets) and (targets.dtype.kind != "O" or targets.ndim != 1):
        return None
    rows = targets.tolist() if hasattr(targets, "tolist") and not isinstance(targets, Tensor) else targets
    if not isinstance(rows, list | tuple) or not rows or not all(map(_is_list, rows)):
        return None
    lengths = set(map(len, rows))
    unlike = len(lengths) > 1 or lengths == {0}
    return rows if unlike or any(isinstance(row, Tensor | Set) for row in rows) else None


def _is_list(row: object) -> bool:
    """Whether it may hold the labels of a row."""
    if isinstance(row, Tensor) or is_numpy(row):
        return getattr(row, "ndim", None) == 1
    return isinstance(row, list | tuple | Set)


def rows_of_lists(lists: Sequence[Any], num_classes: int | None, ignore_index: int | None) -> LabelRows:
    """Of a list, set, tensor or array of class indices for each row.

    Raises:
        IndexError: a label is out of range.
        TypeError: the labels are no integers.
        ValueError: a row has a label twice.
    """
    for n, row in enumerate(lists):
        # torch.tensor([]) is of float32, and has no label.
        if isinstance(row, Tensor) and len(row) and (row.dtype == torch.bool or row.is_floating_point()):
            raise TypeError(
                f"targets[{n}] has dtype {row.dtype}, expected the class indices of a row, or multi-hot rows in one "
                "tensor: torch.stack(targets)"
            )
    plain = [row.tolist() if hasattr(row, "tolist") else list(row) for row in lists]
    labels = integer_labels([*itertools.chain.from_iterable(plain)])
    rows = torch.arange(len(plain), device="cpu").repeat_interleave(torch.tensor([*map(len, plain)], device="cpu"))
    if ignore_index is not None:
        kept = labels != ignore_index
        rows, labels = rows[kept], labels[kept]
    high = torch.iinfo(torch.int64).max if num_classes is None else num_classes
    wrong = (labels < 0) | (labels >= high)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        expected = "at least 0" if num_classes is None else f"0 to {num_classes - 1}"
        raise IndexError(
            f"targets[{rows[place]}] has label {labels[place]}, which is out of range, expected {expected}"
        )
    width = int(labels.max()) + 1 if num_classes is None and len(labels) else num_classes or 0
    if len((rows * width + labels).unique()) < len(labels):
        _refuse_twice(plain, ignore_index)
    return LabelRows(rows, labels, torch.ones_like(labels), labels[:0], (len(plain), width))


def _refuse_twice(plain: Sequence[Sequence[int]], ignore_index: int | None) -> None:
    for n, row in enumerate(plain):
        for label in row:
            if label != ignore_index and row.count(label) > 1:
                raise ValueError(
                    f"targets[{n}] has label {label} twice, expected the labels of one row, each once (multi-hot rows "
                    "are one bool tensor; torch's default_collate turns rows and columns of lists over)"
                )


def rows_of_sparse(targets: Any, num_classes: int | None, ignore_index: int | None) -> LabelRows:
    """Of a sparse multi-hot matrix [N, C], of torch or of scipy, which is not imported; entries left out are 0.

    Raises:
        TypeError: the shape is another, or the entries are no real numbers.
        ValueError: an entry, or the sum of those of one place, is not in [0, 1]; ignore_index is 0.
    """
    shape = tuple(targets.shape)
    if len(shape) != 2 or (num_classes is not None and shape[1] != num_classes):
        width = "C" if num_classes is None else num_classes
        raise TypeError(f"targets are sparse of shape {list(shape)}, expected multi-hot rows of shape [N, {width}]")
    if ignore_index == 0:
        raise ValueError("ignore_index is 0, which every entry left out of a sparse matrix is, expected another value")
    once = False
    if isinstance(targets, Tensor):
        found = targets.detach()
        found = found if found.layout == torch.sparse_coo else found.to_sparse_coo()
        if found.dense_dim():
            raise TypeError(f"targets have {found.dense_dim()} dense dimensions, expected a sparse matrix of numbers")
        (rows, classes), values, once = found._indices(), found._values(), found.is_coalesced()
    else:
        found = targets.tocoo()
        rows, classes, values = (from_numpy(x) for x in (found.row, found.col, found.data))
    if not once:
        rows, classes, values = _summed(rows, classes, values, shape[1])
    return _checked_rows(rows, classes, values, shape, ignore_index)


def rows_of_dense(targets: Any) -> LabelRows:
    """Of multi-hot rows [N, C], bool or floating point."""
    y = as_tensor(targets)
    multi_hot = y.dtype == torch.bool or y.is_floating_point()
    if y.dim() != 2 or not multi_hot:
        raise TypeError(
            f"targets have dtype {y.dtype} and shape {list(y.shape)}, expected multi-hot rows [N, C] (bool, floating "
            "point or sparse), or a list or set of labels for each row"
        )
    rows, classes = y.nonzero().unbind(1)
    return _checked_rows(rows, classes, y[rows, classes], tuple(y.shape), None)


def _summed(rows: Tensor, classes: Tensor, values: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each place once: several entries of one stand for their sum, of bools for whether one is set."""
    is_bool = values.dtype == torch.bool
    values = _wide(values)
    places, which = (rows * width + classes).unique(return_inverse=True)
    if len(places) == len(values):
        return rows, classes, values
    sums = values.new_zeros(len(places)).index_add_(0, which, values)
    return places // width, places % width, sums.clamp(max=1) if is_bool else sums


def _wide(values: Tensor) -> Tensor:
    if values.is_complex():
        raise TypeError(f"targets have dtype {values.dtype}, expected real numbers")
    return values.double() if values.is_floating_point() else values.long()


def _checked_rows(
    rows: Tensor, classes: Tensor, values: Tensor, shape: tuple[int, ...], ignore_index: int | None
) -> LabelRows:
    values = _wide(values)
    unknown = torch.zeros_like(values, dtype=torch.bool) if ignore_index is None else values == ignore_index
    wrong = ~(unknown | ((values >= -ROUNDING) & (values <= 1 + ROUNDING)))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{rows[first]}, {classes[first]}] = {values[first].item()} is no multi-hot target, expected a "
            "number in [0, 1]"
        )
    kept = ~unknown & (values > 0)
    return LabelRows(rows[kept], classes[kept], values[kept].clamp(max=1), classes[unknown], (shape[0], shape[1]))


def label_rows(targets: Any) -> LabelRows:
    """Of whatever holds several labels a row.

    Raises:
        TypeError, ValueError, IndexError: it does not, or could be read in two ways.
    """
    if is_sparse(targets):
        return rows_of_sparse(targets, None, None)
    lists = label_lists(targets)
    if lists is not None:
        return rows_of_lists(lists, None, None)
    if is_masked(targets) or isinstance(targets, Tensor) or is_numpy(targets):
        return rows_of_dense(targets)
    y = as_tensor(targets)
    if y.dim() != 2 or y.dtype == torch.bool or y.is_floating_point():
        return rows_of_dense(y)
    if y.max() > 1:
        return rows_of_lists(y.tolist(), None, None)
    raise ValueError(
        f"targets are lists of {y.shape[1]} integers that hold nothing but 0 and 1, which could be multi-hot rows or "
        "labels: expected a bool tensor of multi-hot rows, or sets of labels"
    )
