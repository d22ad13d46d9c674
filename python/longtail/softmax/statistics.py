"""Statistics of rows under autograd: any loss of a row in three passes over the logits.

    logits, target --RowStats--> stats [N, 5] --Record--> RowStatistics --what users write--> loss

The first step is one sweep forward and one backward, whatever becomes of the statistics; the second works on a few
numbers a row. What makes the five numbers of a row may be something else than logits in one place: the second step is
that of linear losses and of shared-out classes too. What autograd hands back between the two as the gradient of stats
is the row's RowGrad, which the sweep takes: of derivatives by d and t it would have to add up a, and lose its digits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import arguments
from ..arguments import arithmetic_dtype, check_choice, check_number, is_exporting
from ..errors import ArgumentValueError
from ..ops import layout, operators
from ..ops.autograd import SIGNATURE, apply
from ..ops.gradient import check_overwritable, guarded, take
from ..ops.vmap import refuse_vmap
from ..options import SOFTMAX_NUMBERS, SoftmaxOptions
from ..reference.row_statistics import RowStatistics, row_grad_of, row_statistics_of
from .shards import apply_options

GRADIENTS = ("backward", "inplace")


def checked_options(options: SoftmaxOptions, temperature: float, dtype: torch.dtype) -> SoftmaxOptions:
    """``options`` with numbers that are floats, and ``temperature`` in them: ``cap / T tanh(scale / T z / (cap / T))``.

    Raises:
        TypeError, ValueError: an option that is no tensor is wrong.
    """
    options = options.checked(dtype)
    temperature = check_number("temperature", temperature, 0.0, dtype=dtype, vanishes=False)
    if temperature == 1.0:
        return options._replace(entropy=True)
    if temperature == 0:
        raise ArgumentValueError("temperature is 0.0, expected a positive number")
    divided: dict[str, Any] = {
        name: SOFTMAX_NUMBERS[name]._replace(name=f"{name} / temperature").check(value / temperature, dtype)
        for name, value in (("scale", options.scale), ("softcap", options.softcap))
        if value
    }
    return options._replace(entropy=True, **divided)


def row_statistics(
    input: Tensor, target: Tensor, options: SoftmaxOptions, temperature: float, gradient: str
) -> RowStatistics:
    """See :func:`longtail.row_statistics`."""
    arguments.check_tensors(input=input, target=target)
    arguments.check_logits(input)
    check_choice("gradient", gradient, GRADIENTS)
    dtype = arithmetic_dtype(input.dtype)
    options = checked_options(options, temperature, dtype)
    check_overwritable(input, gradient)
    rows = layout.rows(input, target)
    options = options.prepared(input, target.shape, rows.logits.shape[1], dtype)
    vectors, others = options.parted()
    wants_grad = torch.is_grad_enabled() and rows.logits.requires_grad
    # As in differentiable_loss: torch.compile passes a context to the Function's forward where nothing requires grad.
    if is_exporting() or (torch.compiler.is_compiling() and not wants_grad):
        stats = stats_operator(rows.logits, rows.target, *vectors, *others)
    else:
        stats = apply(RowStats, rows.logits, rows.target, *vectors, (gradient, others))
    return record(stats, rows.target, options.ignore_index, rows.shape)


def record(stats: Tensor, target: Tensor, ignore_index: int, shape: torch.Size) -> RowStatistics:
    """What stats [N, 5] say of rows with targets [N], each entry of ``shape``.

    Where stats require grad they are used nowhere else, see above.
    """
    ignored = target == ignore_index
    if not (torch.is_grad_enabled() and stats.requires_grad):
        found = Record.of(stats, ignored)
    else:
        found = record_operator(stats, ignored) if is_exporting() else apply(Record, stats, ignored)
    return RowStatistics(*(x.reshape(shape) for x in found))


class Record(torch.autograd.Function):
    """(stats [N, 5], ignored [N]) -> the entries of RowStatistics, each [N]."""

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def of(stats: Tensor, ignored: Tensor) -> tuple[Tensor, ...]:
        *numbers, correct = row_statistics_of(stats)
        return (*(x.masked_fill(ignored, 0.0) for x in numbers), correct & ~ignored)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return Record.of(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, None]:
        if all(x is None for x in upstream):
            return None, None
        (stats,) = ctx.saved_tensors
        return torch.stack(row_grad_of(stats, upstream[:5]), 1), None


Record.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]


def _fake_record(stats: Tensor, ignored: Tensor) -> tuple[Tensor, ...]:
    return (*(stats.new_empty(ignored.shape) for _ in range(5)), torch.empty_like(ignored))


_NUMBERS = ", ".join(f"Tensor {name}" for name in RowStatistics._fields)
record_operator = operators.define(
    "softmax_row_record", f"(Tensor stats, Tensor ignored) -> ({_NUMBERS})", Record.of, _fake_record
)
torch.library.register_autograd("longtail::softmax_row_record", Record.backward, setup_context=Record.setup_context)


class RowStats(torch.autograd.Function):
    """(logits, target, *vectors, (gradient, options)) -> stats [N, 5]; "inplace": backward overwrites the logits."""

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        logits, target, *vectors, (_, others) = inputs
        with operators.below_autograd():
            return _stats(logits, target, *vectors, *others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        logits, target, *vectors, (ctx.gradient, ctx.options) = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, *vectors)

    @staticmethod
    def backward(ctx: Any, row_grad: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * len(ctx.needs_input_grad)
        if row_grad is None or not ctx.needs_input_grad[0]:
            return nothing
        inplace = ctx.gradient == "inplace" and not torch.compiler.is_compiling()
        logits, target, *vectors = take(ctx) if inplace else ctx.saved_tensors
        options = SoftmaxOptions(*vectors, *ctx.options)
        grad = logits_gradient(row_grad, logits.detach() if inplace else logits, target, options, inplace)
        if inplace:
            torch.autograd.graph.increment_version(grad)
        return (guarded(grad, row_grad, logits), *nothing[1:])


RowStats.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]


def _stats(logits: Tensor, target: Tensor, *options: Any) -> Tensor:
    return operators.softmax_loss(logits, target, *options)[1]


def logits_gradient(
    row_grad: Tensor, logits: Tensor, target: Tensor, options: SoftmaxOptions, inplace: bool = False
) -> Tensor:
    """Of logits [N, C] or [N, C, P] of rows with coefficients [N, 5]; written over them where ``inplace``."""
    row_grad = row_grad.contiguous()
    # The operators of a shard know -1, a class elsewhere; ignore_index may be -1.
    others = apply_options(options, options.ignore_index)
    if logits.dim() == 3:
        grad = operators.softmax_loss_apply(layout.to_rows(logits), target, row_grad, *others)
        grad = layout.to_images(grad, logits.shape)
        return logits.copy_(grad) if inplace else grad
    if not inplace:
        return operators.softmax_loss_apply(logits, target, row_grad, *others)
    operators.softmax_loss_apply_(logits, target, row_grad, *others)
    return logits


def _fake_stats(logits: Tensor, *_: Any) -> Tensor:
    return layout.stats_like(logits, arithmetic_dtype(logits.dtype))


stats_operator = operators.define(
    "softmax_row_stats", f"(Tensor logits, Tensor target, {operators.SOFTMAX}) -> Tensor stats", _stats, _fake_stats
)


def _save_for_formula(ctx: Any, inputs: tuple[Any, ...], **_: Any) -> None:
    logits, target, *options = inputs
    vectors, ctx.options = SoftmaxOptions(*options).parted()
    ctx.gradient = "backward"
    ctx.save_for_backward(logits, target, *vectors)


torch.library.register_autograd("longtail::softmax_row_stats", RowStats.backward, setup_context=_save_for_formula)
