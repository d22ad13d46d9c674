"""Matrices [N, C] and images [N, C, P] of contiguous pixels laid out otherwise; whatever lies between is NaN."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch
from torch import Tensor

import cases


def _mapped(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Far-apart strides of which only what x itself touches takes memory."""
    count = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(mmap.mmap(-1, count * x.itemsize, flags), dtype=x.dtype)
    return memory.as_strided(x.shape, strides).copy_(x)


def _within(x: Tensor, classes: int = 0, pixels: int = 0, between: int = 0, offset: int = 0) -> Tensor:
    """Among so many more classes and pixels, with elements between the images and before the first of them."""
    n, c, p = x.shape
    stride = (c + classes) * (p + pixels) + between
    memory = torch.full((offset + n * stride,), torch.nan, dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, (stride, p + pixels, 1), offset).copy_(x)


def _inside(x: Tensor, first: int) -> Tensor:
    """From pixel `first` and class 1 of images of two more classes and 16 more pixels."""
    n, c, p = x.shape
    larger = torch.full((n, c + 2, p + 16), torch.nan, dtype=x.dtype, device=x.device)
    return larger[:, 1:-1, first : first + p].copy_(x)


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    **cases.LAYOUTS,
    "far_apart": lambda x: _mapped(x, (2**31 + 24, 1)),  # rows more than 2^31 elements apart
}
IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": cases.LAYOUTS["contiguous"],
    "whole_vectors_apart": lambda x: _within(x, classes=2, pixels=16),
    "class_stride": lambda x: _within(x, pixels=3),
    "image_stride": lambda x: _within(x, between=3),
    "offset": lambda x: _within(x, offset=1),
    "inside_8": lambda x: _inside(x, 8),
    "inside_3": lambda x: _inside(x, 3),
    # Images, and the classes of each, more than 2^31 bytes apart.
    "far_apart": lambda x: _mapped(x, (x.shape[1] * (2**30 + 24), 2**30 + 24, 1)),
}


def laid(x: Tensor, layout: str) -> Tensor:
    return (IMAGES if x.dim() == 3 else ROWS)[layout](x)


def assert_padding_untouched(x: Tensor, what: str) -> None:
    """Whatever lies in the storage of x but not in x is NaN, as the layouts leave it."""
    everything = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    outside = torch.ones_like(everything, dtype=torch.bool)
    outside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
    assert everything[outside].isnan().all(), f"{what}: written outside of it"
