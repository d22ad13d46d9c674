"""The fused linear loss under autograd, for its two gradient modes.

"forward": the gradients are made with the loss, in three GEMMs, and kept; backward multiplies them by the upstream
scalar, which costs a scalar read when it is 1. "backward": forward keeps nothing but its inputs (one GEMM), backward
makes the logits again (three more): any upstream gradient, any number of times.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .autograd import SIGNATURE, RefuseSecondDerivative, differentiable_reduction, reduce_loss, rows_of
from .kept_gradient import own, take
from .linear_chunks import arithmetic_dtype
from .linear_softmax_loss import loss_and_grad_operator, loss_operator
from .no_vmap import refuse

# Inputs of LinearSoftmaxLoss that precede the options of the operators.
_LEADING = 8


class Setting(NamedTuple):
    """What does not depend on the data."""

    reduction: str
    gradient: str
    chunk_size: int
    dtype: torch.dtype
    """Of the logits."""
    total_dtype: torch.dtype
    """In which gradients of weight and bias add up."""
    needs: tuple[bool, bool, bool]
    """Whether input, weight and bias need a gradient."""

    def grad_dtypes(self, input: Tensor, linear_weight: Tensor) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of sums over chunks, of the input's gradient, of that of weight and bias; rounded in backward if float16."""
        if self.gradient == "forward" and self.dtype == torch.float16:
            return (torch.promote_types(self.total_dtype, torch.float32),) * 3
        return self.total_dtype, input.dtype, linear_weight.dtype


def linear_softmax_loss(
    input: Tensor,  # [N, D]
    linear_weight: Tensor,  # [C, D]
    linear_bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64
    denominator: Tensor | None,
    divisor: Tensor | None,
    factor: Tensor | None,
    setting: Setting,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """(loss, stats [N, 5]); the loss is [N] or 0-d. ``denominator``, ``divisor``, ``factor``: as in SoftmaxLoss."""
    data = (input, linear_weight, linear_bias, target)
    if torch.compiler.is_exporting() or (torch.compiler.is_compiling() and not any(setting.needs)):  # as softmax_loss
        loss, stats = loss_operator(*data, setting.chunk_size, setting.dtype, setting.total_dtype, *options)
        return differentiable_reduction(loss, denominator, setting.reduction), stats
    loss, stats, *_ = LinearSoftmaxLoss.apply(*data, denominator, divisor, factor, setting, *options)
    return loss, stats


class LinearSoftmaxLoss(torch.autograd.Function):
    """(input, linear_weight, linear_bias, target, denominator, divisor, factor, setting, *options) -> (loss, stats).

    In mode "forward" the gradients of input, weight and bias follow, for the context alone.
    """

    vmap = staticmethod(refuse)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *data, denominator, _, factor, setting = inputs[:_LEADING]
        options = inputs[_LEADING:]
        if setting.gradient == "backward":
            with ops.below_autograd():
                loss, *rest = loss_operator(*data, setting.chunk_size, setting.dtype, setting.total_dtype, *options)
        else:
            loss, *rest = _loss_and_grad(factor.expand(data[0].shape[0]), data, setting, setting.needs, options)
        return (reduce_loss(loss, denominator, setting.reduction), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.setting, options = inputs[_LEADING - 1], inputs[_LEADING:]
        ctx.gradient, ctx.dtypes = ctx.setting.gradient, (inputs[0].dtype, inputs[1].dtype)
        ctx.rows, ctx.options = slice(None), options[4:]
        # As in SoftmaxLoss: differentiable in name, so that differentiating through a gradient meets the refusal.
        kept = len(output) if torch.compiler.is_compiling() else 2
        ctx.mark_non_differentiable(*output[1:kept])
        ctx.set_materialize_grads(False)
        target, denominator, divisor = inputs[3:6]
        if ctx.gradient == "backward":
            divisor = denominator if divisor is None else divisor
            ctx.save_for_backward(*inputs[:4], divisor, *options[:4])
        else:
            ctx.save_for_backward(target, divisor, *output[2:])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        nothing = (None,) * len(ctx.needs_input_grad)
        if grad_output is None or not any(ctx.needs_input_grad):
            return nothing
        if ctx.gradient == "backward":
            grads = _recomputed(ctx, grad_output)
        else:
            grads = kept_gradients(ctx, grad_output, ctx.options[0])
        return (*grads, *nothing[len(grads) :])


LinearSoftmaxLoss.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]


def _loss_and_grad(
    grad_loss: Tensor, data: Any, setting: Setting, needs: tuple[bool, ...], options: tuple[Any, ...]
) -> Any:
    dtypes = (setting.dtype, *setting.grad_dtypes(*data[:2]))
    with ops.below_autograd():
        return loss_and_grad_operator(grad_loss, *data, setting.chunk_size, *dtypes, *needs, *options)


def guarded(grad: Tensor, grad_output: Tensor, *inputs: Tensor | None) -> Tensor:
    """``grad``, which refuses to be differentiated again."""
    tensors = [x for x in (grad_output, *inputs) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return RefuseSecondDerivative.apply(grad, *tensors)
    return grad


def _recomputed(ctx: Any, grad_output: Tensor) -> list[Tensor | None]:
    *data, divisor, weight, bias, margin, sample_weight = ctx.saved_tensors
    upstream = rows_of(grad_output, divisor, ctx.setting.reduction, data[0].shape[0])
    needs = ctx.needs_input_grad[:3]
    options = (weight, bias, margin, sample_weight, *ctx.options)
    _, _, *grads = _loss_and_grad(upstream, data, ctx.setting, needs, options)
    return [guarded(g, grad_output, *data[:3]) if need else None for g, need in zip(grads, needs, strict=True)]


def kept_gradients(ctx: Any, grad_output: Tensor, ignore_index: int) -> list[Tensor | None]:
    """The gradients made in forward, times the upstream scalar; 0 where no row counts, whatever that scalar is.

    ``ctx.rows``: of the targets, those of the input.
    """
    target, divisor, *buffers = take(ctx)
    scale = grad_output if divisor is None else grad_output / divisor
    counted = (target != ignore_index).any()
    grads: list[Tensor | None] = []
    for i, (buffer, need) in enumerate(zip(buffers, ctx.needs_input_grad[:3], strict=True)):
        if not need:
            grads.append(None)
            continue
        grad = own(buffer)
        if i == 0:
            _scale_(grad, scale, target[ctx.rows], ignore_index)
        else:
            _scale_(grad, scale.where(counted, 0.0), None, ignore_index)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(grad)
        grads.append(guarded(grad.to(ctx.dtypes[min(i, 1)]), grad_output, buffer))
    return grads


def _scale_(grad: Tensor, scale: Tensor, target: Tensor | None, ignore_index: int) -> None:
    """Multiplies by a scalar on the device; returns early, without a host sync, when it is 1."""
    rows = grad if grad.dim() == 2 else grad[None]
    if target is None and rows.stride(1) != 1:
        rows = rows.t()
    ops.scale_grad_(rows, scale.to(arithmetic_dtype(grad.dtype)).expand(rows.shape[0]), target, ignore_index)
