"""The CUDA backend: which of the libraries that this install holds fits here, and why none does."""

from __future__ import annotations

import functools
import glob
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda"

OLDEST = (8, 0)
"""The lowest compute capability that the kernels are compiled for."""


def libraries() -> dict[int, str]:
    """CUDA major -> the path of the library that is built for it."""
    paths = glob.glob(os.path.join(os.path.dirname(os.path.dirname(__file__)), "_C_cuda*.so"))
    majors = {path: re.fullmatch(r"_C_cuda(\d+)\.so", os.path.basename(path)) for path in paths}
    return {int(match[1]): path for path, match in majors.items() if match}


@functools.cache
def missing() -> str | None:
    """Why the CUDA kernels do not run here, or None: then they are loaded. Wakes the GPU, if there is one."""
    found = libraries()
    if not found:
        return (
            "this install holds no compiled CUDA library: it was built without nvcc. Reinstall with nvcc on the PATH "
            "(LONGTAIL_CUDA=1 makes the lack of one an error)"
        )
    built = " and ".join(str(major) for major in sorted(found))
    if torch.version.cuda is None:
        return f"compiled for CUDA {built}, but torch {torch.__version__} is built without CUDA"
    major = int(torch.version.cuda.split(".")[0])
    if major not in found:
        return f"compiled for CUDA {built}, but torch {torch.__version__} has CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if capability < OLDEST:
        return "no CUDA device of compute capability {}.{} or later, got {}.{}".format(*OLDEST, *capability)
    try:
        torch.ops.load_library(found[major])
    except (OSError, RuntimeError) as error:
        return f"{os.path.basename(found[major])} does not load: {error}"
    return None


def detail() -> str:
    return f"compiled kernels, CUDA {torch.version.cuda}"


def serves(logits: Tensor) -> bool:
    """float64 is for checking gradients, not for speed: it goes to the reference."""
    return logits.dtype != torch.float64


def operator(op: str) -> Callable[..., Any] | None:
    """The kernel of an operator, or None where the loaded library has none."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"longtail_cuda::{op}", "CUDA"):
        return None
    kernel: Callable[..., Any] = getattr(torch.ops.longtail_cuda, op).default
    return kernel
