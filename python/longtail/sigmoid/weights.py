"""Weights of elements, in every shape that torch takes: those along the classes are vectors, others stay beside."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..errors import ArgumentValueError
from ..ops.gradient import differentiable_reduction
from ..options import SigmoidOptions


class OverElements(NamedTuple):
    """What broadcasts over the input, and not along its classes alone: passes over the losses of the elements."""

    weight: Tensor | None = None
    pos_weight: Tensor | None = None


NOTHING = OverElements()


def over_elements(options: SigmoidOptions, input: Tensor, dtype: torch.dtype) -> tuple[SigmoidOptions, OverElements]:
    """``options`` whose weights are vectors of classes, and the weights that are none."""
    if options.weight is None and options.pos_weight is None:
        return options, NOTHING
    beside: dict[str, Tensor] = {}
    vectors: dict[str, Any] = {}
    for name in OverElements._fields:
        value = getattr(options, name)
        if value is None:
            continue
        arguments.check_tensors(**{name: value})
        if value.shape == (input.shape[1] if input.dim() > 1 else 1,):
            continue
        vectors[name] = _along_classes(value, input)
        if vectors[name] is None:
            beside[name] = _checked(name, value, input, dtype)
    options = options._replace(**vectors) if vectors else options
    return options, OverElements(**beside) if beside else NOTHING


def _along_classes(value: Tensor, input: Tensor) -> Tensor | None:
    """[C], of a tensor that broadcasts to the input's shape along the classes alone; None of another."""
    shape = value.shape
    shape = torch.Size([1] * (input.dim() - len(shape))) + shape
    num_classes = input.shape[1] if input.dim() > 1 else 1
    beside = shape[:1] + shape[2:]
    if len(shape) > input.dim() or any(n != 1 for n in beside) or shape[1:2] not in ((), (1,), (num_classes,)):
        return None
    return value.reshape(-1).expand(num_classes)


def _checked(name: str, weight: Tensor, input: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight that broadcasts over ``input``."""
    try:
        fits = torch.broadcast_shapes(weight.shape, input.shape) == input.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ArgumentValueError(
            f"{name} has shape {list(weight.shape)}, expected [C] or one that broadcasts to {list(input.shape)}"
        )
    checked = arguments.vector(name, weight, weight.shape, input, dtype)
    assert checked is not None
    return checked.reshape(weight.shape)


def weighted(
    loss: Tensor, weight: Tensor | None, ignored: Tensor | None, denominator: Tensor | None, reduction: str
) -> Tensor:
    """Losses of the elements, in the input's shape, weighted and reduced; 0 of ``ignored`` ones, whatever weighs."""
    loss = loss if weight is None else loss * weight
    if ignored is not None:
        loss = loss.masked_fill(ignored, 0.0)
    if reduction == "rows":
        return loss.sum(1) if loss.dim() > 1 else loss
    return loss if reduction == "none" else differentiable_reduction(loss, denominator, "sum")
