"""Fused linear losses under autograd, for their two gradient modes.

"forward": the gradients are made with the loss, in three GEMMs, and kept; backward multiplies them by the upstream
scalar, which costs a scalar read when it is 1. "backward": forward keeps nothing but its inputs (one GEMM), backward
makes the logits again (three more): any upstream gradient, any number of times.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype, is_exporting
from ..ops import formulas, operators
from ..ops.autograd import SIGNATURE
from ..ops.gradient import differentiable_reduction, guarded, own, reduce_loss, rows_of, take
from ..ops.vmap import refuse_vmap
from ..options import HierarchicalOptions, SoftmaxOptions
from .operators import HIERARCHICAL, SOFTMAX, LinearFamily


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


def differentiable_loss(
    family: LinearFamily,
    data: tuple[Tensor, Tensor, Tensor | None, Tensor],  # input [N, D], linear_weight [C, D], linear_bias, target [N]
    denominator: Tensor | None,
    divisor: Tensor | None,
    factor: Tensor | None,
    setting: Setting,
    options: SoftmaxOptions | HierarchicalOptions,
) -> tuple[Tensor, Tensor]:
    """(loss, stats [N, S]); the loss is [N] or 0-d. ``denominator``, ``divisor``, ``factor``: as of all Functions."""
    vectors, others = options.parted()
    if is_exporting() or (torch.compiler.is_compiling() and not any(setting.needs)):
        loss, stats = family.loss(*data, setting.chunk_size, setting.dtype, setting.total_dtype, *vectors, *others)
        return differentiable_reduction(loss, denominator, setting.reduction), stats
    constants = (family, setting, options.ignore_index, others)
    loss, stats, *_ = LinearLoss.apply(*data, denominator, divisor, factor, *vectors, constants)
    return loss, stats


class LinearLoss(torch.autograd.Function):
    """(input, linear_weight, linear_bias, target, denominator, divisor, factor, *vectors, constants) -> (loss, stats).

    In mode "forward" the gradients of input, weight and bias follow, for the context alone.
    """

    vmap = staticmethod(refuse_vmap)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        x, linear_weight, bias, target, denominator, _, factor, *vectors, (family, setting, _, others) = inputs
        data, options = (x, linear_weight, bias, target), (*vectors, *others)
        if setting.gradient == "backward":
            with operators.below_autograd():
                loss, *rest = family.loss(*data, setting.chunk_size, setting.dtype, setting.total_dtype, *options)
        else:
            upstream = factor.expand(x.shape[0])
            loss, *rest = _loss_and_grad(family, upstream, data, None, setting, setting.needs, options)
        return (reduce_loss(loss, denominator, setting.reduction), *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, linear_weight, bias, target, denominator, divisor, _, *vectors, constants = inputs
        ctx.family, ctx.setting, ctx.ignore_index, ctx.options = constants
        ctx.gradient, ctx.dtypes, ctx.rows = ctx.setting.gradient, (x.dtype, linear_weight.dtype), slice(None)
        # As of all Functions: differentiable in name, so that differentiating through a gradient meets the refusal.
        kept = len(output) if torch.compiler.is_compiling() else 2
        ctx.mark_non_differentiable(*output[1:kept])
        ctx.set_materialize_grads(False)
        if ctx.gradient == "backward":
            divisor = denominator if divisor is None else divisor
            ctx.save_for_backward(x, linear_weight, bias, target, output[1], divisor, *vectors)
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
            grads = kept_gradients(ctx, grad_output, ctx.ignore_index)
        return (*grads, *nothing[len(grads) :])


LinearLoss.forward.__signature__ = SIGNATURE  # type: ignore[attr-defined]


def _loss_and_grad(
    family: LinearFamily,
    grad_loss: Tensor,
    data: Any,
    stats: Tensor | None,
    setting: Setting,
    needs: tuple[bool, ...],
    options: tuple[Any, ...],
) -> Any:
    dtypes = (setting.dtype, *setting.grad_dtypes(*data[:2]))
    with operators.below_autograd():
        return family.loss_and_grad(grad_loss, *data, stats, setting.chunk_size, *dtypes, *needs, *options)


def _recomputed(ctx: Any, grad_output: Tensor) -> list[Tensor | None]:
    x, linear_weight, bias, target, stats, divisor, *vectors = ctx.saved_tensors
    upstream = rows_of(grad_output, divisor, ctx.setting.reduction, x.shape[0])
    data, needs = (x, linear_weight, bias, target), ctx.needs_input_grad[:3]
    options = (*vectors, *ctx.options)
    _, _, *grads = _loss_and_grad(ctx.family, upstream, data, stats, ctx.setting, needs, options)
    return [
        guarded(grad, grad_output, x, linear_weight, bias) if need else None
        for grad, need in zip(grads, needs, strict=True)
    ]


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
            _scale_by_scalar_(grad, scale, target[ctx.rows], ignore_index)
        else:
            _scale_by_scalar_(grad, scale.where(counted, 0.0), None, ignore_index)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(grad)
        grads.append(guarded(grad.to(ctx.dtypes[min(i, 1)]), grad_output, buffer))
    return grads


def _scale_by_scalar_(grad: Tensor, scale: Tensor, target: Tensor | None, ignore_index: int) -> None:
    """Multiplies by a scalar on the device; returns early, without a host sync, when it is 1."""
    rows = grad if grad.dim() == 2 else grad[None]
    if target is None and rows.stride(1) != 1:
        rows = rows.t()
    operators.scale_grad_(rows, scale.to(arithmetic_dtype(grad.dtype)).expand(rows.shape[0]), target, ignore_index)


def _formula(family: LinearFamily, needs: Any, grad_loss: Tensor, _stats: None, *arguments: Any) -> formulas.Gradients:
    x, linear_weight, bias, target, chunk_size, dtype, total_dtype, *options = arguments
    dtypes = (dtype, total_dtype, x.dtype, linear_weight.dtype)
    data = (x, linear_weight, bias, target)
    _, _, *grads = family.loss_and_grad(grad_loss, *data, None, chunk_size, *dtypes, *needs[:3], *options)
    return grads


formulas.register("linear_softmax_loss", 0, functools.partial(_formula, SOFTMAX))
formulas.register("linear_hierarchical_loss", 0, functools.partial(_formula, HIERARCHICAL))
