"""What is checked of counts and of numbers per class, and how what is made of them is rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..arguments import as_float, check_choice, check_number, check_tensors
from .arrays import Array

Counts: TypeAlias = Tensor | Sequence[float] | Array
PerClass: TypeAlias = float | Tensor | Sequence[float] | Array
Empty: TypeAlias = Literal["error", "zero", "clamp"]


def checked_counts(samples_per_class: Counts) -> tuple[Tensor, torch.device]:
    """Counts as float64 [C] on the CPU, and the device they came from."""
    counts = _vector("samples_per_class", samples_per_class)
    if counts.dim() != 1 or counts.numel() < 1:
        raise ValueError(f"samples_per_class has shape {list(counts.shape)}, expected [C] with C >= 1")
    check_each("samples_per_class", counts, torch.isfinite(counts) & (counts >= 0), "a finite count >= 0")
    return counts, samples_per_class.device if isinstance(samples_per_class, Tensor) else torch.device("cpu")


def _vector(name: str, values: Counts, expected: str = "a tensor, sequence or array") -> Tensor:
    """float64 on the CPU; of sequences and arrays by way of a list: torch refuses arrays with negative strides."""
    if isinstance(values, Tensor):
        check_tensors(**{name: values})
        if values.dtype == torch.bool or values.is_complex():
            raise TypeError(f"{name} has dtype {values.dtype}, expected real numbers")
        return values.detach().to("cpu", torch.float64)
    plain = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(plain, (str, bytes)) or not isinstance(plain, Sequence):
        raise TypeError(f"{name} is a {type(values).__name__}, expected {expected}")
    return torch.tensor([_entry(name, c, x) for c, x in enumerate(plain)], dtype=torch.float64, device="cpu")


def _entry(name: str, c: int, x: object) -> float:
    if isinstance(x, (list, tuple)):
        raise ValueError(f"{name}[{c}] is a {type(x).__name__}, expected one number per class")
    try:
        if not isinstance(x, (bool, complex)) and hasattr(x, "__float__"):
            return as_float(x)
    except (TypeError, ValueError):  # of a tensor of several
        pass
    raise TypeError(f"{name}[{c}] is {x!r}, expected a real number")


def check_each(name: str, values: Tensor, right: Tensor, expected: str) -> None:
    if not right.all():
        c = int((~right).nonzero()[0])
        raise ValueError(f"{name}[{c}] is {values[c].item():g}, expected {expected}")


def is_number(value: object) -> bool:
    """Whether it is one number for all classes, and not one for each."""
    return getattr(value, "ndim", None) == 0 or not hasattr(value, "__len__")


def per_class(name: str, value: PerClass, counts: Tensor, low: float, high: float) -> Tensor:
    """A number, or one for each class, as float64 [C] on the CPU: the same arithmetic for both."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but the result is not differentiable in it: pass {name}.detach()")
    if is_number(value):
        number = _vector(name, value) if isinstance(value, Tensor) else value
        number = number.item() if hasattr(number, "ndim") else number  # type: ignore[union-attr]
        return torch.full_like(counts, check_number(name, number, low, high, infinite=high == math.inf))
    values = _vector(name, value, "a number, tensor, sequence or array")  # type: ignore[arg-type]
    if values.shape != counts.shape:
        raise ValueError(
            f"{name} has shape {list(values.shape)}, expected a number or {list(counts.shape)} as samples_per_class"
        )
    check_each(name, values, (values >= low) & (values <= high), f"a number in [{low:g}, {high:g}]")
    return values


def without_empty(counts: Tensor, empty: str, choices: tuple[str, ...]) -> Tensor:
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


def finished(
    name: str, values: Tensor, dtype: torch.dtype, device: torch.device, positive: Tensor | None = None
) -> Tensor:
    """Rounded to ``dtype``, which has to hold them, and has to tell the ``positive`` ones from 0."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype!r}, expected a floating-point torch.dtype")
    rounded, limits = values.to(dtype), torch.finfo(dtype)
    lost, held = ~(values.abs() <= limits.max), f"at most {limits.max:.2g} in size"
    if positive is not None:
        lost, held = lost | (positive & (rounded.double() == 0)), f"{limits.tiny * limits.eps:.2g} to {limits.max:.2g}"
    if lost.any():
        c = int(lost.nonzero()[0])
        raise ValueError(f"{name} of class {c} is {values[c].item():.3g}, expected {held}, which {dtype} holds")
    return rounded.to(device)
