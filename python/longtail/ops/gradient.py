"""What the losses' autograd Functions share: reductions, the refusal of second derivatives, and kept gradients.

A kept gradient is made in forward: what multiplies it is shared between forward and backward, and it is used once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import is_exporting
from ..errors import ArgumentValueError
from ..reference.sizes import Size
from . import operators
from .layout import row_count

TOP = 12
"""A kept float16 gradient's largest element is about 2 to this: as far from underflow as the bounds below allow."""


class RefuseSecondDerivative(torch.autograd.Function):
    """Passes a gradient on; differentiating it again raises instead of giving silent zeros."""

    @staticmethod
    def forward(grad: Tensor, *_inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: the backward only raises."""

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> Any:
        raise RuntimeError(
            "longtail: second derivatives of the fused losses are not implemented; the functions of "
            "longtail.reference are plain PyTorch and differentiable twice"
        )


def guarded(grad: Tensor, grad_output: Tensor, *inputs: Tensor | None) -> Tensor:
    """``grad``, which refuses to be differentiated again."""
    if not torch.is_grad_enabled():
        return grad
    tensors = [x for x in (grad_output, *inputs) if x is not None]
    return RefuseSecondDerivative.apply(grad, *tensors) if any(x.requires_grad for x in tensors) else grad


class Shares(NamedTuple):
    """What multiplies a kept gradient in forward, and what divides the upstream gradient in backward; 0-d or None.

    There is always a factor where forward makes the gradient.
    """

    factor: Tensor | None
    divisor: Tensor | None


def gradient_divisor(denominator: Tensor | None) -> Tensor | None:
    """What a mean's gradient is divided by: where the mean is over nothing, all of it is 0."""
    return None if denominator is None else denominator.masked_fill(denominator == 0, torch.inf)


def shares(divisor: Tensor | None, size: Size | None, dtype: torch.dtype, device: torch.device) -> Shares:
    """``divisor``: of the mean's gradient. ``size``: for float16 alone. ``dtype``: of the arithmetic.

    float16 holds the gradient at one size whatever the weights and the number of rows are, and leaves the mean to
    backward, where a gradient scaler multiplies: it neither overflows nor underflows where eager float16 does not.
    """
    if size is None:
        factor = torch.ones((), dtype=dtype, device=device) if divisor is None else divisor.to(dtype).reciprocal()
        return Shares(factor, None)
    # A power of 2, which rounds nothing, and which float32 holds.
    if not isinstance(size, Tensor):
        if not torch.compiler.is_compiling():
            number = 2.0 ** math.floor(min(max(TOP - math.log2(size), -126), 127)) if size > 0 else 1.0
            factor = torch.full((), number, dtype=dtype, device=device)
            return Shares(factor, factor if divisor is None else divisor * factor)
        size = torch.full((), size, dtype=dtype, device=device)
    factor = (TOP - size.log2()).floor().clamp(-126, 127).exp2()
    return Shares(factor, factor if divisor is None else divisor * factor)


def function_shares(
    denominator: Tensor | None,
    counted: bool,
    keeps: bool,
    size: Size | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Shares:
    """What our Functions take beside ``denominator``, a tensor of its own or None where that is what divides.

    ``counted``: it is 0 only where all rows are ignored, whose gradients need no divisor. ``keeps``:
    forward makes the gradient; ``size``: as in :func:`shares`.
    """
    divisor = None if counted else gradient_divisor(denominator)
    return shares(denominator if counted else divisor, size, dtype, device) if keeps else Shares(None, divisor)


def check_overwritable(input: Tensor, gradient: str) -> None:
    """Refuses what torch refuses of every operation in place.

    Raises:
        ValueError: ``gradient`` is "inplace" and ``input`` is a leaf that requires grad, or a view of one.
    """
    if gradient != "inplace" or not (input.requires_grad and torch.is_grad_enabled()):
        return
    if is_exporting():  # such a graph overwrites nothing
        return
    if input.is_leaf or (input._base is not None and input._base.is_leaf):
        raise ArgumentValueError(
            'gradient="inplace" overwrites input, which is a leaf that requires grad (or a view of one): a parameter, '
            'or what torch.func.grad differentiates in. Expected the result of an operation, or gradient="backward"'
        )


def take(ctx: Any) -> tuple[Tensor, ...]:
    """The tensors that ``ctx`` saved for the one backward that it serves.

    Counted on the context: hooks on saved tensors hand out tensors whose versions say nothing.

    Raises:
        RuntimeError: there has been one before, or the logits were overwritten since.
    """
    text = (
        f"longtail: gradient={ctx.gradient!r} (the fused linear loss's default too) keeps one gradient, which has been "
        "handed out or overwritten: backward can run once, and logits overwritten in place can not be changed before "
        'it. Use gradient="backward" to keep the graph'
    )
    if getattr(ctx, "spent", False):
        raise RuntimeError(text)
    try:
        saved = tuple(ctx.saved_tensors)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # such as of memory, by a hook
            raise
        raise RuntimeError(text) from error
    if not torch.compiler.is_compiling():
        ctx.spent = True
    return saved


def own(buffer: Tensor) -> Tensor:
    """A kept gradient to be multiplied in place, without its history: in place, the logits themselves.

    A copy under torch.compile, whose graphs may run backward again, and which drops copies that nobody needs.
    """
    return buffer.clone() if torch.compiler.is_compiling() else buffer.detach()


def _scale_kept_(grad: Tensor, upstream: Tensor, target: Tensor, ignore_index: int | None) -> None:
    """``grad`` [N, C] or [N, C, P] times ``upstream``, [rows] or of its shape; always 0 where ``target`` is ignored."""
    by_row = target.dim() == 1
    if upstream.dim() != grad.dim():
        operators.scale_grad_(
            grad, upstream, target if by_row else None, -100 if ignore_index is None else ignore_index
        )
        if by_row:
            return
    else:
        grad.mul_(upstream)
    if ignore_index is not None:
        ignored = target == ignore_index
        if by_row:
            ignored = ignored[:, None] if grad.dim() == 2 else ignored.view(grad.shape[0], 1, grad.shape[2])
        grad.masked_fill_(ignored, 0.0)


def reduce_loss(loss: Tensor, denominator: Tensor | None, reduction: str) -> Tensor:
    """Losses as they are, or for "sum" and "mean" their sum, over ``denominator`` where there is one."""
    if reduction not in ("sum", "mean"):
        return loss
    return loss.sum() if denominator is None else loss.sum() / denominator


def in_one_launch(x: Tensor) -> bool:
    """Whether a mean is an operator of its own: the CPU is quicker without, and torch.compile joins its steps."""
    return not x.is_cpu and not torch.compiler.is_compiling()


def differentiable_reduction(loss: Tensor, denominator: Tensor | None, reduction: str) -> Tensor:
    """:func:`reduce_loss` for autograd to differentiate: a mean over nothing has the gradient 0, not 0 / 0."""
    if denominator is None:
        return reduce_loss(loss, None, reduction)
    total, empty = loss.sum(), denominator == 0
    return torch.where(empty, total.detach() / denominator, total / denominator.masked_fill(empty, 1))


def rows_of(grad_output: Tensor, divisor: Tensor | None, reduction: str, rows: int) -> Tensor:
    """The upstream gradient of each row loss, [N]; of stride 0 where the loss was reduced."""
    upstream = grad_output if divisor is None else grad_output / divisor
    return upstream.expand(rows) if reduction in ("sum", "mean") else upstream


def scaled_gradient(ctx: Any, grad_output: Tensor, ignore_index: int | None) -> Tensor:
    """The gradient made in forward, times the upstream gradient, in place."""
    buffer, target, divisor = take(ctx)
    grad = own(buffer)
    upstream = rows_of(grad_output, divisor, ctx.reduction, row_count(grad))
    _scale_kept_(grad, upstream, target, ignore_index)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(grad)
    return guarded(grad, grad_output, buffer)
