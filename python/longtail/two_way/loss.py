"""From checked arguments to the operators of ZLPR and the two-way loss: layouts and denominators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import arguments
from ..arguments import arithmetic_dtype
from ..ops import operators
from ..ops.autograd import differentiable_loss, direct_loss
from ..options import Request, TwoWayOptions
from ..reference import two_way
from ..sigmoid.loss import Layout, checked_elements, lay_out
from .autograd import TWO_WAY, TwoWayLoss


def _lay_out(input: Tensor, target: Tensor) -> Layout:
    """As the sigmoid family, but for targets (C,) of logits (C,), which are one row."""
    if input.dim() == 1 and target.shape == input.shape:
        return lay_out(input.unsqueeze(0), target.unsqueeze(0))._replace(rows=torch.Size())
    return lay_out(input, target)


def _denominator(
    normalizer: str | float | Tensor | None, at: Layout, y: Tensor, options: TwoWayOptions, dtype: torch.dtype
) -> Tensor:
    """What a mean divides by, 0-d: int64 where rows are counted, else of ``dtype``."""
    given = arguments.given_normalizer(normalizer, y.device, dtype)
    if given is not None:
        return given.to(dtype)
    ignored = options.ignore_index
    if not at.dense:
        counted = operators.mean_denominator(y, None, -100 if ignored is None else ignored, at.logits.shape[1])
    elif options.joint:
        if ignored is not None and ignored > 0:
            y = y.masked_fill(y == ignored, 0.0)
        largest = y.amax(1) if y.shape[1] > 0 else y.new_zeros(())  # nothing of the targets' size is made
        counted = (~(largest <= 0)).sum()
    else:
        counted = torch.full((), math.prod(at.rows), device=y.device)
    return counted if normalizer is None else counted.clamp(min=1)


def _at_once(at: Layout, options: TwoWayOptions, request: Request) -> bool:
    """Whether one operator makes the whole mean, and its denominator, unless it finds a target out of bounds."""
    plain = request.reduction == "mean" and request.gradient == "backward"
    counts = request.normalizer is None or isinstance(request.normalizer, str)
    known = not at.dense or options.ignore_index is None
    return plain and counts and known and operators.direct(at.logits, at.target, *options)


def two_way_loss(input: Tensor, target: Tensor, options: TwoWayOptions, request: Request) -> Tensor:
    """Both losses. Everything is checked here; see :func:`longtail.two_way_loss`."""
    arguments.check_tensors(input=input, target=target)
    for name, given in (("input", input), ("target", target)):
        if arguments.is_dtensor(given):  # of whose classes a rank may have a part
            raise TypeError(f"{name} is a DTensor, expected whole rows in a plain tensor: {name}.full_tensor()")
    arguments.check_logits(input)
    dtype = arithmetic_dtype(input.dtype)
    request.check(dtype)
    options = options.checked(dtype)
    at = _lay_out(input, target)
    options = options.prepared(input, at.rows, at.logits.shape[1], dtype, at.dense)
    if _at_once(at, options, request):
        try:
            data = at.logits, at.target
            loss: Tensor = direct_loss(TWO_WAY, data, options, "mean", None, None, (request.normalizer == "count",))
            return loss
        except IndexError:
            if not at.dense:
                raise
    y = checked_elements(target, at.target, options.ignore_index) if at.dense else at.target
    denominator = None
    if request.reduction == "mean":
        denominator = _denominator(request.normalizer, at, y, options, dtype)
    loss, _ = differentiable_loss(
        *(TwoWayLoss, TWO_WAY, input, (at.logits, y), options, request.reduction, request.gradient),
        denominator=denominator,
        counts=denominator is not None and not denominator.is_floating_point(),
        size=lambda: two_way.gradient_size(y, options),
    )
    return loss.reshape(at.rows) if request.reduction == "none" else loss
