"""Row statistics of hidden states under autograd: any loss of a row, and its logits never whole.

    input, weight --LinearRowStats--> stats [N, 5] --Record--> RowStatistics --what users write--> loss

Forward is one GEMM and keeps five numbers a row. Backward makes the logits again, turns them into their gradient in
place, and spends it in two GEMMs: the upstream gradient is known by then, and nothing else is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype, check_logits, is_exporting
from ..errors import ArgumentValueError
from ..ops import operators
from ..ops.autograd import SIGNATURE
from ..ops.gradient import guarded
from ..ops.vmap import refuse_vmap
from ..options import SoftmaxOptions
from ..reference.row_statistics import RowStatistics
from ..softmax.statistics import checked_options, record
from .autograd import Setting
from .chunks import Chunking
from .loss import Data, check_data, logits_dtype, needs_gradients
from .operators import SOFTMAX, apply_operator
from .shapes import rows_first, targets_of


def row_statistics(
    data: Data, options: SoftmaxOptions, temperature: float, chunking: Chunking, shift: bool
) -> RowStatistics:
    """See :func:`longtail.linear_row_statistics`."""
    input, linear_weight, linear_bias, target = data
    check_data(*data)
    check_logits(input)
    if linear_weight.dim() != 2:
        raise ArgumentValueError(f"linear_weight has shape {list(linear_weight.shape)}, expected (C, D)")
    options = checked_options(options, temperature, arithmetic_dtype(input.dtype))
    dtype = logits_dtype(input, linear_weight, linear_bias)
    total_dtype = chunking.check(dtype)
    g, options = targets_of(input, target, input.shape[:-1], options, shift)
    options = options.prepared(input, g.shape, linear_weight.shape[0], arithmetic_dtype(dtype))
    needs = needs_gradients(input, linear_weight, linear_bias)
    setting = Setting("none", "backward", chunking.size or 0, dtype, total_dtype, needs)
    rows = g.reshape(-1)
    inputs = (rows_first(input), linear_weight, linear_bias, rows)
    vectors, others = options.parted()
    if is_exporting() or (torch.compiler.is_compiling() and not any(needs)):
        stats = stats_operator(*inputs, setting.chunk_size, dtype, total_dtype, *vectors, *others)
    else:
        stats = LinearRowStats.apply(*inputs, *vectors, (setting, others))
    return record(stats, rows, options.ignore_index, g.shape)


class LinearRowStats(torch.autograd.Function):
    """(input, linear_weight, linear_bias, target, *vectors, (setting, options)) -> stats [N, 5]."""

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        *data_and_vectors, (setting, others) = inputs
        data, vectors = data_and_vectors[:4], data_and_vectors[4:]
        with operators.below_autograd():
            return _stats(*data, setting.chunk_size, setting.dtype, setting.total_dtype, *vectors, *others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        *data_and_vectors, (ctx.setting, ctx.options) = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*data_and_vectors)

    @staticmethod
    def backward(ctx: Any, row_grad: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * len(ctx.needs_input_grad)
        if row_grad is None or not any(ctx.needs_input_grad):
            return nothing
        saved = ctx.saved_tensors
        data, options = saved[:4], (*saved[4:], *ctx.options)
        with operators.below_autograd():
            grads = _gradients(row_grad, data, ctx.setting, ctx.needs_input_grad[:3], options)
        found = zip(grads, ctx.needs_input_grad[:3], strict=True)
        return (*(guarded(grad, row_grad, *data[:3]) if need else None for grad, need in found), *nothing[3:])


LinearRowStats.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]


def _stats(*arguments: Any) -> Tensor:
    """As ``linear_softmax_loss`` takes them."""
    stats: Tensor = SOFTMAX.loss(*arguments)[1]
    return stats


def _gradients(row_grad: Tensor, data: Any, setting: Setting, needs: tuple[bool, ...], options: tuple[Any, ...]) -> Any:
    """Those of input, weight and bias, empty where not needed, of rows with coefficients [N, 5]."""
    dtypes = (setting.dtype, *setting.grad_dtypes(*data[:2]))
    return apply_operator(row_grad.contiguous(), *data, setting.chunk_size, *dtypes, *needs, *options)


def _fake_stats(input: Tensor, *rest: Any) -> Tensor:
    _weight, _bias, _target, _chunk_size, dtype, *_ = rest
    return input.new_empty((input.shape[0], 5), dtype=arithmetic_dtype(dtype))


stats_operator = operators.define(
    "linear_softmax_row_stats",
    "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, int chunk_size, ScalarType dtype, "
    f"ScalarType total_dtype, {operators.SOFTMAX}) -> Tensor stats",
    _stats,
    _fake_stats,
)


def _save_for_formula(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    *data, chunk_size, dtype, total_dtype = inputs[:7]
    vectors, ctx.options = SoftmaxOptions(*inputs[7:]).parted()
    ctx.setting = Setting("none", "backward", chunk_size, dtype, total_dtype, (True, True, True))
    ctx.save_for_backward(*data, *vectors)


torch.library.register_autograd(
    "longtail::linear_softmax_row_stats", LinearRowStats.backward, setup_context=_save_for_formula
)
