"""The Triton backend: on GPUs, or in Triton's interpreter on the CPU, for tests."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda"  # ROCm's too

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing() -> str | None:
    """Why the kernels do not run here, or None.

    Looked at when first asked for: importing longtail neither imports Triton nor wakes the GPU.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if not interpreted():
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


def detail() -> str:
    version = importlib.import_module("triton").__version__
    return f"Triton {version}, " + ("interpreted on the CPU" if interpreted() else "GPU kernels")


def serves(logits: Tensor) -> bool:
    """float64 is for checking gradients, not for speed: it goes to the reference, as other ranks do for its errors."""
    return logits.dtype in _DTYPES and logits.dim() in (2, 3)


def operator(op: str) -> Callable[..., Any] | None:
    modules = importlib.import_module("longtail.triton_kernels").OPERATORS
    if op not in modules:
        return None
    kernel: Callable[..., Any] = getattr(importlib.import_module(f"longtail.triton_kernels.{modules[op]}"), op)
    return kernel
