"""The fused linear loss by chunks of classes instead of rows, on CPUs.

For each chunk of classes: logits (GEMM), accumulate. The chunks' statistics combine as those of shards of a vocabulary
do. For gradients then, for each chunk, last first: logits again (GEMM; the last chunk's are still there), apply in
place, and the chunk's part of the gradients of input and weight (GEMMs). ``cost.py`` says when this way pays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..options import SoftmaxOptions
from ..reference import softmax
from ..softmax.shards import accumulate, apply, combine_shards, local_target, packed, target_terms
from .chunks import Plan, as_matrix, make_gradients, make_logits
from .cost import has_amx

PLAN = Plan(share=36, least=64, budget=1 << 28)
"""Of the rows of all classes that would hold as many logits as a chunk."""

_ALIGNMENT = 64  # classes in a chunk are a multiple of this, for the GEMMs and for aligned rows
_ROWS = 512  # whose statistics are combined at a time
_GATHERED = 1 << 18  # elements of the weight's rows, gathered for targets at a time
_PADDING = 32  # elements after each row of a chunk: rows a power of two apart fall on the same lines of the cache


def chunk_classes(rows: int, num_classes: int, itemsize: int) -> int:
    """Classes per chunk for [rows, num_classes] logits: those of :data:`PLAN`, evened out over the chunks."""
    affordable = PLAN.budget // (num_classes * itemsize)
    worth = min(max(PLAN.least, min(-(-rows // PLAN.share), affordable)), rows)  # rows of all classes
    chunks = -(-rows // worth)
    return min(num_classes, -(-num_classes // (chunks * _ALIGNMENT)) * _ALIGNMENT)


class _Chunk(NamedTuple):
    """Some classes, with what the operators of a shard take."""

    classes: slice
    linear_weight: Tensor  # [c, D]
    linear_bias: Tensor | None  # [c]
    options: SoftmaxOptions  # of these classes
    target: Tensor  # [N]
    logits: Tensor  # [N, c]
    terms: Tensor | None  # [N, 3], of the targets' classes, where they bring anything to the logits of others


def _target_logits(x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> Tensor:
    """[N], rounded as those of a GEMM are."""
    wide = arithmetic_dtype(x.dtype)
    found = x.new_empty(len(x), dtype=wide)
    step = max(1, _GATHERED // max(x.shape[1], 1))
    for begin in range(0, len(x), step):
        rows = slice(begin, begin + step)
        torch.sum(x[rows].to(wide) * linear_weight[target[rows]].to(wide), 1, out=found[rows])
    return (found if linear_bias is None else found + linear_bias[target]).to(x.dtype)


def _terms(
    x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, options: SoftmaxOptions
) -> Tensor | None:
    """Those of all chunks, before one has its logits."""
    if not options.by_target():
        return None
    logits = _target_logits(x, linear_weight, linear_bias, target) if options.compensation else x.new_zeros(len(x))
    return target_terms(logits, target, options, arithmetic_dtype(x.dtype))


def _chunks(
    x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, options: SoftmaxOptions
) -> list[_Chunk]:
    """Chunks whose logits are yet to be made: all in one buffer."""
    terms = _terms(x, linear_weight, linear_bias, target, options)
    size = chunk_classes(len(target), len(linear_weight), linear_weight.dtype.itemsize)
    buffer = linear_weight.new_empty((len(target), size + _PADDING))
    chunks = []
    for begin in range(0, linear_weight.shape[0], size):
        w = linear_weight[begin : begin + size]
        part = slice(begin, begin + len(w))
        local = local_target(target, begin, len(w), options.ignore_index)
        bias = None if linear_bias is None else linear_bias[part]
        chunks.append(_Chunk(part, w, bias, options.of_classes(part), local, buffer[:, : len(w)], terms))
    return chunks


def _stats(x: Tensor, chunks: list[_Chunk], target: Tensor, options: SoftmaxOptions) -> Tensor:
    """[N, 5], of whole rows. The last chunk's logits stay."""
    found = x.new_empty((5, len(chunks), len(x)), dtype=arithmetic_dtype(x.dtype))
    for i, chunk in enumerate(chunks):
        make_logits(x, chunk.linear_weight, chunk.linear_bias, chunk.logits)
        found[:, i] = accumulate(chunk.logits, chunk.target, chunk.options, chunk.terms).t()
    columns = dict(enumerate(found))
    if not (options.entropy or options.complement_coefficient):
        del columns[2]
    if not options.label_smoothing:
        del columns[4]
    sums = [weight.sum() for chunk in chunks if (weight := chunk.options.weight) is not None]
    omega = torch.stack(sums) if sums else found.new_tensor([len(chunk.linear_weight) for chunk in chunks])
    owner = target // len(chunks[0].linear_weight)
    parts = []
    for begin in range(0, len(x), _ROWS):
        rows = slice(begin, begin + _ROWS)
        parts.append(combine_shards({i: column[:, rows] for i, column in columns.items()}, omega, owner[rows]))
    return torch.cat(parts)


def loss(
    input: Tensor,  # [N, D]
    linear_weight: Tensor,  # [C, D]
    linear_bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64, of rows that all count
    dtype: torch.dtype,
    options: SoftmaxOptions,
) -> tuple[Tensor, Tensor]:
    """Losses and statistics as ``linear_softmax_loss`` returns them."""
    weight = as_matrix(linear_weight, dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    x = as_matrix(input, dtype)
    chunks = _chunks(x, weight, bias, target, options)
    stats = _stats(x, chunks, target, options)
    factors = softmax.Factors.of(target, weight.shape[0], options)
    return softmax.finish(stats, factors, options)[0], stats


class _Sums:
    """The gradients of input, weight and bias, as the chunks add to them or make them."""

    def __init__(
        self,
        input: Tensor,
        x: Tensor,
        linear_weight: Tensor,
        size: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        needs: tuple[bool, bool, bool],
    ) -> None:
        self.grads = make_gradients(input, linear_weight, *dtypes, needs)
        self._needs, self._x = needs, x
        wide = arithmetic_dtype(x.dtype)
        self._total = self.grads[0] if dtypes[0] == wide else self.grads[0].new_empty(self.grads[0].shape, dtype=wide)
        # AMX takes the second factor by rows: [D, N] by [N, c] is up to twice as fast as [c, N] by [N, D].
        self._x_t = x.t().contiguous() if needs[1] and x.dtype == torch.bfloat16 and has_amx() else None
        # Products that are added or turned: of the input in its gradient's own place, which is made at the end.
        n, d = x.shape
        self._features = 0 if self._x_t is None else min(d, max(256, n // 4))
        self._turned = x.new_empty((self._features, size + _PADDING))
        self._product = self.grads[0] if self.grads[0].dtype == x.dtype else x.new_empty(self.grads[0].shape)

    def add(self, chunk: _Chunk, first: bool) -> None:
        """From the gradient of the chunk's logits, which stands in their place."""
        grad = chunk.logits
        if self._needs[0]:
            self._add_input_gradient(grad, chunk.linear_weight, first)
        if self._needs[1]:
            self._make_weight_gradient(grad, self.grads[1][chunk.classes])
        if self._needs[2]:
            self.grads[2][chunk.classes] = grad.sum(0, dtype=arithmetic_dtype(grad.dtype))

    def _add_input_gradient(self, grad: Tensor, weight: Tensor, first: bool) -> None:
        if self._total.dtype == grad.dtype:
            self._total.addmm_(grad, weight, beta=0 if first else 1)
            return
        product = torch.mm(grad, weight, out=self._product)
        self._total.copy_(product) if first else self._total.add_(product)

    def _make_weight_gradient(self, grad: Tensor, out: Tensor) -> None:
        if self._x_t is not None:
            for part, columns in zip(self._x_t.split(self._features), out.split(self._features, 1), strict=True):
                product = torch.mm(part, grad, out=self._turned[: len(part), : len(out)])
                columns.copy_(product.t())  # padded, it is copied on every core
        elif out.dtype == grad.dtype:
            torch.mm(grad.t(), self._x, out=out)
        else:
            out.copy_(torch.mm(grad.t(), self._x))

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._total is not self.grads[0]:
            self.grads[0].copy_(self._total)
        return self.grads


def loss_and_grad(
    grad_loss: Tensor,  # [N] any stride
    input: Tensor,  # [N, D]
    linear_weight: Tensor,  # [C, D]
    linear_bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64, of rows that all count
    stats: Tensor | None,  # [N, 5], where a forward has found them
    dtype: torch.dtype,
    grad_dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool, bool],
    options: SoftmaxOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, statistics and gradients as ``linear_softmax_loss_and_grad`` returns them.

    ``grad_dtypes``: of the input's gradient; of those of weight and bias.
    """
    x, weight = as_matrix(input, dtype), as_matrix(linear_weight, dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    chunks = _chunks(x, weight, bias, target, options)
    made = None if stats is not None else chunks[-1]
    if stats is None:
        stats = _stats(x, chunks, target, options)
    factors = softmax.Factors.of(target, weight.shape[0], options)
    loss, row_grad = softmax.finish(stats, factors, options)
    sums = _Sums(input, x, linear_weight, len(chunks[0].linear_weight), grad_dtypes, needs)
    return loss, stats, *_spent(x, chunks, made, packed(row_grad, grad_loss), sums)


def spend(
    row_grad: Tensor,  # [N, 5]
    input: Tensor,  # [N, D]
    linear_weight: Tensor,  # [C, D]
    linear_bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64, of rows that all count
    dtype: torch.dtype,
    grad_dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool, bool],
    options: SoftmaxOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as ``linear_softmax_apply`` returns them; ``grad_dtypes``: as of :func:`loss_and_grad`."""
    x, weight = as_matrix(input, dtype), as_matrix(linear_weight, dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    chunks = _chunks(x, weight, bias, target, options)
    sums = _Sums(input, x, linear_weight, len(chunks[0].linear_weight), grad_dtypes, needs)
    return _spent(x, chunks, None, row_grad, sums)


def _spent(
    x: Tensor, chunks: list[_Chunk], made: _Chunk | None, coefficients: Tensor, sums: _Sums
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that the chunks add up to, last first; ``made``: whose logits are there."""
    for chunk in reversed(chunks):
        if chunk is not made:
            make_logits(x, chunk.linear_weight, chunk.linear_bias, chunk.logits)
        apply(chunk.logits, chunk.target, coefficients, chunk.options, True, chunk.terms)
        sums.add(chunk, chunk is chunks[-1])
    return sums.finished()
