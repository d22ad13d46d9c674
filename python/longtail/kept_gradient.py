"""Gradients that are made in forward and kept for backward: how both share what multiplies them, and their one use."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .errors import ArgumentValueError

TOP = 12
"""A kept float16 gradient's largest element is about 2 to this: as far from underflow as the bounds below allow."""

_LARGEST_HALF = 65504.0

Size = Tensor | float
"""A bound of the elements of the gradient of the losses' sum; a number where it does not depend on the data."""


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
        return Shares(torch.ones((), dtype=dtype, device=device) if divisor is None else divisor.reciprocal(), None)
    if not isinstance(size, Tensor):
        size = torch.full((), size, dtype=dtype, device=device)
    # A power of 2, which rounds nothing, and which float32 holds.
    exponent = (TOP - size.masked_fill(size == 0, 1.0).log2()).floor().clamp(-126, 127)
    factor = exponent.exp2()
    return Shares(factor, (1.0 if divisor is None else divisor) * factor)


def function_shares(
    denominator: Tensor | None,
    counted: bool,
    keeps: bool,
    size: Size | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Shares:
    """What our Functions take beside ``denominator``, a tensor of its own or None where that is what divides.

    ``counted``: it counts rows, and is 0 only where all are ignored, whose gradients need no divisor. ``keeps``:
    forward makes the gradient; ``size``: as in :func:`shares`.
    """
    divisor = None if counted else gradient_divisor(denominator)
    return shares(denominator if counted else divisor, size, dtype, device) if keeps else Shares(None, divisor)


def softmax_size(counted: Tensor, finish: dict[str, Any], scale: float, softcap: float) -> Size:
    """The size of float16 gradients over the ``counted`` rows [N]; ``finish``: what :func:`reference.finish` takes.

    Too small, so that they may overflow, only where focal factor and smoothing meet logits that lie thousands of nats
    apart on average.
    """
    smoothing, w_g = finish["label_smoothing"], finish["w_g"]
    smoothed = (1 - smoothing) * w_g
    if smoothing:
        smoothed = smoothed + smoothing * finish["weight_sum"] / finish["num_classes"]
    row = abs(finish["cross_entropy_coefficient"]) * (1 + finish["focal_gamma"]) * smoothed
    row = row + abs(finish["complement_coefficient"]) * (1 + math.log(max(finish["num_classes"], 1))) * w_g
    row = abs(row * finish["v"])
    if finish["z_loss"]:  # of the log-sum-exp, which neither weights nor the number of rows make smaller
        row = row + 2 * abs(finish["z_loss"]) * (softcap or abs(scale) * _LARGEST_HALF)
    row = row * abs(scale)
    return _largest(row, counted) if isinstance(row, Tensor) else row


def sigmoid_size(target: Tensor, num_classes: int, options: tuple[Any, ...]) -> Size:
    """As :func:`softmax_size`, of the sigmoid family; ``options`` as its operators take them."""
    weight, pos_weight, sample_weight, by_target, ignore_index, _, gamma = options
    every = torch.ones((), dtype=torch.bool, device=target.device)
    size: Size = 1 + gamma
    if sample_weight is not None or (by_target and num_classes):
        row = every.float() if sample_weight is None else sample_weight.abs()
        if by_target and num_classes:
            row = row * weight[target.clamp(0, num_classes - 1)].abs()
        size = size * _largest(row, every if target.is_floating_point() else target != ignore_index)
    if pos_weight is not None or (weight is not None and not by_target):
        column = every.float() if weight is None or by_target else weight.abs()
        size = size * _largest(column if pos_weight is None else column * pos_weight.abs().clamp(min=1), every)
    return size


def _largest(values: Tensor, counted: Tensor) -> Tensor:
    """The largest finite one of ``values`` among ``counted``, which broadcast; 0 of none."""
    values, counted = torch.broadcast_tensors(values, counted)
    return values.new_zeros(()) if values.numel() == 0 else values.where(counted & values.isfinite(), 0.0).amax()


def check_overwritable(input: Tensor, gradient: str) -> None:
    """Refuses what torch refuses of every operation in place.

    Raises:
        ValueError: ``gradient`` is "inplace" and ``input`` is a leaf that requires grad, or a view of one.
    """
    if gradient != "inplace" or not (input.requires_grad and torch.is_grad_enabled()):
        return
    if torch.compiler.is_exporting():  # such a graph overwrites nothing
        return
    if input.is_leaf or (input._base is not None and input._base.is_leaf):
        raise ArgumentValueError(
            'gradient="inplace" overwrites input, which is a leaf that requires grad (or a view of one): a parameter, '
            'or what torch.func.grad differentiates in. Expected the result of an operation, or gradient="forward"'
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


def scale_rows_(grad: Tensor, upstream: Tensor, target: Tensor, ignore_index: int | None) -> None:
    """``grad`` [N, C] or [N, C, P] times ``upstream``, [rows] or of its shape; always 0 where ``target`` is ignored."""
    by_row = target.dim() == 1
    if upstream.dim() != grad.dim():
        ops.scale_grad_(grad, upstream, target if by_row else None, -100 if ignore_index is None else ignore_index)
        if by_row:
            return
    else:
        grad.mul_(upstream)
    if ignore_index is not None:
        ignored = target == ignore_index
        if by_row:
            ignored = ignored[:, None] if grad.dim() == 2 else ignored.view(grad.shape[0], 1, grad.shape[2])
        grad.masked_fill_(ignored, 0.0)
