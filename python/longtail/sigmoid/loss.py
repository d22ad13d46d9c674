"""From checked arguments to the operators: layouts, denominators and shapes of the sigmoid family."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..arguments import arithmetic_dtype
from ..errors import ArgumentTypeError, ArgumentValueError
from ..ops import layout, operators
from ..ops.autograd import differentiable_loss, direct_loss
from ..options import Request, SigmoidOptions
from ..reference import sigmoid
from .autograd import SIGMOID, SigmoidLoss
from .weights import NOTHING, OverElements, over_elements, weighted

REDUCTIONS = ("mean", "sum", "none", "rows")
NORMALIZERS = ("elements", "rows", "positives")


class Layout(NamedTuple):
    """Logits [N, C] or [N, C, P], targets [rows] or of the logits' shape, and the shapes that results go back to."""

    logits: Tensor
    target: Tensor
    shape: torch.Size
    rows: torch.Size
    dense: bool
    """Whether there is a target for each element, not a class for each row. No property: torch 2.10 traces none."""

    def restore(self, loss: Tensor) -> Tensor:
        """Losses of the elements in the input's shape."""
        if self.logits.dim() == 3 or len(self.shape) <= 2:
            return loss.reshape(self.shape)
        return loss.reshape(self.shape[0], *self.shape[2:], self.shape[1]).movedim(-1, 1)


def lay_out(input: Tensor, target: Tensor) -> Layout:
    """Class indices have the input's shape without the classes; a target of the input's shape is one per element."""
    if input.shape != target.shape:
        rows = layout.rows(input, target)
        return Layout(rows.logits, rows.target, input.shape, rows.shape, False)
    arguments.check_device("target", target, input)
    if target.is_complex():
        raise ArgumentTypeError(f"target has dtype {target.dtype}, expected a real one")
    if target.requires_grad and torch.is_grad_enabled():
        raise ArgumentValueError("target requires grad, but the loss is not differentiable in it: pass target.detach()")
    wide = arithmetic_dtype(input.dtype)
    if target.dtype not in (input.dtype, wide):
        target = target.to(wide)
    if input.dim() <= 1 or input.shape[1] == 1:  # one class: all rows are pixels of one image
        flat = input.reshape(1, 1, -1).contiguous(), target.reshape(1, 1, -1).contiguous()
        return Layout(*flat, input.shape, input.shape[:1] + input.shape[2:], True)
    logits = layout.laid_out(input)
    if logits.dim() == 3:
        target = layout.laid_out(target.contiguous())
    elif input.dim() > 2:
        target = target.movedim(1, -1).flatten(0, -2)
    return Layout(logits, layout.laid_out(target), input.shape, input.shape[:1] + input.shape[2:], True)


def checked_elements(target: Tensor, y: Tensor, ignore_index: int | None) -> Tensor:
    """Targets of elements, ``y`` as they are laid out, lie in [0, 1] or are ignored; NaN makes a loss of NaN.

    What rounding puts beside [0, 1], where a focal factor would be NaN, counts as 0 or 1. On a GPU only integers are
    looked at, by an assertion on the device: of floats it would cost a third of the loss.
    """
    on_gpu = y.device.type == "cuda" and not target.is_floating_point()
    if target.dtype == torch.bool or y.numel() == 0 or torch.compiler.is_compiling():
        return y
    if not on_gpu and y.device.type != "cpu":
        return y
    if operators.direct(y) and operators.dense_targets_fit(y, ignore_index):
        return y
    counted = y.masked_fill(y == ignore_index, 0.0) if on_gpu and ignore_index is not None else y
    low, high = counted.aminmax()
    if on_gpu:
        torch._assert_async((low >= 0) & (high <= 1), "longtail: a target is not in [0, 1]")
        return y
    try:
        fits = low.item() >= 0 and high.item() <= 1  # not of NaN, beside which another may be bad
    except RuntimeError:  # what is traced has no values
        return y
    if fits:
        return y
    given = target.to(y.dtype)
    slack = max(arguments.ROUNDING, torch.finfo(target.dtype).eps) if target.is_floating_point() else 0.0
    bad = (given < -slack) | (given > 1 + slack)
    if ignore_index is not None:
        bad &= given != ignore_index
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise ArgumentValueError(
            f"target {target[tuple(place)].item()} at index {place} is out of bounds: expected 0 <= target <= 1"
            + ("" if ignore_index is None else f" or ignore_index {ignore_index}")
        )
    clamped = y.clamp(0, 1)
    return clamped if ignore_index is None else torch.where(y == ignore_index, y, clamped)


def _denominator(
    normalizer: str | float | Tensor | None,
    at: Layout,
    target: Tensor,
    ignore_index: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """What a mean divides by, 0-d: int64 where it is counted, else of ``dtype``."""
    device = at.logits.device
    given = arguments.given_normalizer(normalizer, device, dtype)
    if given is not None:
        return given.to(dtype)
    if not at.dense:
        num_classes = at.logits.shape[1]
        counted = operators.mean_denominator(target, None, -100 if ignore_index is None else ignore_index, num_classes)
        return counted.clamp(min=1) if normalizer in ("rows", "positives") else counted * num_classes
    if normalizer == "rows":
        return torch.full((), max(math.prod(at.rows), 1), dtype=dtype, device=device)
    if normalizer == "positives":
        total = target.sum(dtype=torch.float64)
        if ignore_index is not None:
            total = total - ignore_index * (target == ignore_index).sum()
        return total.clamp(min=1).to(dtype)
    if ignore_index is not None:
        return (target != ignore_index).sum()
    return torch.full((), target.numel(), dtype=dtype, device=device)


def _at_once(at: Layout, options: SigmoidOptions, request: Request) -> bool:
    """Whether one operator makes the whole mean, and its denominator, unless it finds a target out of bounds."""
    normalizer = request.normalizer
    plain = request.reduction == "mean" and request.gradient == "backward"
    counts = normalizer is None or isinstance(normalizer, str)
    known = not at.dense or (options.ignore_index is None and normalizer != "positives")
    return plain and counts and known and operators.direct(at.logits, at.target, *options)


def sigmoid_loss(input: Tensor, target: Tensor, options: SigmoidOptions, request: Request) -> Tensor:
    """The whole family. Everything is checked here; see :func:`longtail.sigmoid_focal_loss`."""
    arguments.check_tensors(input=input, target=target)
    arguments.check_logits(input)
    dtype = arithmetic_dtype(input.dtype)
    request.check(dtype, REDUCTIONS, NORMALIZERS)
    options = options.checked(dtype)
    at = lay_out(input, target)
    given = options
    options, over = over_elements(options, input, dtype) if at.dense else (options, NOTHING)
    if over.pos_weight is not None and input.dtype != dtype:  # two gradients, rounded once they are added
        return sigmoid_loss(input.to(dtype), target, given, request)
    num_classes = at.logits.shape[1]
    options = options.prepared(input, at.rows, num_classes, dtype, at.dense)
    if over is NOTHING and _at_once(at, options, request):
        try:
            data, by_rows = (at.logits, at.target), request.normalizer in ("rows", "positives")
            return direct_loss(SIGMOID, data, options, "mean", None, None, (by_rows,))
        except IndexError:
            if not at.dense:
                raise
    y = checked_elements(target, at.target, options.ignore_index) if at.dense else at.target
    denominator = None
    if request.reduction == "mean":
        denominator = _denominator(request.normalizer, at, y, options.ignore_index, dtype)
    if over is not NOTHING:
        return _of_elements(input, at, y, options, over, request, denominator)
    (loss,) = _differentiable(input, at, y, options, request, denominator)
    if request.reduction == "none":
        return at.restore(loss)
    return loss.reshape(at.rows) if request.reduction == "rows" else loss


def _differentiable(
    input: Tensor, at: Layout, y: Tensor, options: SigmoidOptions, request: Request, denominator: Tensor | None
) -> tuple[Any, ...]:
    reduction = "elements" if request.reduction == "none" else request.reduction
    return differentiable_loss(
        *(SigmoidLoss, SIGMOID, input, (at.logits, y), options, reduction, request.gradient),
        denominator=denominator,
        counts=request.normalizer is None or isinstance(request.normalizer, str),
        size=lambda: sigmoid.gradient_size(y, at.logits.shape[1], options),
        outputs=(reduction == "elements",),
    )


def _of_elements(
    input: Tensor,
    at: Layout,
    y: Tensor,
    options: SigmoidOptions,
    over: OverElements,
    request: Request,
    denominator: Tensor | None,
) -> Tensor:
    """Losses of elements, each times its own weight, reduced; a ``pos_weight`` of each takes the loss twice."""
    found, ignored = partial(_differentiable, input, at, y, denominator=None), options.ignore_index
    if over.pos_weight is None:
        (loss,) = found(options, Request("none", None, request.gradient))
        loss = at.restore(loss)
    else:
        # An affine function of pos_weight: at 0 the negative terms are left, beside so large a number they are lost.
        dtype = arithmetic_dtype(input.dtype)
        large, ones = 2.0 ** (300 if dtype == torch.float64 else 40), input.new_ones(at.logits.shape[1], dtype=dtype)
        rest, positive = (
            at.restore(found(options._replace(pos_weight=ones * x), Request("none"))[0]) for x in (0.0, large)
        )
        target = at.restore(y)
        target = target + options.label_smoothing * (0.5 - target)
        negative = target == 0  # of which no weight says anything, in value or gradient, even if it is infinite
        terms = torch.where(negative, 1.0, over.pos_weight) * (positive / large)
        loss = rest.masked_fill(target == 1, 0.0) + torch.where(negative, 0.0, terms)
    everywhere = None if ignored is None else at.restore(y == ignored)
    return weighted(loss, over.weight, everywhere, denominator, request.reduction)
