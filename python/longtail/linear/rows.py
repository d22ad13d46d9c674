"""The work of the linear operators: logits made, turned into their gradient and spent, a chunk of rows at a time.

For each chunk: ``logits = input @ linear_weight.T + linear_bias`` (vendor GEMM), their gradient in place,
``grad_input = logits @ linear_weight`` and ``grad_weight += logits.T @ input`` (vendor GEMMs). What works in place is
the ``_loss_and_grad_`` of a family, which finishes the losses, or ``softmax_loss_apply_`` of coefficients that are
given. The one buffer of logits serves all chunks. Loops live inside the operators, so that a compiled graph holds one
node, whatever the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..ops import operators
from ..options import HierarchicalOptions, RowOptions, SoftmaxOptions
from ..softmax import shards
from . import classes
from .chunks import (
    add_weight_gradient,
    as_matrix,
    chunk_rows,
    input_gradient,
    made_in,
    make_gradients,
    make_logits,
    plain,
    spared,
)
from .cost import Task, by_classes

Options = SoftmaxOptions | HierarchicalOptions


class RowFamily(NamedTuple):
    """The operators of logits that a linear loss is made of."""

    options: Callable[..., Options]
    loss: Callable[..., tuple[Tensor, Tensor]]
    loss_and_grad_: Callable[..., tuple[Tensor, Tensor]]
    by_classes: bool
    """Whether chunks of classes may take the place of chunks of rows."""
    statistics: Callable[[Any], int]
    """How many numbers of a row there are with such options."""

    def rows_out(self, input: Tensor, dtype: torch.dtype, options: Any) -> tuple[Tensor, Tensor]:
        """New losses [N] and statistics [N, S], of logits of ``dtype``."""
        n, wide = input.shape[0], arithmetic_dtype(dtype)
        return input.new_empty((n,), dtype=wide), input.new_empty((n, self.statistics(options)), dtype=wide)


SOFTMAX = RowFamily(
    *(SoftmaxOptions, operators.softmax_loss, operators.softmax_loss_and_grad_),
    by_classes=True,
    statistics=lambda _: 5,
)
HIERARCHICAL = RowFamily(
    *(HierarchicalOptions, operators.hierarchical_loss, operators.hierarchical_loss_and_grad_),
    by_classes=False,
    statistics=lambda options: 2 * options.path.shape[1] + 1,
)


def _check_target(target: Tensor, ignore_index: int, num_classes: int) -> None:
    # A chunk's kernel would name the row within its chunk, after the GEMM.
    if target.device.type == "cpu":
        operators.mean_denominator(target, None, ignore_index, num_classes)


def _counted(target: Tensor, ignore_index: int) -> Tensor | None:
    """Which rows count, [M], where some do not, on the CPU: on a GPU the host would have to wait for the answer."""
    if target.device.type != "cpu":
        return None
    counted = target != ignore_index
    return None if counted.all() else counted.nonzero()[:, 0]


def _goes_by_classes(
    input: Tensor, linear_weight: Tensor, dtype: torch.dtype, needs: tuple[bool, bool], known: bool
) -> bool:
    """Whether that is the cheaper way: measured on CPUs."""
    n, num_classes = len(input), len(linear_weight)
    if input.device.type != "cpu" or n == 0 or num_classes == 0:
        return False
    row_chunks = -(-n // chunk_rows(n, num_classes, dtype.itemsize, "cpu"))
    class_chunks = -(-num_classes // classes.chunk_classes(n, num_classes, dtype.itemsize))
    task = Task(n, input.shape[1], dtype, needs, known)
    return by_classes(task, row_chunks, class_chunks, num_classes)


def _of_rows(options: RowOptions, rows: Tensor | slice) -> RowOptions:
    v = options.sample_weight
    return options if v is None else options._replace(sample_weight=v[rows])


def _among(part: Tensor, rows: Tensor, count: int) -> Tensor:
    """``part`` as those ``rows`` of ``count``, of which the others are 0."""
    return part.new_zeros((count, *part.shape[1:])).index_copy_(0, rows, part)


class _Chunk(NamedTuple):
    rows: slice
    input: Tensor
    logits: Tensor
    target: Tensor
    options: Options


def _chunks(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    size: int,
    options: RowOptions,
) -> Iterator[_Chunk]:
    """Chunks with their logits; ``linear_weight`` and ``linear_bias`` are in the dtype of the logits."""
    n, num_classes, dtype = input.shape[0], linear_weight.shape[0], linear_weight.dtype
    buffer = linear_weight.new_empty((min(size, n), num_classes))
    ignored = (target == options.ignore_index)[:, None]
    for begin in range(0, n, size):
        rows = slice(begin, min(begin + size, n))
        # What an ignored row holds, NaN included, may not meet its zero gradient in the weight's GEMM.
        x = input[rows].to(dtype).masked_fill(ignored[rows], 0.0)
        logits = buffer[: x.shape[0]]
        make_logits(x, linear_weight, linear_bias, logits)
        yield _Chunk(rows, x, logits, target[rows], _of_rows(options, rows))


def row_losses(
    family: RowFamily,
    input: Tensor,  # [N, D]
    linear_weight: Tensor,  # [C, D]
    linear_bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64
    chunk_size: int,
    dtype: torch.dtype,
    total_dtype: torch.dtype,
    *values: Any,
) -> tuple[Tensor, Tensor]:
    """Row losses [N] and statistics [N, S]. Reads the weight once a chunk; extra memory: one chunk of logits.

    ``total_dtype``: for the operator's derivative alone. ``values``: those of the options.
    """
    options: Any = family.options(*values)
    with plain(input.device):
        _check_target(target, options.ignore_index, linear_weight.shape[0])
        counted = _counted(target, options.ignore_index)
        if counted is not None:
            data = (input[counted], linear_weight, linear_bias, target[counted])
            found = row_losses(family, *data, chunk_size, dtype, total_dtype, *_of_rows(options, counted))
            return _among(found[0], counted, len(target)), _among(found[1], counted, len(target))
        by_classes = family.by_classes and not chunk_size
        if by_classes and _goes_by_classes(input, linear_weight, dtype, (False, False), known=False):
            return classes.loss(input, linear_weight, linear_bias, target, dtype, options)
        loss, stats = family.rows_out(input, dtype, options)
        weight = as_matrix(linear_weight, dtype)
        bias = None if linear_bias is None else linear_bias.to(dtype)
        size = chunk_size or chunk_rows(len(target), len(weight), dtype.itemsize, input.device.type)
        for chunk in _chunks(input, weight, bias, target, size, options):
            loss[chunk.rows], stats[chunk.rows] = family.loss(chunk.logits, chunk.target, *chunk.options)
    return loss, stats


class Wanted(NamedTuple):
    """Which gradients are made, and how: what the operators that make some take after the data."""

    chunk_size: int
    dtype: torch.dtype
    """Of the logits."""
    total_dtype: torch.dtype
    """In which gradients of weight and bias add up over chunks."""
    input_grad_dtype: torch.dtype
    weight_grad_dtype: torch.dtype
    """Of the gradients of weight and bias."""
    needs_input: bool
    needs_weight: bool
    needs_bias: bool

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Of input, weight and bias."""
        return self[5:]

    def by_classes(self, input: Tensor, linear_weight: Tensor, known: bool) -> bool:
        """Whether classes go in chunks; ``known``: where the statistics of the rows are."""
        if self.chunk_size or self.total_dtype != arithmetic_dtype(self.dtype):
            return False
        return _goes_by_classes(input, linear_weight, self.dtype, self.needs[:2], known)


WANTED = len(Wanted._fields)


def _spend(
    make: Callable[[_Chunk], None],
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    wanted: Wanted,
    options: RowOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias, where ``make`` writes that of a chunk's logits over them."""
    chunk_size, dtype, total_dtype, input_grad_dtype, weight_grad_dtype, *_ = wanted
    saves = spared(linear_weight.numel(), dtype, total_dtype, weight_grad_dtype) if wanted.needs_weight else 0
    size = chunk_size or chunk_rows(len(target), len(linear_weight), dtype.itemsize, input.device.type, saves)
    total_dtype = made_in(len(target) <= size, dtype, total_dtype, weight_grad_dtype)
    grad_input, total, total_bias = make_gradients(input, linear_weight, input_grad_dtype, total_dtype, wanted.needs)
    weight = as_matrix(linear_weight, dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    for chunk in _chunks(input, weight, bias, target, size, options):
        make(chunk)
        rows, grad = chunk.rows, chunk.logits
        if wanted.needs_input:
            input_gradient(grad, weight, grad_input[rows])
        if wanted.needs_weight:
            add_weight_gradient(total, grad, chunk.input, rows.start == 0)
        if wanted.needs_bias:
            total_bias += grad.sum(0, dtype=total_dtype)
    if input.shape[0] == 0:
        total.zero_()
    return grad_input, total.to(weight_grad_dtype), total_bias.to(weight_grad_dtype)


def row_losses_and_grad(
    family: RowFamily,
    grad_loss: Tensor,  # [N] any stride
    input: Tensor,  # [N, D]
    linear_weight: Tensor,  # [C, D]
    linear_bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64
    stats: Tensor | None,  # [N, S], where a forward has found them
    *values: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`row_losses`, and the gradients of ``(grad_loss * loss).sum()``; empty where not needed.

    ``stats``: as that returned them for the same data; spare making the logits twice where classes go in chunks.
    ``values``: those of :class:`Wanted` and of the options.
    """
    wanted = Wanted(*values[:WANTED])
    options: Any = family.options(*values[WANTED:])
    data = (input, linear_weight, linear_bias)
    with plain(input.device):
        _check_target(target, options.ignore_index, linear_weight.shape[0])
        counted = _counted(target, options.ignore_index)
        if counted is not None:
            known = None if stats is None else stats[counted]
            part = (grad_loss[counted], input[counted], linear_weight, linear_bias, target[counted], known)
            found = row_losses_and_grad(family, *part, *wanted, *_of_rows(options, counted))
            spread = (_among(x, counted, len(target)) for x in found[: 2 + wanted.needs_input])
            return (*spread, *found[2 + wanted.needs_input :])  # type: ignore[return-value]
        if family.by_classes and wanted.by_classes(input, linear_weight, stats is not None):
            grad_dtypes = (wanted.input_grad_dtype, wanted.weight_grad_dtype)
            return classes.loss_and_grad(
                grad_loss, *data, target, stats, wanted.dtype, grad_dtypes, wanted.needs, options
            )
        loss, stats = family.rows_out(input, wanted.dtype, options)

        def finish(chunk: _Chunk) -> None:
            loss[chunk.rows], stats[chunk.rows] = family.loss_and_grad_(
                grad_loss[chunk.rows], chunk.logits, chunk.target, *chunk.options
            )

        grads = _spend(finish, *data, target, wanted, options)
    return loss, stats, *grads


def linear_softmax_apply(
    row_grad: Tensor,  # [N, 5]
    input: Tensor,  # [N, D]
    linear_weight: Tensor,  # [C, D]
    linear_bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64
    *values: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients from the coefficients of the rows, times their upstream gradients; empty where not needed.

    ``values``: as of :func:`row_losses_and_grad`. Without label smoothing: the coefficient S has no part.
    """
    wanted, options = Wanted(*values[:WANTED]), SoftmaxOptions(*values[WANTED:])
    data, num_classes = (input, linear_weight, linear_bias), len(linear_weight)
    with plain(input.device):
        _check_target(target, options.ignore_index, num_classes)
        counted = _counted(target, options.ignore_index)
        if counted is not None:
            part = (row_grad[counted], input[counted], linear_weight, linear_bias, target[counted])
            grad_input, *grads = linear_softmax_apply(*part, *wanted, *_of_rows(options, counted))
            spread = _among(grad_input, counted, len(target)) if wanted.needs_input else grad_input
            return (spread, *grads)  # type: ignore[return-value]
        if wanted.by_classes(input, linear_weight, known=True):
            grad_dtypes = (wanted.input_grad_dtype, wanted.weight_grad_dtype)
            return classes.spend(row_grad.contiguous(), *data, target, wanted.dtype, grad_dtypes, wanted.needs, options)

        def apply(chunk: _Chunk) -> None:
            local = shards.local_target(chunk.target, 0, num_classes, options.ignore_index)
            shards.apply(chunk.logits, local, row_grad[chunk.rows].contiguous(), options, inplace=True)

        return _spend(apply, *data, target, wanted, options)
