"""Projection and loss in one: the logits of a large vocabulary exist a chunk of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments
from .distributed import is_dtensor
from .errors import ArgumentTypeError, ArgumentValueError
from .functional import check_options, cross_entropy
from .kept_gradient import function_shares
from .linear_autograd import Setting, linear_softmax_loss
from .linear_chunks import arithmetic_dtype
from .softmax_loss import kept_size, mean_denominator, operator_options, row_stats

GRADIENTS = ("auto", *arguments.GRADIENTS)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    complement_gamma: float = 0.0,
    class_bias: Tensor | None = None,
    class_margin: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    sample_weight: Tensor | None = None,
    normalizer: str | float | Tensor | None = None,
    gradient: str = "auto",
    chunk_size: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    return_stats: bool = False,
) -> Any:
    r"""``cross_entropy(input @ linear_weight.T + linear_bias, target, ...)`` without ever holding the logits.

    With torch's own arguments this is :func:`torch.nn.functional.linear_cross_entropy`, value, gradients, shapes and
    errors; the loss is float32 for half inputs. Exact: no gradient is filtered. Rows go in chunks: their logits are
    made by the vendor's GEMM, turned into their gradient in place, and spent in the two GEMMs of the gradients.
    Extra memory: one chunk of logits, and with half inputs the accumulator of the weight's gradient. Without gradients
    to make, one GEMM and one chunk. bfloat16 gradients of the weight on a CPU are made by chunks of classes: the
    logits twice (but for one chunk), no accumulator of the weight's gradient.

    Args:
        input: (D,) or (N, D); float64, float32, bfloat16 or float16. Under autocast the GEMMs run in its dtype.
        linear_weight: (C, D), or (C, d1, ..., dK, D) for K-dimensional targets.
        target: class indices (int64 or uint8), (), (N,) or (N, d1, ..., dK); or class probabilities, (C,), (N, C) or
            (N, C, d1, ..., dK).
        linear_bias: (C,) or (C, d1, ..., dK). Input, weight and bias are what the loss is differentiable in.
        ignore_index: None is -100. Refused with class probabilities, as torch does. What input the ignored rows hold,
            NaN included, reaches no gradient. On the CPU they take no part in the products; on a GPU, where the host
            would have to wait for their number, they are cleared.
        gradient: "forward" makes the gradients with the loss (three GEMMs) and keeps them: one backward, whose
            upstream scalar they are then multiplied by; "inplace" is the same, for there are no logits to overwrite.
            "backward" makes the logits again in backward (four GEMMs): any upstream gradient, any number of times.
            "auto" (default): "forward" for a mean or sum, "backward" for reduction="none", which needs it.
        chunk_size: rows per chunk; given, nothing goes by classes. Default: a twelfth of the rows on the CPU, a quarter
            elsewhere, within 256 MiB of logits, but at least 128 rows (512), evened out over the chunks. By classes: a
            sixteenth of them, within the same bounds.
        accumulate_dtype: in which the gradients of weight and bias add up over the chunks; float32 for half inputs,
            else the dtype of the logits. Not narrower than that.
        weight, reduction, label_smoothing, focal_gamma, complement_gamma, class_bias, class_margin, scale, softcap,
            z_loss, sample_weight, normalizer, return_stats: as in :func:`longtail.cross_entropy`.

    K-dimensional targets and class probabilities go by way of the whole logits and :func:`longtail.cross_entropy`.
    float16: products are summed in float32. What is kept for backward stays in ``accumulate_dtype``, at least float32,
    until the upstream gradient and the mean's denominator have multiplied it, and is scaled so that the chunks of
    logits hold it, whatever weights and counts are.

    DTensors: ``input`` (N, D), ``linear_weight`` (C, D) and ``linear_bias`` on one mesh. One mesh dimension may shard
    the classes (the weight's Shard(0)), with ``input`` replicated over it or, in sequence parallelism, sharded by rows;
    over the others ``input`` is sharded by rows or replicated. Targets, constants and result as in
    :func:`longtail.cross_entropy`. Where rows are sharded, backward sums the parameters' gradients over the ranks: the
    backward passes of several losses run in the same order on every rank (otherwise RuntimeError). Parameters of FSDP
    are to be gathered: call the loss inside the ``forward`` of the module that ``fully_shard`` wraps, where they are.

    Raises:
        TypeError: an argument has the wrong type, dtype or layout; a DTensor with an ``input`` that is none.
        ValueError: a shape, device or value does not fit; a number is none that the loss's dtype holds; a parameter is
            empty, because ZeRO-3 or FSDP shares it out; a constant requires grad (all are also RuntimeErrors).
        IndexError: on the CPU, a target is out of bounds; names the row and the value.
    """
    options: dict[str, Any] = {
        "ignore_index": -100 if ignore_index is None else ignore_index,
        "reduction": reduction,
        "normalizer": normalizer,
        "label_smoothing": label_smoothing,
        "focal_gamma": focal_gamma,
        "complement_gamma": complement_gamma,
        "scale": scale,
        "softcap": softcap,
        "z_loss": z_loss,
    }
    vectors: dict[str, Any] = {
        "weight": weight,
        "class_bias": class_bias,
        "class_margin": class_margin,
        "sample_weight": sample_weight,
    }
    if is_dtensor(input):
        from .dtensor_linear import dtensor_linear_cross_entropy  # imports torch.distributed.tensor

        return dtensor_linear_cross_entropy(
            *(input, linear_weight, linear_bias, target),  # type: ignore[arg-type]
            gradient=gradient,
            chunk_size=chunk_size,
            accumulate_dtype=accumulate_dtype,
            return_stats=return_stats,
            vectors=vectors,
            options=options,
        )
    arguments.check_choice("gradient", gradient, GRADIENTS)
    logits_shape = _check_data(input, linear_weight, linear_bias, target)
    if target.shape == logits_shape and ignore_index is not None:
        raise ArgumentValueError("ignore_index cannot be specified when target contains probabilities")
    if target.shape != logits_shape and linear_weight.dim() == 2:
        data = (input, linear_weight, linear_bias, target)
        return _fused(data, gradient, chunk_size, accumulate_dtype, return_stats, vectors, options)
    bias = None if linear_bias is None else linear_bias.flatten()
    check_chunks(chunk_size, accumulate_dtype, logits_dtype(input, linear_weight, linear_bias))
    if target.shape != logits_shape:
        input = _cleared(input, target, logits_shape, options["ignore_index"])
    logits = F.linear(input, linear_weight.flatten(0, -2), bias).reshape(logits_shape)
    mode = "backward" if gradient == "auto" else gradient
    return cross_entropy(logits, target, gradient=mode, return_stats=return_stats, **vectors, **options)


def check_gathered(name: str, parameter: Tensor) -> None:
    """Refuses what DeepSpeed's ZeRO-3 and FSDP leave of a parameter outside its module."""
    if parameter.shape == (0,):
        raise ArgumentValueError(
            f"{name} is empty (shape [0]), as parameters that ZeRO-3 or FSDP share out are outside the forward of "
            "their module: gather it around the call and the backward, by deepspeed.zero.GatheredParameters, or call "
            "the loss inside the forward of the module that owns it"
        )


def _check_data(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> torch.Size:
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
    if input.dim() not in (1, 2):
        raise ArgumentValueError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
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


def check_chunks(chunk_size: int | None, accumulate_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients add up, for logits of ``dtype``."""
    if chunk_size is not None:
        arguments.check_integer("chunk_size", chunk_size, 1, "an int or None")
    if accumulate_dtype is None:
        return torch.float32 if dtype.itemsize < 4 else dtype
    if not isinstance(accumulate_dtype, torch.dtype):
        raise TypeError(f"accumulate_dtype is a {type(accumulate_dtype).__name__}, expected a torch.dtype or None")
    if not accumulate_dtype.is_floating_point or torch.promote_types(accumulate_dtype, dtype) != accumulate_dtype:
        raise ValueError(f"accumulate_dtype is {accumulate_dtype}, expected a dtype that holds every {dtype}")
    return accumulate_dtype


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


def _fused(
    data: tuple[Tensor, Tensor, Tensor | None, Tensor],
    gradient: str,
    chunk_size: int | None,
    accumulate_dtype: torch.dtype | None,
    return_stats: bool,
    vectors: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """Class indices over one set of classes, by chunks."""
    input, linear_weight, linear_bias, target = data
    reduction, ignore_index, normalizer = (options.pop(k) for k in ("reduction", "ignore_index", "normalizer"))
    mode = "backward" if gradient == "auto" else gradient
    numbers = check_options(input, target, ignore_index, reduction, normalizer, mode, **options)
    if gradient in ("forward", "inplace") and reduction == "none":
        raise ValueError(f'gradient={gradient!r} needs one scalar loss, expected reduction "mean" or "sum", got "none"')
    dtype = logits_dtype(input, linear_weight, linear_bias)
    total_dtype = check_chunks(chunk_size, accumulate_dtype, dtype)
    target, shape = arguments.class_indices(target, input), target.shape
    if shape != input.shape[:-1] and not (input.dim() == 1 and shape == (1,)):
        raise ArgumentValueError(
            f"target has shape {list(shape)}, expected {list(input.shape[:-1])} for input of shape {list(input.shape)}"
        )
    num_classes, wide = linear_weight.shape[0], arithmetic_dtype(dtype)
    checked = operator_options(
        input,
        target,
        num_classes,
        wide,
        ignore_index=ignore_index,
        **vectors,
        **numbers,  # type: ignore[arg-type]
    )
    rows = target.reshape(-1)
    denominator = None
    if reduction == "mean":
        denominator = mean_denominator(normalizer, rows, checked[0], ignore_index, num_classes).to(wide)
    trains = torch.is_grad_enabled()
    wants_bias = linear_bias is not None and linear_bias.requires_grad
    needs = (trains and input.requires_grad, trains and linear_weight.requires_grad, trains and wants_bias)
    keeps = any(needs) and reduction != "none" and gradient != "backward"
    setting = Setting(reduction, "forward" if keeps else "backward", chunk_size or 0, dtype, total_dtype, needs)
    x = input if input.dim() == 2 else input[None]
    counted = vectors["weight"] is None and normalizer is None
    size = kept_size(rows, num_classes, dtype, checked) if keeps else None
    factor, divisor = function_shares(denominator, counted, keeps, size, wide, input.device)
    data = (x, linear_weight, linear_bias, rows)
    loss, stats = linear_softmax_loss(*data, denominator, divisor, factor, setting, checked)
    if reduction == "none":
        loss = loss.reshape(shape)
    return (loss, row_stats(stats, rows, ignore_index, shape)) if return_stats else loss
