"""Images [N, C, P] of contiguous pixels laid out otherwise; whatever lies between them is NaN."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch
from torch import Tensor


def _within(x: Tensor, classes: int = 0, pixels: int = 0, between: int = 0, offset: int = 0) -> Tensor:
    """Among so many more classes and pixels, with elements between the images and before the first of them."""
    n, c, p = x.shape
    stride = (c + classes) * (p + pixels) + between
    memory = torch.full((offset + n * stride,), torch.nan, dtype=x.dtype)
    return memory.as_strided(x.shape, (stride, p + pixels, 1), offset).copy_(x)


def far_apart(x: Tensor) -> Tensor:
    """Images, and the classes of each, more than 2^31 bytes apart, of which only the pixels themselves take memory."""
    n, c, p = x.shape
    stride, flags = 2**30 + 24, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(mmap.mmap(-1, ((n * c - 1) * stride + p) * x.itemsize, flags), dtype=x.dtype)
    return memory.as_strided(x.shape, (c * stride, stride, 1)).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "whole_vectors_apart": lambda x: _within(x, classes=2, pixels=16),
    "class_stride": lambda x: _within(x, pixels=3),
    "image_stride": lambda x: _within(x, between=3),
    "offset": lambda x: _within(x, offset=1),
    "far_apart": far_apart,
}
