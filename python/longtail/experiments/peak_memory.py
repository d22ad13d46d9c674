"""Peak extra memory of a block, measured: the resident set on the CPU, torch's allocator on CUDA."""

from __future__ import annotations

import ctypes
import os
from types import TracebackType

import torch

# Resident memory is counted in pages, here and there of the allocator itself: nothing to be said of less than this.
SMALLEST = 1 << 20


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


class PeakMemory:
    """``with PeakMemory(device) as peak: ...``; then ``peak.extra`` is bytes, None where it cannot be measured.

    On the CPU this is Linux's high-water mark of the resident set, set back before the block: it sees every touched
    page, whoever allocated it.
    """

    extra: int | None = None

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __enter__(self) -> PeakMemory:
        self._before = self._cuda_before() if self._cuda else self._cpu_before()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            peak = torch.cuda.max_memory_allocated() if self._cuda else _resident("VmHWM")
            self.extra = max(peak - self._before, 0)

    def _cuda_before(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _cpu_before(self) -> int | None:
        if not os.access("/proc/self/clear_refs", os.W_OK):
            return None
        # Freed memory that malloc keeps would be used again without being counted.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        with open("/proc/self/clear_refs", "w") as marks:
            marks.write("5")
        return _resident("VmRSS")


def return_freed_memory() -> None:
    """From here on freed blocks go back at once, so that a peak is what is held, not what malloc keeps."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
