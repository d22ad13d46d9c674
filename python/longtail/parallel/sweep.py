"""The chunks of a vocabulary-parallel linear loss.

For each chunk of rows: local logits (GEMM), accumulate, all-gather of the statistics, apply in place, the partial
gradient of the input (GEMM), whose sum over the ranks runs while the weight's gradient (GEMM) and the next chunk's
logits are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..linear.autograd import Setting
from ..linear.chunks import (
    add_weight_gradient,
    as_matrix,
    input_gradient,
    made_in,
    make_gradients,
    make_logits,
    plain,
)
from .collectives import Group, all_reduce_async, reduce_scatter_async
from .shard import Shard
from .stats import Gathered, Spent


class _Chunk(NamedTuple):
    """Some rows with their logits, and where they lie among all rows."""

    begin: int
    end: int
    blocks: int
    input: Tensor
    logits: Tensor
    target: Tensor
    shard: Shard

    def of(self, vector: Tensor) -> Tensor:
        """The chunk's part of what has all rows first: in sequence parallelism, the same piece of every rank's rows."""
        return vector.unflatten(0, (self.blocks, vector.shape[0] // self.blocks))[:, self.begin : self.end]

    def rows_of(self, matrix: Tensor) -> Tensor:
        """The chunk's rows of a matrix of all rows, contiguous."""
        return self.of(matrix).flatten(0, 1).contiguous()  # a view where a chunk has a row of each rank


def _chunks(
    input: Tensor,
    weight: Tensor,  # in the dtype of the logits
    bias: Tensor | None,
    target: Tensor,
    size: int,
    shard: Shard,
    sequence_parallel: bool,
) -> Iterator[_Chunk]:
    rows, blocks = input.shape[0], shard.handshake.world if sequence_parallel else 1
    size = max(1, size // blocks)
    buffer = weight.new_empty((blocks * min(size, rows), weight.shape[0]))
    for begin in range(0, rows, size):
        x = input[begin : begin + size].to(weight.dtype)
        if sequence_parallel:
            x = _gathered(x, shard)
        chunk = _Chunk(begin, min(begin + size, rows), blocks, x, buffer[: x.shape[0]], target, shard)
        g = chunk.of(target).reshape(-1)
        # What an ignored row holds, NaN included, may not meet its zero gradient in the weight's GEMM.
        x = x.masked_fill((g == shard.options.ignore_index)[:, None], 0.0)
        make_logits(x, weight, bias, chunk.logits)
        v = shard.options.sample_weight
        options = shard.options._replace(sample_weight=None if v is None else chunk.of(v).reshape(-1))
        yield chunk._replace(input=x, target=g, shard=shard._replace(options=options))


def _gathered(rows: Tensor, shard: Shard) -> Tensor:
    """Those of every rank, in rank order."""
    return shard.handshake.gather(lambda: rows).flatten(0, 1)


class _Sums:
    """The gradients of input, weight and bias, as the chunks add to them."""

    def __init__(self, data: Any, setting: Setting, group: Group, sequence_parallel: bool) -> None:
        input, linear_weight = data[:2]
        total_dtype, input_dtype, weight_dtype = setting.grad_dtypes(input, linear_weight)
        total_dtype = made_in(len(data[3]) <= setting.chunk_size, setting.dtype, total_dtype, weight_dtype)
        found = make_gradients(input, linear_weight, input_dtype, total_dtype, setting.needs)
        self.input, self.total, self.total_bias = found
        if input.shape[0] == 0:
            self.total.zero_()
        self._needs, self._group, self._scatters = setting.needs, group, sequence_parallel
        self._wait: Callable[[], None] | None = None

    def add(self, chunk: _Chunk, weight: Tensor) -> None:
        """From the gradient of the chunk's logits, which stands in their place."""
        grad = chunk.logits
        if self._needs[0]:
            self._add_input(grad, weight, self.input[chunk.begin : chunk.end])
        if self._needs[1]:
            add_weight_gradient(self.total, grad, chunk.input, chunk.begin == 0)
        if self._needs[2]:
            self.total_bias += grad.sum(0, dtype=self.total_bias.dtype)

    def _add_input(self, grad: Tensor, weight: Tensor, out: Tensor) -> None:
        if self._wait is not None:  # for the chunk before: its sum has had a chunk's work to hide behind
            self._wait()
        partial = out.new_empty((grad.shape[0], weight.shape[1])) if self._scatters else out
        input_gradient(grad, weight, partial)
        if self._scatters:
            self._wait = reduce_scatter_async(partial, out, self._group)
        else:
            self._wait = all_reduce_async(out, self._group)

    def finished(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if self._wait is not None:
            self._wait()
        return self.input, self.total.to(dtype), self.total_bias.to(dtype)


Gradients = tuple[Tensor, Tensor, Tensor]
"""Of input, weight and bias."""


class Swept(NamedTuple):
    loss: Tensor
    """[N], 0 where ignored."""
    found: Gathered
    grads: Gradients | None


def sweep(
    data: Any,  # input, linear_weight, linear_bias, target
    setting: Setting,
    shard: Shard,
    sequence_parallel: bool,
    upstream: Tensor | None,  # [N], where gradients are wanted
    known: Gathered | None,  # where a sweep has found it before
) -> Swept:
    """One pass over the chunks."""
    input, linear_weight, _, target = data
    rows, wide = len(target), arithmetic_dtype(setting.dtype)
    loss = input.new_empty((rows,), dtype=wide)
    w_g = loss.new_ones((rows,)) if shard.options.weight is not None else None
    terms = loss.new_empty((rows, 3)) if shard.options.by_target() else None
    whole = known or Gathered(loss.new_empty((rows, shard.statistics)), w_g, loss.new_zeros(()), terms)
    if rows == 0 and known is None:
        _gathered(linear_weight[:0], shard)  # ranks compare what they are about to compute all the same

    def coefficients(chunk: _Chunk) -> Any:
        nonlocal whole
        if known is None:
            found = chunk.shard.accumulate(chunk.logits, chunk.target)
            _store(chunk, whole, found)
            whole = whole._replace(weight_sum=found.weight_sum)
        else:
            part = None if known.w_g is None else chunk.of(known.w_g).reshape(-1)
            terms = None if known.terms is None else chunk.rows_of(known.terms)
            found = Gathered(chunk.rows_of(known.stats), part, known.weight_sum, terms)
        row_loss, row_grad = chunk.shard.finish(found, chunk.target)
        chunk.of(loss).copy_(row_loss.view(chunk.blocks, -1))
        if upstream is None:
            return None
        return chunk.shard.spent(row_grad, chunk.of(upstream).reshape(-1), found.terms)

    grads = _pass(data, setting, shard, sequence_parallel, upstream is not None, coefficients)
    return Swept(loss.masked_fill_(target == shard.options.ignore_index, 0.0), whole, grads)


def gradients(
    data: Any,  # input, linear_weight, linear_bias, target
    setting: Setting,
    shard: Shard,
    sequence_parallel: bool,
    known: Spent,  # of all rows
) -> Gradients:
    """One pass over the chunks, from coefficients that are known."""

    def coefficients(chunk: _Chunk) -> Spent:
        terms = None if known.terms is None else chunk.rows_of(known.terms)
        return Spent(chunk.rows_of(known.row_grad), terms)

    grads = _pass(data, setting, shard, sequence_parallel, True, coefficients)
    assert grads is not None
    return grads


def _pass(
    data: Any,
    setting: Setting,
    shard: Shard,
    sequence_parallel: bool,
    trains: bool,
    coefficients: Callable[[_Chunk], Any],
) -> Gradients | None:
    """The chunks in turn: what ``coefficients`` says of each one's rows, as of its shard, is spent where ``trains``."""
    input, linear_weight, linear_bias, target = data
    with plain(input.device):
        weight = as_matrix(linear_weight, setting.dtype)
        bias = None if linear_bias is None else linear_bias.to(setting.dtype)
        sums = _Sums(data, setting, shard.handshake.group, sequence_parallel) if trains else None
        for chunk in _chunks(input, weight, bias, target, setting.chunk_size, shard, sequence_parallel):
            spent = coefficients(chunk)
            if sums is not None and spent is not None:
                chunk.shard.apply(chunk.logits, chunk.target, spent, inplace=True)
                sums.add(chunk, weight)
        return None if sums is None else sums.finished(setting.grad_dtypes(input, linear_weight)[2])


def _store(chunk: _Chunk, whole: Gathered, found: Gathered) -> None:
    chunk.of(whole.stats).copy_(found.stats.unflatten(0, (chunk.blocks, -1)))
    if whole.w_g is not None and found.w_g is not None:
        chunk.of(whole.w_g).copy_(found.w_g.view(chunk.blocks, -1))
    if whole.terms is not None and found.terms is not None:
        chunk.of(whole.terms).copy_(found.terms.view(chunk.blocks, -1, 3))
