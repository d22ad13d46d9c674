"""What every launcher does: on which device, and how kernels are compiled. `ops/triton.py` says what comes here."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

# debug keeps the assertion on targets (a few instructions per row) without its integer overflow checks.
COMPILE: dict[str, Any] = {"debug": True, "sanitize_overflow": False, "enable_fp_fusion": True, "num_stages": 1}


def on(device: torch.device) -> Any:
    """Triton launches on the current device, and on its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def aligned(*tensors: Tensor | None) -> bool:
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def switch(value: float, off: float | None) -> float | None:
    """An option as kernels take it: None, which is compiled out, where it is off."""
    return None if value == off else float(value)
