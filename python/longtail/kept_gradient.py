"""Gradients that are made in forward and kept for backward: how both share what multiplies them, and their one use."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .errors import ArgumentValueError

TOP = 2.0**12
"""About the largest element of a kept float16 gradient: as far from underflow as the bounds below allow."""

_LARGEST_HALF = 65504.0


class Shares(NamedTuple):
    """What multiplies a kept gradient in forward, and what divides the upstream gradient in backward; 0-d or None."""

    factor: Tensor | None
    divisor: Tensor | None


def gradient_divisor(denominator: Tensor | None) -> Tensor | None:
    """What a mean's gradient is divided by: where the mean is over nothing, all of it is 0."""
    return None if denominator is None else denominator.masked_fill(denominator == 0, torch.inf)


def shares(divisor: Tensor | None, size: Tensor | None) -> Shares:
    """``divisor``: of the mean's gradient. ``size``: for float16 alone, a bound of the gradient of the losses' sum.

    float16 holds the gradient at one size whatever the weights and the number of rows are, and leaves the mean to
    backward, where a gradient scaler multiplies: it neither overflows nor underflows where eager float16 does not.
    """
    if size is None:
        return Shares(None if divisor is None else divisor.reciprocal(), None)
    factor = (TOP / size.masked_fill(size == 0, 1.0)).log2().floor().exp2()  # a power of 2, which rounds nothing
    return Shares(factor, (1.0 if divisor is None else divisor) * factor)


def softmax_size(counted: Tensor, finish: dict[str, Any], scale: float, softcap: float) -> Tensor:
    """A bound of the elements of the gradient of float16 logits, 0-d, over the ``counted`` rows [N].

    ``finish``: what :func:`longtail.reference.finish` takes. The bound is several times too small only where focal
    factor and smoothing meet logits that lie a hundred nats apart on average.
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
    return _largest(torch.ones((), device=counted.device) * (row * abs(scale)), counted)


def sigmoid_size(target: Tensor, num_classes: int, options: tuple[Any, ...]) -> Tensor:
    """As :func:`softmax_size`, of the sigmoid family; ``options`` as its operators take them."""
    weight, pos_weight, sample_weight, by_target, ignore_index, _, gamma = options
    one = torch.ones((), device=target.device)
    row = one if sample_weight is None else sample_weight.abs()
    if by_target and num_classes:
        row = row * weight[target.clamp(0, num_classes - 1)].abs()
    column = one if weight is None or by_target else weight.abs()
    if pos_weight is not None:
        column = column * pos_weight.abs().clamp(min=1)
    counted = one.bool() if target.is_floating_point() else target != ignore_index
    return _largest(row, counted) * _largest(column, one.bool()) * (1 + gamma)


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
    if torch.compiler.is_compiling():
        refused = input.is_leaf and not torch.compiler.is_exporting()  # an exported graph overwrites nothing
    else:
        refused = input.is_leaf or (input._is_view() and input._base is not None and input._base.is_leaf)
    if refused:
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
        f"longtail: gradient={ctx.gradient!r} keeps one gradient, which has been handed out or overwritten: backward "
        'can run once, and logits overwritten in place can not be changed before it. Use gradient="backward" to keep '
        "the graph"
    )
    if not torch.compiler.is_compiling():
        if getattr(ctx, "spent", False):
            raise RuntimeError(text)
        ctx.spent = True
    try:
        return tuple(ctx.saved_tensors)
    except RuntimeError as error:
        raise RuntimeError(text) from error


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
