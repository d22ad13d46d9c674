"""The gradients of the fused linear loss by chunks of classes instead of rows.

For each chunk of classes: logits (GEMM), accumulate. The chunks' statistics combine as those of shards of a vocabulary
do. Then for each chunk, last first: logits again (GEMM; the last chunk's are still there), apply in place, and the
chunk's part of the gradients of input and weight (GEMMs).

Rows in chunks take three GEMMs, but read and write the float32 sum of the weight's gradient [C, D] once a chunk.
Classes in chunks take one GEMM more, but for one chunk, and what adds up is the gradient of the input [N, D]: the
weight's is complete, and rounded once, chunk by chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from .fallback import finish_options
from .linear_chunks import Plan, arithmetic_dtype, as_matrix, make_gradients, make_logits
from .vocab_shard import IGNORED, local_target
from .vocab_stats import combine_shards

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


class _Options(NamedTuple):
    """In the order of the operators."""

    weight: Tensor | None
    class_bias: Tensor | None
    class_margin: Tensor | None
    sample_weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    focal_gamma: float
    complement_coefficient: float
    cross_entropy_coefficient: float
    scale: float
    softcap: float
    z_loss: float


class _Chunk(NamedTuple):
    """Some classes, with what the operators of a shard take."""

    classes: slice
    linear_weight: Tensor  # [c, D]
    linear_bias: Tensor | None  # [c]
    vectors: tuple[Tensor | None, ...]  # weight, class_bias, class_margin
    target: Tensor  # [N]
    logits: Tensor  # [N, c]


def _chunks(
    linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, size: int, options: _Options
) -> list[_Chunk]:
    """Chunks whose logits are yet to be made: all in one buffer."""
    buffer = linear_weight.new_empty(target.shape[0] * size)
    chunks = []
    for begin in range(0, linear_weight.shape[0], size):
        w = linear_weight[begin : begin + size]
        part = slice(begin, begin + len(w))
        vectors = tuple(None if x is None else x[part] for x in options[:3])
        local = local_target(target, begin, len(w), options.ignore_index)
        logits = buffer[: target.shape[0] * len(w)].view(-1, len(w))
        chunks.append(_Chunk(part, w, None if linear_bias is None else linear_bias[part], vectors, local, logits))
    return chunks


def _stats(x: Tensor, chunks: list[_Chunk], target: Tensor, options: _Options) -> Tensor:
    """[N, 5], of whole rows. The last chunk's logits stay."""
    smooths = options.label_smoothing != 0
    found, omega = [], []
    for chunk in chunks:
        make_logits(x, chunk.linear_weight, chunk.linear_bias, chunk.logits)
        found.append(
            ops.softmax_loss_accumulate(
                chunk.logits, chunk.target, *chunk.vectors, IGNORED, smooths, options.scale, options.softcap
            )
        )
        weight = chunk.vectors[0]
        total = weight.sum() if weight is not None and smooths else found[0].new_tensor(len(chunk.linear_weight))
        omega.append(total)
    owner = target.masked_fill(target == options.ignore_index, 0) // len(chunks[0].linear_weight)
    columns = dict(enumerate(torch.stack(found).unbind(2)))
    return combine_shards(columns, torch.stack(omega), owner)


def linear_softmax_loss_and_grad(
    grad_loss: Tensor,  # [N] any stride
    input: Tensor,  # [N, D]
    linear_weight: Tensor,  # [C, D]
    linear_bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64
    dtype: torch.dtype,
    weight_grad_dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
    *values: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses, statistics and gradients as the operator of that name returns them."""
    options = _Options(*values)
    ignored = target == options.ignore_index
    weight = as_matrix(linear_weight, dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    # What an ignored row holds, NaN included, may not meet its zero gradient in the weight's GEMM.
    x = input.to(dtype).masked_fill(ignored[:, None], 0.0)
    size = chunk_classes(input.shape[0], weight.shape[0], dtype.itemsize)
    chunks = _chunks(weight, bias, target, size, options)
    stats = _stats(x, chunks, target, options).masked_fill_(ignored[:, None], 0.0)
    g = target.masked_fill(ignored, 0)
    coefficients = (*options[5:9], options.z_loss)
    finish = finish_options(g, weight.shape[0], options.weight, options.sample_weight, *coefficients)
    loss, row_grad = reference.finish(stats, **finish)
    packed = torch.stack(row_grad.times(grad_loss), 1)
    grad_input, grad_weight, grad_bias = make_gradients(input, linear_weight, weight_grad_dtype, needs)
    total = x.new_zeros(x.shape if needs[0] else (0,), dtype=arithmetic_dtype(dtype))
    for chunk in reversed(chunks):
        if chunk is not chunks[-1]:
            make_logits(x, chunk.linear_weight, chunk.linear_bias, chunk.logits)
        grad = chunk.logits
        weights = chunk.vectors[0] if options.label_smoothing else None  # times 0 otherwise, which may be NaN
        data = (grad, chunk.target, packed, weights, chunk.vectors[1])
        ops.softmax_loss_apply_(*data, IGNORED, options.scale, options.softcap)
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
