"""Which kernels run: what is installed, what this machine can use, and how to force a choice."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from . import cuda_library, fallback, images

COMPILED = ("cuda", "cpu")
"""Backends that come as a shared library, under ``torch.ops.longtail_<name>``."""

NAMES = ("cuda", "triton", "cpu", "reference")
# The device type a backend needs; ROCm's is "cuda" too.
_DEVICES: dict[str, str | None] = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu", "reference": None}

_missing: dict[str, str] = {}  # backend -> why it does not run here
_library: ctypes.CDLL | None = None


class Backend(NamedTuple):
    """One row of :func:`backends`: whether it runs here, and what is used or why not."""

    available: bool
    detail: str


def load() -> None:
    """Loads the CPU library, if this install holds one. Called once, by the operators' module."""
    global _library
    found = glob.glob(os.path.join(os.path.dirname(__file__), "_C.*"))
    if not found:
        _missing["cpu"] = (
            "this install holds no compiled CPU library: it was built without a C++ compiler. Reinstall with g++ or "
            "clang++ on the PATH (LONGTAIL_REQUIRE_CPU=1 makes the lack of one an error)"
        )
        return
    try:
        torch.ops.load_library(found[0])
        _library = ctypes.CDLL(found[0])
        _library.longtail_cpu_isa.restype = ctypes.c_char_p
    except (OSError, RuntimeError) as error:
        _missing["cpu"] = f"{os.path.basename(found[0])} does not load: {error}"


def cpu_isa() -> str | None:
    """The instruction set of the CPU kernels, or None without them.

    One of "avx512_bf16", "avx512", "avx2", "baseline" and, on aarch64, "neon".

    Raises:
        ValueError: ``LONGTAIL_CPU_ISA`` names one that this processor does not run.
    """
    if _library is None:
        return None
    isa = _library.longtail_cpu_isa()
    if isa is None:
        raise ValueError(
            f"LONGTAIL_CPU_ISA is {os.environ.get('LONGTAIL_CPU_ISA')!r}, expected one that this processor runs: "
            "baseline (neon on aarch64), avx2, avx512 or avx512_bf16"
        )
    return str(isa.decode())


def _interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_missing() -> str | None:
    # Looked at when first asked for: importing longtail neither imports Triton nor wakes the GPU.
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if not _interpreted():
        if not torch.cuda.is_available():
            return "no CUDA or ROCm device"
        capability = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        if torch.version.hip is None and capability < (8, 0):
            return "no CUDA device of compute capability 8.0 or later, got {}.{}".format(*capability)
    try:
        importlib.import_module("longtail.triton_kernels.softmax_loss")
    except (ImportError, AttributeError, TypeError) as error:
        return f"the installed Triton does not load the kernels: {error}"
    return None


def _why_missing(name: str) -> str | None:
    if name == "cuda":
        return cuda_library.missing()
    return _triton_missing() if name == "triton" else _missing.get(name)


def _status(name: str) -> Backend:
    missing = _why_missing(name)
    if missing is not None:
        return Backend(False, missing)
    if name == "triton":
        version = importlib.import_module("triton").__version__
        return Backend(True, f"Triton {version}, " + ("interpreted on the CPU" if _interpreted() else "GPU kernels"))
    if name == "cuda":
        return Backend(True, f"compiled kernels, CUDA {torch.version.cuda}")
    if name == "cpu":
        return Backend(True, f"compiled kernels, {cpu_isa()}")
    return Backend(True, "plain PyTorch, any device")


def backends() -> dict[str, Backend]:
    """Every backend by name, best first: whether it runs here, and with what or why not.

    >>> longtail.backends()["reference"].available
    True
    """
    return {name: _status(name) for name in NAMES}


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} is {name!r}, expected one of {', '.join(NAMES)}")
    missing = _why_missing(name)
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
        return next(n for n in NAMES if _DEVICES[n] in (device.type, None) and _why_missing(n) is None)
    name = _checked(_forced, "LONGTAIL_BACKEND")
    emulated = name == "triton" and device.type == "cpu" and _interpreted()
    if _DEVICES[name] not in (device.type, None) and not emulated:
        raise ValueError(f"backend {name!r} serves {_DEVICES[name]} tensors, got tensors on {device}")
    return name


def kernel(op: str, device: torch.device) -> Callable[..., Any]:
    """The kernel of operator ``op`` for tensors on ``device``."""
    key = (op, device.type, _forced)
    found = _kernels.get(key)
    if found is None:
        chosen = selected(device)
        if chosen == "reference" and _forced is None:
            _warn_of_plain_pytorch(device.type)
        name, found = _implementation(chosen, op)
        _kernels[key] = found = images.through_rows(op, found) if name == "reference" else found
    return found


@functools.cache
def _warn_of_plain_pytorch(device_type: str) -> None:
    """Says once that kernels for such a device exist, and why they do not run; nothing where there are none."""
    reasons = [f"{name}: {_why_missing(name)}" for name in NAMES if _DEVICES[name] == device_type]
    if reasons:
        warnings.warn(
            f"longtail computes in plain PyTorch on {device_type} tensors, much slower than by its kernels. "
            f"{'; '.join(reasons)}. LONGTAIL_BACKEND=reference silences this warning",
            RuntimeWarning,
            stacklevel=2,
        )


def _after_cuda() -> str:
    return "triton" if _triton_missing() is None else "reference"


def _implementation(name: str, op: str) -> tuple[str, Callable[..., Any]]:
    """The kernel of a backend, or of the next one that serves its tensors where it has none; and whose it is."""
    if name == "cuda":
        compiled = cuda_library.operator(op)
        return (name, compiled) if compiled else _implementation(_after_cuda(), op)
    if name == "cpu":
        return name, getattr(torch.ops.longtail_cpu, op).default
    if name == "triton":
        operators = importlib.import_module("longtail.triton_kernels").OPERATORS
        if op in operators:
            return name, getattr(importlib.import_module(f"longtail.triton_kernels.{operators[op]}"), op)
    return "reference", getattr(fallback, op)
