"""Hidden states with any number of leading dimensions as rows; targets that are those of the next position."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import arguments
from ..errors import ArgumentTypeError, ArgumentValueError
from ..options import HierarchicalOptions, RowOptions, SoftmaxOptions


def rows_first(input: Tensor) -> Tensor:
    """(D,) or (..., D) as [N, D]; a view where the strides allow."""
    if input.dim() == 2:
        return input
    return input[None] if input.dim() == 1 else input.flatten(0, -2)


def check_shift(shift: object) -> None:
    """``shift`` is a bool: it moves by one, not by a number."""
    if not isinstance(shift, bool):
        raise ArgumentTypeError(f"shift is a {type(shift).__name__}, expected a bool")


def checked_weight(options: SoftmaxOptions | HierarchicalOptions, rows: torch.Size) -> Tensor | None:
    """The sample weight, which has the shape ``rows``."""
    v = options.sample_weight
    if v is not None:
        arguments.check_tensors(sample_weight=v)
        if v.shape != rows:
            raise ArgumentValueError(f"sample_weight has shape {list(v.shape)}, expected {list(rows)}")
    return v


def targets_of(
    input: Tensor, target: Tensor, rows: torch.Size, options: RowOptions, shift: bool
) -> tuple[Tensor, RowOptions]:
    """Class indices, int64, of the shape ``rows`` that ``input`` asks for, and options with their sample weights.

    Raises:
        TypeError, ValueError: the target does not fit ``input``; shifted, the sample weight does not fit the target.
    """
    check_shift(shift)
    found = arguments.class_indices(target, input)
    if target.shape != rows and not (input.dim() == 1 and target.shape == (1,)):
        raise ArgumentValueError(
            f"target has shape {list(target.shape)}, expected {list(rows)} for input of shape {list(input.shape)}"
        )
    if not shift:
        return found, options
    if input.dim() < 2:
        raise ArgumentValueError(f"input has shape {list(input.shape)}, expected at least (L, D) with shift")
    return shifted(found, options._replace(sample_weight=checked_weight(options, rows)))


def shifted(target: Tensor, options: RowOptions) -> tuple[Tensor, RowOptions]:
    """Targets, int64, and their sample weights of the next position; the last one is ignored."""
    v = options.sample_weight
    moved = options if v is None else options._replace(sample_weight=next_position(v, 0))
    return next_position(target, options.ignore_index), moved


def next_position(x: Tensor, last: int) -> Tensor:
    """What stands one further on along the last dimension; ``last`` at its end."""
    end = x.new_full((*x.shape[:-1], 1), last)[..., : x.shape[-1]]
    return torch.cat([x[..., 1:], end], -1)
