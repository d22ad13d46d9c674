"""Weights, biases and margins computed from the number of training samples per class.

Everything here is arithmetic on a vector of C counts, done once before training: in float64 on the CPU, then
rounded once to ``dtype`` (float32) and moved to the device of the counts (the CPU for sequences and arrays).

Counts are a 1-D tensor, sequence or array of C >= 1 finite, non-negative numbers (fractions are welcome:
weighted data has them). The rest raises ``TypeError`` (not numbers) or ``ValueError`` (wrong value or shape).

An empty class (``n_c = 0``) makes the formulas infinite or NaN, so it is an error unless ``empty`` says
otherwise: "zero" gives that class the value 0 and computes the others without it, "clamp" counts it as 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .arguments import check_choice, check_number
from .counting import Array, class_counts

__all__ = [
    "class_counts",
    "effective_number",
    "effective_number_weight",
    "inverse_frequency_weight",
    "ldam_margin",
    "logit_adjustment",
]


Counts: TypeAlias = Tensor | Sequence[float] | Array
Empty: TypeAlias = Literal["error", "zero", "clamp"]


def effective_number(samples_per_class: Counts, beta: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Effective number ``(1 - beta^n) / (1 - beta)`` (Cui et al. 2019); [C], 0 for an empty class.

    Args:
        samples_per_class: counts n, [C].
        beta: in [0, 1]; 1 means its limit, ``n`` itself.
        dtype: of the result.

    Raises:
        TypeError, ValueError: the counts are no numbers >= 0 of shape [C]; beta is out of range.
    """
    counts, device = checked_counts(samples_per_class)
    return _finish(_effective_number(counts, beta), dtype, device)


def effective_number_weight(
    samples_per_class: Counts, beta: float, empty: Empty = "error", *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Class-balanced weights, ``1 / effective_number``, scaled to sum to C (Cui et al. 2019, section 4); [C].

    Args:
        samples_per_class: counts [C].
        beta: in [0, 1]; 0 gives all ones, 1 inverse frequency. There is no default: what helps depends on the
            data, and a wrong value is worse than no weights at all.
        empty: "error", "zero" (the other weights sum to the number of present classes) or "clamp"
            (counted as 1).
        dtype: of the result.

    Raises:
        TypeError, ValueError: the counts are no numbers >= 0 of shape [C]; beta is out of range; a class is empty.
    """
    counts, device = checked_counts(samples_per_class)
    counts = _without_empty(counts, empty, ("zero", "clamp"))
    return _finish(_balanced(_effective_number(counts, beta), 1.0), dtype, device)


def inverse_frequency_weight(
    samples_per_class: Counts,
    power: float = 1.0,
    empty: Empty = "error",
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights ``n_c^-power``, scaled to sum to C; [C].

    Args:
        samples_per_class: counts [C].
        power: >= 0; 0.5 is the inverse square root (Mahajan et al. 2018).
        empty: "error", "zero" (the other weights sum to the number of present classes) or "clamp"
            (counted as 1).
        dtype: of the result.

    Raises:
        TypeError, ValueError: the counts are no numbers >= 0 of shape [C]; power is out of range; a class is empty.
    """
    counts, device = checked_counts(samples_per_class)
    counts = _without_empty(counts, empty, ("zero", "clamp"))
    return _finish(_balanced(counts, check_number("power", power, 0.0)), dtype, device)


def logit_adjustment(
    samples_per_class: Counts,
    tau: float = 1.0,
    empty: Literal["error", "clamp"] = "error",
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The ``class_bias`` of balanced softmax and logit adjustment, ``tau * log(n_c / sum_k n_k)``; [C].

    Args:
        samples_per_class: counts [C].
        tau: 1 is balanced softmax (Ren et al. 2020), any other number logit adjustment (Menon et al. 2021).
        empty: "error" or "clamp" (counted as 1); no "zero", which would be the largest bias of all and make the empty
            class the most likely one.
        dtype: of the result.

    Raises:
        TypeError, ValueError: the counts are no numbers >= 0 of shape [C]; tau is no finite number; a class is empty.
    """
    counts, device = checked_counts(samples_per_class)
    counts = _without_empty(counts, empty, ("clamp",))
    return _finish(check_number("tau", tau) * (counts.log() - counts.sum().log()), dtype, device)


def ldam_margin(
    samples_per_class: Counts,
    max_margin: float = 0.5,
    empty: Empty = "error",
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The ``class_margin`` of LDAM, ``max_margin (n_c / min_k n_k)^(-1/4)`` (Cao et al. 2019, eq. 13); [C].

    Args:
        samples_per_class: counts [C].
        max_margin: >= 0, the margin of the rarest class.
        empty: "error", "zero" (margin 0; the largest margin goes to the rarest class present) or "clamp"
            (counted as 1).
        dtype: of the result.

    Raises:
        TypeError, ValueError: the counts are no numbers >= 0 of shape [C]; max_margin is negative; a class is empty.
    """
    counts, device = checked_counts(samples_per_class)
    counts = _without_empty(counts, empty, ("zero", "clamp"))
    return _finish(check_number("max_margin", max_margin, 0.0) * _relative(counts, 0.25), dtype, device)


def checked_counts(samples_per_class: Counts) -> tuple[Tensor, torch.device]:
    """Counts as float64 [C] on the CPU, and the device they came from."""
    if isinstance(samples_per_class, Tensor):
        if samples_per_class.dtype == torch.bool or samples_per_class.is_complex():
            raise TypeError(f"samples_per_class has dtype {samples_per_class.dtype}, expected real numbers")
        device = samples_per_class.device
        counts = samples_per_class.detach().to("cpu", torch.float64)
    else:
        device = torch.device("cpu")
        counts = _counts_from_sequence(samples_per_class)
    if counts.dim() != 1 or counts.numel() < 1:
        raise ValueError(f"samples_per_class has shape {list(counts.shape)}, expected [C] with C >= 1")
    wrong = ~(torch.isfinite(counts) & (counts >= 0))
    if wrong.any():
        c = int(wrong.nonzero()[0])
        raise ValueError(f"samples_per_class[{c}] is {counts[c].item():g}, expected a finite count >= 0")
    return counts, device


def _counts_from_sequence(samples_per_class: Sequence[float] | Array) -> Tensor:
    """float64 tensor of a sequence or array; by way of a list: torch refuses arrays with negative strides."""
    plain = samples_per_class.tolist() if hasattr(samples_per_class, "tolist") else samples_per_class
    if isinstance(plain, (str, bytes)) or not isinstance(plain, Sequence):
        kind = type(samples_per_class).__name__
        raise TypeError(f"samples_per_class is a {kind}, expected a tensor, sequence or array")
    for c, n in enumerate(plain):
        if isinstance(n, (list, tuple)):
            raise ValueError(f"samples_per_class[{c}] is a {type(n).__name__}, expected one number per class")
        if isinstance(n, (bool, complex)) or not hasattr(n, "__float__"):
            raise TypeError(f"samples_per_class[{c}] is {n!r}, expected a real number")
    return torch.tensor([float(n) for n in plain], dtype=torch.float64, device="cpu")


def _without_empty(counts: Tensor, empty: str, choices: tuple[str, ...]) -> Tensor:
    """Counts with their zeros dealt with: 0 for "zero" (not all of them, though), 1 for "clamp"."""
    check_choice("empty", empty, ("error", *choices))
    absent = counts == 0
    if empty == "clamp":
        return counts.masked_fill(absent, 1.0)
    if absent.any() and empty == "error":
        which = absent.nonzero().flatten().tolist()
        shown = ", ".join(map(str, which[:8])) + (", ..." if len(which) > 8 else "")
        ways = {
            "zero": 'empty="zero" (value 0, the others computed without it)',
            "clamp": 'empty="clamp" (counted as 1)',
        }
        advice = " or ".join(ways[choice] for choice in choices)
        raise ValueError(f"samples_per_class is 0 for class {shown}; expected at least 1, or {advice}")
    if absent.all():
        raise ValueError('samples_per_class is 0 for every class; empty="zero" expects one with samples')
    return counts


def _effective_number(counts: Tensor, beta: float) -> Tensor:
    beta = check_number("beta", beta, 0.0, 1.0)
    if beta == 1.0:
        return counts
    if beta == 0.0:
        return (counts > 0).to(counts.dtype)
    log_beta = math.log(beta)
    return torch.expm1(counts * log_beta) / math.expm1(log_beta)


def _relative(numbers_per_class: Tensor, power: float) -> Tensor:
    """``x_c^-power`` over its largest value, 0 where x_c = 0; ratio first, so no power overflows."""
    present = numbers_per_class > 0
    smallest = numbers_per_class[present].min()
    return torch.where(present, (smallest / numbers_per_class) ** power, 0.0)


def _balanced(numbers_per_class: Tensor, power: float) -> Tensor:
    """``x_c^-power`` scaled to sum to the number of classes with x_c > 0."""
    weight = _relative(numbers_per_class, power)
    return weight * ((numbers_per_class > 0).sum() / weight.sum())


def _finish(values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype!r}, expected a floating-point torch.dtype")
    return values.to(device=device, dtype=dtype)
