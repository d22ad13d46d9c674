"""The gradients of the fused linear loss by chunks of classes instead of rows.

For each chunk of classes: logits (GEMM), accumulate. The chunks' statistics combine as those of shards of a vocabulary
do. Then for each chunk, last first: logits again (GEMM; the last chunk's are still there), apply in place, and the
chunk's part of the gradients of input and weight (GEMMs).

Rows in chunks take three GEMMs, but read and write the float32 sum of the weight's gradient [C, D] once a chunk.
Classes in chunks take one GEMM more, but for one chunk, and what adds up is the gradient of the input [N, D]: the
weight's is complete, and rounded once, chunk by chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..options import SoftmaxOptions
from ..reference import softmax
from ..softmax.shards import accumulate, apply, combine_shards, local_target
from .chunks import Plan, as_matrix, make_gradients, make_logits

PLAN = Plan(share=16, least=128, budget=1 << 28)
"""Of the rows of all classes that would hold as many logits as a chunk."""

_ALIGNMENT = 64  # classes in a chunk are a multiple of this, for the GEMMs and for aligned rows


def pays(input: Tensor, dtype: torch.dtype, total_dtype: torch.dtype, needs_weight: bool) -> bool:
    """Whether this way is the faster one: measured for bfloat16 on CPUs; float16 could overflow in a long product."""
    on_cpu = input.device.type == "cpu" and input.shape[0] > 0
    return on_cpu and dtype == torch.bfloat16 and total_dtype == torch.float32 and needs_weight


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


def _chunks(
    linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, size: int, options: SoftmaxOptions
) -> list[_Chunk]:
    """Chunks whose logits are yet to be made: all in one buffer."""
    buffer = linear_weight.new_empty(target.shape[0] * size)
    chunks = []
    for begin in range(0, linear_weight.shape[0], size):
        w = linear_weight[begin : begin + size]
        part = slice(begin, begin + len(w))
        local = local_target(target, begin, len(w), options.ignore_index)
        logits = buffer[: target.shape[0] * len(w)].view(-1, len(w))
        bias = None if linear_bias is None else linear_bias[part]
        chunks.append(_Chunk(part, w, bias, options.of_classes(part), local, logits))
    return chunks


def _stats(x: Tensor, chunks: list[_Chunk], target: Tensor, options: SoftmaxOptions) -> Tensor:
    """[N, 5], of whole rows. The last chunk's logits stay."""
    found, omega = [], []
    for chunk in chunks:
        make_logits(x, chunk.linear_weight, chunk.linear_bias, chunk.logits)
        found.append(accumulate(chunk.logits, chunk.target, chunk.options))
        weight = chunk.options.weight
        if weight is None or not options.label_smoothing:
            omega.append(found[0].new_tensor(len(chunk.linear_weight)))
        else:
            omega.append(weight.sum())
    owner = target.masked_fill(target == options.ignore_index, 0) // len(chunks[0].linear_weight)
    columns = dict(enumerate(torch.stack(found).unbind(2)))
    return combine_shards(columns, torch.stack(omega), owner)


def loss_and_grad(
    grad_loss: Tensor,  # [N] any stride
    input: Tensor,  # [N, D]
    linear_weight: Tensor,  # [C, D]
    linear_bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64
    dtype: torch.dtype,
    weight_grad_dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
    options: SoftmaxOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, statistics and gradients as ``linear_softmax_loss_and_grad`` returns them."""
    ignored = target == options.ignore_index
    weight = as_matrix(linear_weight, dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    # What an ignored row holds, NaN included, may not meet its zero gradient in the weight's GEMM.
    x = input.to(dtype).masked_fill(ignored[:, None], 0.0)
    size = chunk_classes(input.shape[0], weight.shape[0], dtype.itemsize)
    chunks = _chunks(weight, bias, target, size, options)
    stats = _stats(x, chunks, target, options).masked_fill_(ignored[:, None], 0.0)
    factors = softmax.Factors.of(target.masked_fill(ignored, 0), weight.shape[0], options)
    loss, row_grad = softmax.finish(stats, factors, options)
    grad_input, grad_weight, grad_bias = make_gradients(input, linear_weight, input.dtype, weight_grad_dtype, needs)
    total = x.new_zeros(x.shape if needs[0] else (0,), dtype=arithmetic_dtype(dtype))
    for chunk in reversed(chunks):
        if chunk is not chunks[-1]:
            make_logits(x, chunk.linear_weight, chunk.linear_bias, chunk.logits)
        grad = apply(chunk.logits, chunk.target, row_grad, grad_loss, chunk.options, inplace=True)
        if needs[0]:
            total += torch.mm(grad, chunk.linear_weight)
        if grad_weight.dtype == dtype:
            torch.mm(grad.t(), x, out=grad_weight[chunk.classes])
        else:
            grad_weight[chunk.classes] = torch.mm(grad.t(), x)
        if needs[2]:
            grad_bias[chunk.classes] = grad.sum(0, dtype=total.dtype)
    if needs[0]:
        grad_input.copy_(total)
    return loss.masked_fill_(ignored, 0.0), stats, grad_input, grad_weight, grad_bias
