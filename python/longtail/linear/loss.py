"""Projection and loss in one: the logits of a large vocabulary exist a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments
from ..arguments import is_dtensor
from ..errors import ArgumentTypeError, ArgumentValueError
from ..ops.gradient import function_shares
from ..options import GRADIENTS as LOGITS_GRADIENTS
from ..options import Request, RowOptions, SoftmaxOptions
from ..reference.sizes import Size
from ..softmax.loss import check, cross_entropy, kept_size, mean_denominator
from ..softmax.statistics import record
from .autograd import Setting, differentiable_loss
from .chunks import Chunking
from .operators import SOFTMAX, LinearFamily
from .shapes import check_shift, checked_weight, rows_first, targets_of

GRADIENTS = ("auto", *LOGITS_GRADIENTS)

Data = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""input, linear_weight, linear_bias, target"""


def linear_cross_entropy(
    data: Data,
    options: SoftmaxOptions,
    request: Request,
    chunking: Chunking,
    ignores: bool = True,
    shift: bool = False,
) -> Any:
    """The fused linear loss of plain tensors; see :func:`longtail.linear_cross_entropy`.

    ``ignores``: whether users gave an ignore_index.
    """
    input, linear_weight, linear_bias, target = data
    arguments.check_choice("gradient", request.gradient, GRADIENTS)
    logits_shape = check_data(*data)
    if target.shape == logits_shape and ignores:
        raise ArgumentValueError("ignore_index cannot be specified when target contains probabilities")
    if target.shape != logits_shape and linear_weight.dim() == 2:
        return _fused(data, options, request, chunking, shift)
    check_shift(shift)
    if shift:
        raise ArgumentValueError("shift is True, expected False with class probabilities or a K-dimensional weight")
    bias = None if linear_bias is None else linear_bias.flatten()
    chunking.check(logits_dtype(input, linear_weight, linear_bias))
    if target.shape != logits_shape:
        input = _cleared(input, target, logits_shape, options.ignore_index)
    logits = F.linear(input, linear_weight.flatten(0, -2), bias).reshape(logits_shape)
    if input.dim() <= 2:
        return cross_entropy(logits, target, options, request.of_logits())
    lead = input.shape[:-1]
    v = checked_weight(options, lead)
    options = options._replace(sample_weight=None if v is None else v.reshape(-1))
    loss = cross_entropy(logits.flatten(0, -2), target.flatten(0, -2), options, request.of_logits())
    return loss.reshape(lead) if request.reduction == "none" else loss


def check_gathered(name: str, parameter: Tensor) -> None:
    """Refuses what DeepSpeed's ZeRO-3 and FSDP leave of a parameter outside its module."""
    if parameter.shape == (0,):
        raise ArgumentValueError(
            f"{name} is empty (shape [0]), as parameters that ZeRO-3 or FSDP share out are outside the forward of "
            "their module: gather it around the call and the backward, by deepspeed.zero.GatheredParameters, or call "
            "the loss inside the forward of the module that owns it"
        )


def check_data(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> torch.Size:
    """The shape that the logits would have; raises what torch raises."""
    tensors = {"input": input, "linear_weight": linear_weight, "target": target}
    if linear_bias is not None:
        tensors["linear_bias"] = linear_bias
    arguments.check_tensors(**tensors)
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            raise TypeError(
                f"{name} is a DTensor and input is none: make input a DTensor too, so that its placements are known, "
                f"or gather {name} before the call, by {name}.full_tensor() or by unshard() of the FSDP module that "
                "owns it"
            )
    if input.dim() == 0 or (input.dim() > 2 and linear_weight.dim() > 2):
        expected = "1 or 2 with a K-dimensional linear_weight" if input.dim() else "at least 1"
        raise ArgumentValueError(f"expected input with dimensionality {expected}, got {input.dim()}")
    check_gathered("linear_weight", linear_weight)
    if linear_weight.dim() < 2:
        raise ArgumentValueError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise ArgumentValueError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    outputs = linear_weight.shape[:-1]
    if linear_bias is not None and linear_bias.shape != outputs:
        check_gathered("linear_bias", linear_bias)
        raise ArgumentValueError(f"expected linear_bias shape {tuple(outputs)}, got {tuple(linear_bias.shape)}")
    if len(outputs) > 1 and input.dim() == 1:
        raise ArgumentValueError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[0]}), got unbatched input with shape {tuple(input.shape)}"
        )
    return input.shape[:-1] + outputs


def _cleared(input: Tensor, target: Tensor, logits_shape: torch.Size, ignore_index: int) -> Tensor:
    """``input`` (N, D) without the rows that ``ignore_index`` names throughout: their 0 gradients could meet an inf."""
    arguments.check_integer("ignore_index", ignore_index)
    expected = logits_shape[:1] + logits_shape[2:]
    if target.shape != expected:
        raise ArgumentValueError(
            f"target has shape {list(target.shape)}, expected {list(expected)} (class indices) or {list(logits_shape)} "
            "(class probabilities)"
        )
    ignored = arguments.class_indices(target, input) == ignore_index
    return input.masked_fill(ignored.flatten(1).all(1)[:, None], 0.0)


def logits_dtype(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> torch.dtype:
    """The dtype of the GEMMs: the common one, or that of autocast."""
    device_type = input.device.type
    parameters = {"linear_weight": linear_weight} | ({} if linear_bias is None else {"linear_bias": linear_bias})
    known = device_type != "meta"  # torch 2.10 can not trace torch.amp.is_autocast_available
    autocast = known and torch.is_autocast_enabled(device_type) and input.dtype != torch.float64
    for name, parameter in parameters.items():
        arguments.check_device(name, parameter, input)
        if autocast and parameter.is_floating_point() and parameter.dtype != torch.float64:
            continue
        if parameter.dtype != input.dtype:
            raise ArgumentTypeError(f"{name} has dtype {parameter.dtype}, expected {input.dtype} as the input")
    return torch.get_autocast_dtype(device_type) if autocast else input.dtype


def needs_gradients(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> tuple[bool, bool, bool]:
    """Whether input, weight and bias need a gradient."""
    bias = linear_bias is not None and linear_bias.requires_grad
    if not torch.is_grad_enabled():
        return False, False, False
    return input.requires_grad, linear_weight.requires_grad, bias


def check_one_loss(request: Request) -> None:
    """A gradient that is kept needs a mean or a sum."""
    if request.gradient in ("forward", "inplace") and request.reduction == "none":
        raise ValueError(
            f'gradient={request.gradient!r} needs one scalar loss, expected reduction "mean" or "sum", got "none"'
        )


def _fused(data: Data, options: SoftmaxOptions, request: Request, chunking: Chunking, shift: bool) -> Any:
    """Class indices over one set of classes."""
    input, _, _, target = data
    options = check(input, target, options, request.of_logits())
    check_one_loss(request)
    if request.return_stats:
        options = options._replace(entropy=True)
    found = in_chunks(SOFTMAX, data, options, request, chunking, shift, kept_size)
    if not request.return_stats:
        return found.loss
    return found.loss, record(found.stats, found.target.reshape(-1), options.ignore_index, found.target.shape)


class Chunked(NamedTuple):
    loss: Tensor
    """0-d, or of the target's shape."""
    stats: Tensor
    """[N, S]"""
    target: Tensor
    """int64, as the rows have it."""


def in_chunks(
    family: LinearFamily,
    data: Data,
    options: RowOptions,
    request: Request,
    chunking: Chunking,
    shift: bool,
    size: Callable[[Tensor, int, RowOptions], Size],
) -> Chunked:
    """The loss of data that is checked, and of such options. ``size``: see :func:`longtail.softmax.loss.kept_size`."""
    input, linear_weight, linear_bias, target = data
    dtype = logits_dtype(input, linear_weight, linear_bias)
    total_dtype = chunking.check(dtype)
    target, options = targets_of(input, target, input.shape[:-1], options, shift)
    num_classes, wide = linear_weight.shape[0], arguments.arithmetic_dtype(dtype)
    options = options.prepared(input, target.shape, num_classes, wide)
    rows, denominator = target.reshape(-1), None
    if request.reduction == "mean":
        denominator = mean_denominator(request.normalizer, rows, options, num_classes).to(wide)
    needs = needs_gradients(input, linear_weight, linear_bias)
    keeps = any(needs) and request.reduction != "none" and request.gradient != "backward"
    mode = "forward" if keeps else "backward"
    setting = Setting(request.reduction, mode, chunking.size or 0, dtype, total_dtype, needs)
    counts = options.weight is None and request.normalizer is None
    bound = size(rows, num_classes, options) if keeps and dtype == torch.float16 else None
    factor, divisor = function_shares(denominator, counts, keeps, bound, wide, input.device)
    flat = (rows_first(input), linear_weight, linear_bias, rows)
    loss, stats = differentiable_loss(family, flat, denominator, divisor, factor, setting, options)
    return Chunked(loss.reshape(target.shape) if request.reduction == "none" else loss, stats, target)
