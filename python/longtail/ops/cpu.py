"""The CPU backend: a library of kernels, compiled for several instruction sets, of which it picks one."""

from __future__ import annotations

import ctypes
import glob
import os
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cpu"
serves = None  # whatever the operators take

_missing: str | None = "it has not been loaded"
_library: ctypes.CDLL | None = None


def load() -> None:
    """Loads the library, if this install holds one. Called once, by the operators' module."""
    global _library, _missing
    found = glob.glob(os.path.join(os.path.dirname(os.path.dirname(__file__)), "_C.*"))
    if not found:
        _missing = (
            "this install holds no compiled CPU library: it was built without a C++ compiler. Reinstall with g++ or "
            "clang++ on the PATH (LONGTAIL_REQUIRE_CPU=1 makes the lack of one an error)"
        )
        return
    try:
        torch.ops.load_library(found[0])
        _library = ctypes.CDLL(found[0])
        _library.longtail_cpu_isa.restype = ctypes.c_char_p
        _missing = None
    except (OSError, RuntimeError) as error:
        _missing = f"{os.path.basename(found[0])} does not load: {error}"


def missing() -> str | None:
    """Why the kernels do not run here, or None."""
    return _missing


def detail() -> str:
    return f"compiled kernels, {isa()}"


def operator(op: str) -> Callable[..., Any] | None:
    """The kernel of an operator, or None where the library has none."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"longtail_cpu::{op}", "CPU"):
        return None
    kernel: Callable[..., Any] = getattr(torch.ops.longtail_cpu, op).default
    return kernel


def isa() -> str | None:
    """The instruction set of the kernels, or None without them.

    One of "avx512_bf16", "avx512", "avx2", "baseline" and, on aarch64, "neon".

    Raises:
        ValueError: ``LONGTAIL_CPU_ISA`` names one that this processor does not run.
    """
    if _library is None:
        return None
    name = _library.longtail_cpu_isa()
    if name is None:
        raise ValueError(
            f"LONGTAIL_CPU_ISA is {os.environ.get('LONGTAIL_CPU_ISA')!r}, expected one that this processor runs: "
            "baseline (neon on aarch64), avx2, avx512 or avx512_bf16"
        )
    return str(name.decode())
