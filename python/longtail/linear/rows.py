"""The operators of the fused linear loss: logits made, turned into their gradient and spent, a chunk of rows at a time.

For each chunk: ``logits = input @ linear_weight.T + linear_bias`` (vendor GEMM), ``softmax_loss_and_grad_`` in place,
``grad_input = logits @ linear_weight`` and ``grad_weight += logits.T @ input`` (vendor GEMMs). The one buffer of logits
serves all chunks. Loops live inside the operators, so that a compiled graph holds one node, whatever the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..ops import operators
from ..options import SoftmaxOptions
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


def _of_rows(options: SoftmaxOptions, rows: Tensor | slice) -> SoftmaxOptions:
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
    options: SoftmaxOptions


def _chunks(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    size: int,
    options: SoftmaxOptions,
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


def _rows_out(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    n, wide = input.shape[0], arithmetic_dtype(dtype)
    return input.new_empty((n,), dtype=wide), input.new_empty((n, 5), dtype=wide)


def linear_softmax_loss(
    input: Tensor,  # [N, D]
    linear_weight: Tensor,  # [C, D]
    linear_bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64
    chunk_size: int,
    dtype: torch.dtype,
    total_dtype: torch.dtype,
    *values: Any,
) -> tuple[Tensor, Tensor]:
    """Row losses [N] and statistics [N, 5]. Reads the weight once a chunk; extra memory: one chunk of logits.

    ``total_dtype``: for the operator's derivative alone.
    """
    options = SoftmaxOptions(*values)
    with plain(input.device):
        _check_target(target, options.ignore_index, linear_weight.shape[0])
        counted = _counted(target, options.ignore_index)
        if counted is not None:
            data = (input[counted], linear_weight, linear_bias, target[counted])
            found = linear_softmax_loss(*data, chunk_size, dtype, total_dtype, *_of_rows(options, counted))
            return _among(found[0], counted, len(target)), _among(found[1], counted, len(target))
        if not chunk_size and _goes_by_classes(input, linear_weight, dtype, (False, False), known=False):
            return classes.loss(input, linear_weight, linear_bias, target, dtype, options)
        loss, stats = _rows_out(input, dtype)
        weight = as_matrix(linear_weight, dtype)
        bias = None if linear_bias is None else linear_bias.to(dtype)
        size = chunk_size or chunk_rows(len(target), len(weight), dtype.itemsize, input.device.type)
        for chunk in _chunks(input, weight, bias, target, size, options):
            loss[chunk.rows], stats[chunk.rows] = operators.softmax_loss(chunk.logits, chunk.target, *chunk.options)
    return loss, stats


def linear_softmax_loss_and_grad(
    grad_loss: Tensor,  # [N] any stride
    input: Tensor,  # [N, D]
    linear_weight: Tensor,  # [C, D]
    linear_bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64
    stats: Tensor | None,  # [N, 5], where a forward has found them
    chunk_size: int,
    dtype: torch.dtype,
    total_dtype: torch.dtype,
    input_grad_dtype: torch.dtype,
    weight_grad_dtype: torch.dtype,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    *values: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`linear_softmax_loss`, and the gradients of ``(grad_loss * loss).sum()``; empty where not needed.

    ``stats``: as that returned them for the same data; spare making the logits twice where classes go in chunks.
    ``dtype``: of the logits. Gradients of weight and bias add up in ``total_dtype``, returned in ``weight_grad_dtype``;
    that of the input is in ``input_grad_dtype``.
    """
    options, needs = SoftmaxOptions(*values), (needs_input, needs_weight, needs_bias)
    with plain(input.device):
        _check_target(target, options.ignore_index, linear_weight.shape[0])
        counted = _counted(target, options.ignore_index)
        if counted is not None:
            known = None if stats is None else stats[counted]
            part = (grad_loss[counted], input[counted], linear_weight, linear_bias, target[counted], known)
            setting: Any = (chunk_size, dtype, total_dtype, input_grad_dtype, weight_grad_dtype, *needs)
            found = linear_softmax_loss_and_grad(*part, *setting, *_of_rows(options, counted))
            spread = (_among(x, counted, len(target)) for x in found[: 2 + needs_input])
            return (*spread, *found[2 + needs_input :])  # type: ignore[return-value]
        chooses = not chunk_size and total_dtype == arithmetic_dtype(dtype)
        if chooses and _goes_by_classes(input, linear_weight, dtype, needs[:2], stats is not None):
            data = (grad_loss, input, linear_weight, linear_bias, target, stats)
            return classes.loss_and_grad(*data, dtype, (input_grad_dtype, weight_grad_dtype), needs, options)
        loss, stats = _rows_out(input, dtype)
        saves = spared(linear_weight.numel(), dtype, total_dtype, weight_grad_dtype) if needs_weight else 0
        size = chunk_size or chunk_rows(len(target), len(linear_weight), dtype.itemsize, input.device.type, saves)
        total_dtype = made_in(len(target) <= size, dtype, total_dtype, weight_grad_dtype)
        grad_input, total, total_bias = make_gradients(input, linear_weight, input_grad_dtype, total_dtype, needs)
        weight = as_matrix(linear_weight, dtype)
        bias = None if linear_bias is None else linear_bias.to(dtype)
        for chunk in _chunks(input, weight, bias, target, size, options):
            rows, grad = chunk.rows, chunk.logits
            loss[rows], stats[rows] = operators.softmax_loss_and_grad_(
                grad_loss[rows], grad, chunk.target, *chunk.options
            )
            if needs_input:
                input_gradient(grad, weight, grad_input[rows])
            if needs_weight:
                add_weight_gradient(total, grad, chunk.input, rows.start == 0)
            if needs_bias:
                total_bias += grad.sum(0, dtype=total_dtype)
        if input.shape[0] == 0:
            total.zero_()
        return loss, stats, grad_input, total.to(weight_grad_dtype), total_bias.to(weight_grad_dtype)


def _fake_loss(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _weight, _bias, _target, _chunk_size, dtype, *_ = rest
    return _rows_out(input, dtype)


def _fake_loss_and_grad(_grad_loss: Tensor, input: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _bias, _target, _stats, _size, dtype, _total_dtype, input_grad_dtype, weight_grad_dtype, *needs = rest[:11]
    grads = make_gradients(input, linear_weight, input_grad_dtype, weight_grad_dtype, tuple(needs))
    return (*_rows_out(input, dtype), *grads)


_DATA = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target"
_HOW = "int chunk_size, ScalarType dtype, ScalarType total_dtype"
_NEEDS = (
    "ScalarType input_grad_dtype, ScalarType weight_grad_dtype, bool needs_input, bool needs_weight, bool needs_bias"
)
loss_operator = operators.define(
    "linear_softmax_loss",
    f"({_DATA}, {_HOW}, {operators.SOFTMAX}) -> (Tensor loss, Tensor stats)",
    linear_softmax_loss,
    _fake_loss,
)
loss_and_grad_operator = operators.define(
    "linear_softmax_loss_and_grad",
    f"(Tensor grad_loss, {_DATA}, Tensor? stats, {_HOW}, {_NEEDS}, {operators.SOFTMAX}) -> "
    "(Tensor loss, Tensor stats, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    linear_softmax_loss_and_grad,
    _fake_loss_and_grad,
)
