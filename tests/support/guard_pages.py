"""Memory whose end is that of what may be read: a load past a tensor's last element is a crash."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


class GuardedEnd:
    """``pages`` that hold one tensor at a time, before a page that nothing reads."""

    def __init__(self, pages: int = 16) -> None:
        self.size = pages * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.size + mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        closed = libc.mprotect(ctypes.c_void_p(start + self.size), ctypes.c_size_t(mmap.PAGESIZE), 0)
        assert closed == 0, ctypes.get_errno()

    def hold(self, values: Tensor) -> Tensor:
        """``values`` again, the last of them last before that page."""
        place = self.size - values.numel() * values.element_size()
        held = torch.frombuffer(self.memory, dtype=values.dtype, count=values.numel(), offset=place)
        return held.view(values.shape).copy_(values)
