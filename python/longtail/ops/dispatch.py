"""Which kernels run: the best backend for a device, or the one that is forced."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import triton
from .backends import BACKENDS
from .layout import logits_position


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}, expected one of {', '.join(BACKENDS)}")
    missing = BACKENDS[name].missing()
    if missing is not None:
        raise ValueError(f"{source} is {name!r}, which does not run here: {missing}")
    return name


_forced: str | None = os.environ.get("LONGTAIL_BACKEND") or None  # use_backend overrides the environment
_kernels: dict[tuple[str, str, str | None], Callable[..., Any]] = {}  # (operator, device type, forced) -> kernel


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the block on one backend: "cuda", "triton", "cpu" or "reference". Holds for the whole process; nests.

    Raises:
        ValueError: no backend has that name, or it does not run here (the text says why).
    """
    global _forced
    previous, _forced = _forced, _checked(name, "backend")
    try:
        yield
    finally:
        _forced = previous


def selected(device: torch.device) -> str:
    """The backend that serves tensors on ``device``.

    Raises:
        ValueError: the forced backend does not serve that device, or ``LONGTAIL_BACKEND`` names none.
    """
    if _forced is None:
        return next(n for n, b in BACKENDS.items() if b.DEVICE in (device.type, None) and b.missing() is None)
    name = _checked(_forced, "LONGTAIL_BACKEND")
    emulated = name == "triton" and device.type == "cpu" and triton.interpreted()
    needed = BACKENDS[name].DEVICE
    if needed not in (device.type, None) and not emulated:
        raise ValueError(f"backend {name!r} serves {needed} tensors, got tensors on {device}")
    return name


def kernel(op: str, device: torch.device) -> Callable[..., Any]:
    """The kernel of operator ``op`` for tensors on ``device``."""
    key = (op, device.type, _forced)
    found = _kernels.get(key)
    if found is None:
        chosen = selected(device)
        if chosen == "reference" and _forced is None:
            _warn_of_plain_pytorch(device.type)
        _kernels[key] = found = implementation(chosen, op)
    return found


@functools.cache
def _warn_of_plain_pytorch(device_type: str) -> None:
    """Says once that kernels for such a device exist, and why they do not run; nothing where there are none."""
    reasons = [f"{name}: {kernels.missing()}" for name, kernels in BACKENDS.items() if device_type == kernels.DEVICE]
    if reasons:
        warnings.warn(
            f"longtail computes in plain PyTorch on {device_type} tensors, much slower than by its kernels. "
            f"{'; '.join(reasons)}. LONGTAIL_BACKEND=reference silences this warning",
            RuntimeWarning,
            stacklevel=2,
        )


def implementation(name: str, op: str) -> Callable[..., Any]:
    """The kernel of a backend for the logits that it serves, and of the next one that runs here for the others."""
    kernels = BACKENDS[name]
    found, serves = kernels.operator(op), kernels.serves
    if found is None:
        return implementation(_next(name), op)
    position = logits_position(op)
    return found if serves is None or position is None else _by_logits(name, op, position, serves, found)


def _next(name: str) -> str:
    names, device = list(BACKENDS), BACKENDS[name].DEVICE
    later = names[names.index(name) + 1 :]
    return next(n for n in later if BACKENDS[n].DEVICE in (device, None) and BACKENDS[n].missing() is None)


def _by_logits(
    name: str, op: str, position: int, serves: Callable[[Tensor], bool], kernel: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.cache
    def other() -> Callable[..., Any]:  # not before it is needed: to look for Triton takes an import of it
        return implementation(_next(name), op)

    def call(*args: Any) -> Any:
        return (kernel if serves(args[position]) else other())(*args)

    return call
