"""Checks and conversions of what people pass, shared by every loss of the package."""

from __future__ import annotations

import math
import numbers
import operator
import warnings
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentTypeError, ArgumentValueError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Largest and smallest positive number of full precision, of the dtypes of the arithmetic.
LIMITS = {dtype: (torch.finfo(dtype).max, torch.finfo(dtype).tiny) for dtype in (torch.float64, torch.float32)}
ROUNDING = 1e-3  # how far rounding may carry a soft target out of [0, 1]
_NARROW_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8)
SYMBOLS = (torch.SymInt, torch.SymFloat)  # what torch.export makes of numbers that depend on a shape


def is_exporting() -> bool:
    """Whether torch.export makes a graph; until torch 2.11 the public function says so of every compiled one, too."""
    return torch.compiler.is_exporting() and getattr(torch.compiler, "_is_exporting_flag", True)


def is_dtensor(x: object) -> bool:
    """Whether ``x`` is a DTensor, without importing what defines it."""
    kind = type(x)  # torch.compile does not see the attribute on the tensor
    return kind is not Tensor and hasattr(kind, "full_tensor")


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of losses and statistics for logits of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def legacy_reduction(reduction: str, size_average: bool | None, reduce: bool | None, stacklevel: int = 3) -> str:
    """What torch's deprecated ``size_average`` and ``reduce`` say; ``reduction`` where both are None."""
    if size_average is None and reduce is None:
        return reduction
    averages, reduces = size_average is None or size_average, reduce is None or reduce
    said = ("mean" if averages else "sum") if reduces else "none"
    warnings.warn(f'size_average and reduce are deprecated, pass reduction="{said}"', stacklevel=stacklevel)
    return said


def check_number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    dtype: torch.dtype = torch.float64,
    vanishes: bool = True,
    infinite: bool = False,
) -> float:
    """A number in [low, high] that is finite in ``dtype``; tensors are refused, because their gradient would be lost.

    ``vanishes``: whether it may be so near 0 that ``dtype`` loses its digits, or takes it for 0. ``infinite``: whether
    infinity is welcome, and numbers beyond the largest, which count as it. A traced number stays the symbol it is,
    without bounds that it would have to prove.
    """
    # ints and floats first: under torch.compile one that changes is a symbol, of which nothing else can be asked.
    if type(value) is not float and type(value) is not int:
        if isinstance(value, SYMBOLS):
            return value  # type: ignore[return-value]
        if isinstance(value, bool | Tensor) or not _is_real(value):
            way = f": {name}.item()" if isinstance(value, Tensor) and value.numel() == 1 else ""
            raise ArgumentTypeError(f"{name} is a {type(value).__name__}, expected a number{way}")
    try:
        number = as_float(value)
    except (TypeError, ValueError) as error:  # an array of several
        raise ArgumentTypeError(f"{name} is {value!r}, expected a number") from error
    if not (low <= number <= high and (infinite or -math.inf < number < math.inf)):
        raise ArgumentValueError(
            f"{name} is {number}, expected a {'' if infinite else 'finite '}number in [{low}, {high}]"
        )
    if infinite or is_exporting():
        return number
    largest, smallest = LIMITS[dtype]
    if not -largest <= number <= largest:
        raise ArgumentValueError(f"{name} is {number}, expected at most {largest:.2g} in size, which {dtype} holds")
    if not vanishes and number != 0 and -smallest < number < smallest:
        raise ArgumentValueError(
            f"{name} is {number}, expected at least {smallest:.2g} in size, which {dtype} tells from 0"
        )
    return number


def as_float(value: Any) -> float:
    """``value`` as a float; infinity of an int of hundreds of digits."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def shown(value: int) -> str:
    """An int in a message; Python writes out no more than some thousands of digits."""
    bits = operator.index(value).bit_length()
    return str(value) if bits <= 256 else f"an int of {bits} bits"


def _is_real(value: object) -> bool:
    is_complex = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    return hasattr(value, "__float__") and not is_complex


def check_integer(
    name: str, value: object, low: int = -(2**63), expected: str = "an int", high: int = 2**63 - 1
) -> None:
    """An int in [low, high], by default any that int64 holds; ``expected``: what may be passed."""
    if isinstance(value, torch.SymInt):
        return
    if not isinstance(value, int):
        # numpy's integers; torch.compile makes tensors of them
        is_bool = getattr(getattr(value, "dtype", None), "kind", "") == "b"  # numpy's, an index until numpy 2.2
        if isinstance(value, Tensor) or is_bool or not hasattr(value, "__index__") or torch.compiler.is_compiling():
            raise ArgumentTypeError(f"{name} is a {type(value).__name__}, expected {expected}")
        value = operator.index(value)
    if isinstance(value, bool):
        raise ArgumentTypeError(f"{name} is a bool, expected {expected}")
    if not low <= value <= high:
        raise ArgumentValueError(f"{name} is {shown(value)}, expected {expected} in [{low}, {high}]")


def check_tensors(**tensors: object) -> None:
    """Each is a tensor with strides: not sparse, nested or of MKL-DNN."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, expected a Tensor")
        if value.is_nested:
            raise ArgumentTypeError(
                f"{name} is a nested tensor, expected a plain one: {name}.to_padded_tensor(padding), with ignore_index "
                "as the padding of targets, or all rows in one, by torch.cat(list(nested.unbind()))"
            )
        if value.layout != torch.strided:
            raise ArgumentTypeError(f"{name} has layout {value.layout}, expected torch.strided: {name}.to_dense()")


def check_local(**tensors: Tensor | None) -> None:
    """Each is this rank's own tensor, if any."""
    for name, value in tensors.items():
        if is_dtensor(value):
            raise ArgumentTypeError(f"{name} is a DTensor, expected this rank's part of it: {name}.to_local()")


def check_device(name: str, value: Tensor, input: Tensor) -> None:
    if value.device != input.device:
        raise ArgumentValueError(f"{name} is on {value.device}, expected {input.device} as the input")


def check_logits(input: Tensor) -> None:
    if input.dtype not in DTYPES:
        raise ArgumentTypeError(f"input has dtype {input.dtype}, expected float64, float32, bfloat16 or float16")


def check_gamma(input: Tensor, gamma: float, low: float = 0.0) -> float:
    """A gamma that :func:`longtail.cross_entropy` knows by another name: its error has the name that was passed.

    Of DTensors it is left to the check that the ranks agree on: one that raised alone would leave the others waiting.
    """
    if is_dtensor(input):
        return gamma
    check_tensors(input=input)
    check_logits(input)
    return check_number("gamma", gamma, low, dtype=arithmetic_dtype(input.dtype))


def vector(name: str, value: Tensor | None, shape: torch.Size, input: Tensor, dtype: torch.dtype) -> Tensor | None:
    """An optional constant vector (``weight``, ``sample_weight``, ...), checked, flat, in the arithmetic's dtype."""
    if value is None:
        return None
    check_tensors(**{name: value})
    if is_dtensor(value) and not is_dtensor(input):
        raise ArgumentTypeError(f"{name} is a DTensor, expected a plain tensor as the input")
    if value.shape != shape:
        raise ArgumentValueError(f"{name} has shape {list(value.shape)}, expected {list(shape)}")
    if not value.is_floating_point():
        raise ArgumentTypeError(f"{name} has dtype {value.dtype}, expected a floating point dtype")
    check_device(name, value, input)
    if value.requires_grad and torch.is_grad_enabled():
        raise ArgumentValueError(
            f"{name} requires grad, but the loss is not differentiable in it: pass {name}.detach()"
        )
    converted = value.to(dtype)
    if value.dtype == torch.float64 and converted.dtype != value.dtype:
        _check_held(name, value, converted)
    return converted if is_dtensor(converted) else converted.reshape(-1).contiguous()


def _check_held(name: str, value: Tensor, converted: Tensor) -> None:
    """On the CPU: ``converted`` holds every finite number of ``value``."""
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if is_dtensor(value):  # whose own any() would wait for the other ranks
        value, converted = (x.to_local() for x in (value, converted))  # type: ignore[attr-defined]
    lost = converted.isinf() & value.isfinite()
    try:
        if not lost.any():
            return
    except RuntimeError:  # what is traced has no values
        return
    place = lost.nonzero()[0].tolist()
    raise ArgumentValueError(
        f"{name} is {value[tuple(place)].item()} at index {place}, expected at most "
        f"{LIMITS[converted.dtype][0]:.2g} in size, which {converted.dtype} holds"
    )


def class_indices(target: Tensor, input: Tensor) -> Tensor:
    """Integer targets on the input's device, as int64."""
    if target.dtype in _NARROW_INTEGERS:
        target = target.long()
    if target.dtype != torch.int64:
        raise ArgumentTypeError(f"target has dtype {target.dtype}, expected an integer dtype for class indices")
    check_device("target", target, input)
    return target


def check_normalizer(
    normalizer: object, reduction: str, words: tuple[str, ...], dtype: torch.dtype = torch.float64
) -> None:
    """``normalizer`` is None, one of ``words``, a number >= 0 or a 0-d tensor, and goes with the mean alone.

    ``dtype``: in which it divides.
    """
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f'normalizer is given with reduction={reduction!r}, expected reduction="mean"')
    if isinstance(normalizer, str):
        if normalizer not in words:
            named = ", ".join(map(repr, words))
            raise ValueError(f"normalizer is {normalizer!r}, expected {named}, a number, a 0-d tensor or None")
    elif isinstance(normalizer, Tensor):
        check_tensors(normalizer=normalizer)
        if normalizer.is_complex():
            raise ArgumentTypeError(f"normalizer has dtype {normalizer.dtype}, expected a real one")
        if normalizer.dim() != 0:
            raise ArgumentValueError(f"normalizer has shape {list(normalizer.shape)}, expected a 0-d tensor")
        if normalizer.requires_grad:
            raise ArgumentValueError("normalizer requires grad, but the loss is not differentiable in it")
    else:
        # 0: a Trainer's step in which nothing counts
        check_number("normalizer", normalizer, 0.0, dtype=dtype, vanishes=False)


def given_normalizer(
    normalizer: str | float | Tensor | None, device: torch.device, dtype: torch.dtype = torch.float64
) -> Tensor | None:
    """A denominator that the caller brings, 0-d; None where ``normalizer`` is a word or None and has to be counted.

    ``dtype``: of what is made of a number.
    """
    if isinstance(normalizer, Tensor):
        return normalizer.to(device)
    if normalizer is None or isinstance(normalizer, str):
        return None
    number = normalizer if isinstance(normalizer, SYMBOLS) else float(normalizer)
    if not torch.compiler.is_compiling() and not isinstance(number, SYMBOLS):
        return torch.full((), number, dtype=dtype, device=device)
    # A product, which torch.compile keeps open for other floats; torch.full makes a graph for each.
    return torch.ones((), dtype=torch.float64, device=device) * number
