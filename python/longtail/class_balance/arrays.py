"""Targets of any kind as tensors: of torch, numpy, pandas, sequences; masked ones apart. None of them is imported."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..arguments import check_integer, check_tensors, is_dtensor, shown

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class Array(Protocol):
    """A numpy array, a pandas series, or whatever else turns itself into a list."""

    def tolist(self) -> Any: ...


def integer_labels(targets: Tensor | Sequence[int] | Array) -> Tensor:
    """Targets of any kind as an int64 tensor of the same shape."""
    labels = as_tensor(targets)
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"targets have dtype {labels.dtype}, expected integers")
    return labels.to(torch.int64)


def as_tensor(targets: Tensor | Sequence[Any] | Array) -> Tensor:
    """Targets of any kind as a tensor of the same shape; arrays of integers as int64."""
    if is_masked(targets):
        raise TypeError(f"targets are a {type(targets).__name__}, expected none with masked entries")
    if isinstance(targets, Tensor):
        check_tensors(targets=targets)
        if is_dtensor(targets):
            raise TypeError("targets are a DTensor, expected targets.full_tensor(), or its shard with reduce=True")
        return targets.detach()
    if is_numpy(targets):
        return from_numpy(targets)
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


def is_masked(targets: object) -> bool:
    """Whether it is an array of ``numpy.ma`` or a tensor of ``torch.masked``, neither of which is imported."""
    return hasattr(targets, "get_mask") or (is_numpy(targets) and hasattr(targets, "mask"))


def split_mask(targets: Any) -> tuple[Any, Any, bool]:
    """The data, the mask in their shape or None, and what the mask says of entries that count."""
    if not is_masked(targets):
        return targets, None, True
    if isinstance(targets, Tensor):
        return targets.get_data(), targets.get_mask(), True  # type: ignore[attr-defined]
    return targets.data, targets.mask if targets.mask.shape == targets.shape else None, False


def is_numpy(targets: object) -> bool:
    """Whether it is a numpy array or scalar; numpy itself is not imported."""
    return hasattr(targets, "__array_interface__") and hasattr(targets, "astype")


def from_numpy(array: Any) -> Tensor:
    """A copy as int64, float64 or bool, whatever byte order, strides and write protection the array has."""
    kinds = {"i": "int64", "u": "int64", "f": "float64", "b": "bool"}
    if array.dtype.kind not in kinds:
        raise TypeError(f"targets have dtype {array.dtype}, expected integers")
    return torch.as_tensor(array.astype(kinds[array.dtype.kind]), device="cpu")


def is_sparse(targets: object) -> bool:
    """Whether it is a sparse tensor, or a sparse matrix of scipy."""
    if isinstance(targets, Tensor):
        return targets.layout in _SPARSE and not targets.is_nested
    return hasattr(targets, "tocoo") and hasattr(targets, "shape")


def target_of(batch: Any) -> Any:
    """The targets of a batch, where they usually are."""
    if isinstance(batch, Tensor) or is_numpy(batch) or is_sparse(batch):
        return batch
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, list | tuple) and len(batch) == 2 and not _two_rows(*batch):
        return batch[1]
    raise TypeError(f"no targets found in a batch ({type(batch).__name__}), expected get_target= to take them out")


def _two_rows(first: Any, second: Any) -> bool:
    """Whether it is the labels of two rows, and no pair of inputs and as many targets."""
    labels = all(isinstance(x, list | tuple | Set) and all(isinstance(n, int) for n in x) for x in (first, second))
    return labels and (len(first) != len(second) or isinstance(first, Set))
