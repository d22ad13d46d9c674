"""The fused linear loss under autograd, for its two gradient modes.

"forward": the gradients are made with the loss, in three GEMMs, and kept; backward multiplies them by the upstream
scalar, which costs a scalar read when it is 1. "backward": forward keeps nothing but its inputs (one GEMM), backward
makes the logits again (three more): any upstream gradient, any number of times.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .autograd import RefuseSecondDerivative, reduce_loss, rows_of
from .linear_chunks import arithmetic_dtype
from .linear_softmax_loss import loss_and_grad_operator, loss_operator

# Inputs of LinearSoftmaxLoss that precede the options of the operators.
_LEADING = 6


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

    def folds(self, denominator: Tensor | None) -> bool:
        """Whether the mean is in the gradients that forward makes: in float16 it can underflow before a loss scale."""
        return denominator is not None and self.dtype != torch.float16

    def weight_grad_dtype(self, linear_weight: Tensor) -> torch.dtype:
        """Gradients that are yet to be multiplied in backward are rounded there."""
        waits = self.gradient == "forward" and self.dtype == torch.float16
        return self.total_dtype if waits else linear_weight.dtype


def linear_softmax_loss(
    input: Tensor,  # [N, D]
    linear_weight: Tensor,  # [C, D]
    linear_bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64
    denominator: Tensor | None,
    setting: Setting,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """(loss, stats [N, 5]); the loss is [N] or 0-d, divided by ``denominator`` where there is one."""
    data = (input, linear_weight, linear_bias, target)
    if any(setting.needs) or not torch.compiler.is_compiling():
        loss, stats, *_ = LinearSoftmaxLoss.apply(*data, denominator, setting, *options)
        return loss, stats
    # torch.compile passes a context to the Function's forward where nothing requires grad
    loss, stats = loss_operator(*data, setting.chunk_size, setting.dtype, *options)
    return reduce_loss(loss, denominator, setting.reduction), stats


class LinearSoftmaxLoss(torch.autograd.Function):
    """(input, linear_weight, linear_bias, target, denominator, setting, *options) -> (loss, stats[, gradients]).

    The three gradients, of input, weight and bias, are for the context alone.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        *data, denominator, setting = inputs[:_LEADING]
        options = inputs[_LEADING:]
        if setting.gradient == "backward":
            loss, *rest = loss_operator(*data, setting.chunk_size, setting.dtype, *options)
        else:
            factor = torch.ones((), dtype=arithmetic_dtype(setting.dtype), device=data[0].device)
            if setting.folds(denominator):
                factor = factor / denominator
            loss, *rest = _loss_and_grad(factor.expand(data[0].shape[0]), data, setting, setting.needs, options)
        return (reduce_loss(loss, denominator, setting.reduction), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.setting, options = inputs[_LEADING - 1], inputs[_LEADING:]
        ctx.weight_dtype, ctx.options = inputs[1].dtype, options[4:]
        # As in SoftmaxLoss: differentiable in name, so that differentiating through a gradient meets the refusal.
        kept = len(output) if torch.compiler.is_compiling() else 2
        ctx.mark_non_differentiable(*output[1:kept])
        ctx.set_materialize_grads(False)
        if ctx.setting.gradient == "backward":
            ctx.save_for_backward(*inputs[: _LEADING - 1], *options[:4])
        else:
            ctx.save_for_backward(inputs[4], *output[2:])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
        nothing = (None,) * len(ctx.needs_input_grad)
        if grad_output is None or not any(ctx.needs_input_grad):
            return nothing
        grads = (_recomputed if ctx.setting.gradient == "backward" else kept_gradients)(ctx, grad_output)
        return (*grads, *nothing[len(grads) :])


# As in SoftmaxLoss: what Function.apply binds arguments against at every call.
LinearSoftmaxLoss.forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)]
)


def _loss_and_grad(
    grad_loss: Tensor, data: Any, setting: Setting, needs: tuple[bool, ...], options: tuple[Any, ...]
) -> Any:
    dtypes = (setting.dtype, setting.total_dtype, setting.weight_grad_dtype(data[1]))
    return loss_and_grad_operator(grad_loss, *data, setting.chunk_size, *dtypes, *needs, *options)


def guarded(grad: Tensor, grad_output: Tensor, *inputs: Tensor | None) -> Tensor:
    """``grad``, which refuses to be differentiated again."""
    tensors = [x for x in (grad_output, *inputs) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return RefuseSecondDerivative.apply(grad, *tensors)
    return grad


def _recomputed(ctx: Any, grad_output: Tensor) -> list[Tensor | None]:
    *data, denominator, weight, bias, margin, sample_weight = ctx.saved_tensors
    upstream = rows_of(grad_output, denominator, ctx.setting.reduction, data[0].shape[0])
    needs = ctx.needs_input_grad[:3]
    options = (weight, bias, margin, sample_weight, *ctx.options)
    _, _, *grads = _loss_and_grad(upstream, data, ctx.setting, needs, options)
    return [guarded(g, grad_output, *data[:3]) if need else None for g, need in zip(grads, needs, strict=True)]


def kept_gradients(ctx: Any, grad_output: Tensor) -> list[Tensor | None]:
    try:
        denominator, *buffers = ctx.saved_tensors
    except RuntimeError as error:
        raise RuntimeError(
            'longtail: gradient="forward" keeps one buffer of each gradient, which has been handed out: backward can '
            'run once. Use gradient="backward" to keep the graph'
        ) from error
    scale = grad_output
    if denominator is not None and not ctx.setting.folds(denominator):
        scale = grad_output / denominator
    grads: list[Tensor | None] = []
    for i, (buffer, need) in enumerate(zip(buffers, ctx.needs_input_grad[:3], strict=True)):
        if not need:
            grads.append(None)
            continue
        grad = buffer.detach()
        _scale_(grad, scale)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(grad)
        if i > 0:
            grad = grad.to(ctx.weight_dtype)
        grads.append(guarded(grad, grad_output, buffer))
    return grads


def _scale_(grad: Tensor, scale: Tensor) -> None:
    """Multiplies by a scalar on the device; returns early, without a host sync, when it is 1."""
    rows = grad if grad.dim() == 2 else grad[None]
    if rows.stride(1) != 1:
        rows = rows.t()
    ops.scale_grad_(rows, scale.to(arithmetic_dtype(grad.dtype)).expand(rows.shape[0]), None, -100)
