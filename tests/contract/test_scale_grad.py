"""Promise: a gradient made in forward is scaled in place, row by row or pixel by pixel, but where nothing counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cases
from batches import Kernels
from emulation.harness import STORAGES
from emulation.plans import swept
from interpreted import FACTOR, HALVES, INTERPRETED
from kernels import CPU, TRITON, over
from layouts import assert_padding_untouched, laid
from tolerances import assert_close, assert_same

EMULATED = {"emulated-scaling": swept()}
ROWS = ["contiguous", "row_stride", "offset"]
IMAGES = ["contiguous", "whole_vectors_apart", "offset"]
FLOATS = (torch.float32, *HALVES)


def assert_scaled(actual: Tensor, expected: Tensor, what: str) -> None:
    """Rounded once, but by the interpreter, which cuts off."""
    if INTERPRETED:
        assert_close(actual, expected.double(), what=what, factor=FACTOR[actual.dtype])
    else:
        assert_same(actual.clone(), expected, what)


@pytest.mark.parametrize(
    ("kernels", "shape", "dtype", "layout"),
    [
        *over(CPU, [(5, 33), (6, 1000)], cases.DTYPES, ROWS),
        *over(CPU, [(2, 5, 300), (3, 70, 7)], cases.DTYPES, IMAGES),
        *over(TRITON, [(6, 3), (6, 33), (6, 5000)], FLOATS, ROWS),
        *over(TRITON, [(2, 5, 32), (3, 70, 7)], FLOATS, IMAGES),
        *over(EMULATED, [(6, 1), (6, 3), (6, 33), (6, 1000), (6, 5003)], STORAGES, ROWS),
        *over(EMULATED, [(2, 5, 32), (3, 70, 7), (1, 1, 8), (2, 1030, 16)], STORAGES, IMAGES),
    ],
)
def test_scale_grad(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    n, _, *pixels = shape
    rows = n * pixels[0] if pixels else n
    grad = torch.randn(shape, generator=cases.generator(3)).to(dtype)
    wide = cases.vector_dtype(dtype)
    factors = cases.upstreams((rows,), wide)
    factors["some"] = torch.where(torch.arange(rows) % 16 < 8, 1.0, -2.0).to(wide)
    factors["every_other"] = torch.tensor([1.0, -2.0, 1.0, 0.5, 1.0, 1.0], dtype=wide).repeat(rows)[:rows]
    factors["ones"] = torch.ones((), dtype=wide).expand(rows)
    for name, factor in factors.items():
        of_row = factor.reshape(n, 1, *pixels)
        actual = laid(grad, layout)
        kernels.scale(actual, factor)
        assert_scaled(actual, (grad.to(wide) * of_row).to(dtype), name)
        assert_padding_untouched(actual, "gradient")


@pytest.mark.parametrize(
    ("kernels", "shape", "dtype", "layout"),
    [
        *over(CPU, [(12, 33)], cases.DTYPES, ROWS),
        *over(CPU, [(2, 7, 300)], cases.DTYPES, IMAGES),
        *over(TRITON, [(12, 3), (12, 33), (12, 5000), (2, 5, 32), (3, 70, 7)], FLOATS, ["contiguous"]),
        *over(EMULATED, [(12, 1), (12, 33), (700, 17), (12, 5003)], STORAGES, ROWS),
        *over(EMULATED, [(2, 5, 32), (3, 70, 7), (1, 1, 24)], STORAGES, IMAGES),
    ],
)
def test_ignored_rows_are_left_alone(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    for name, grad, factor, target, expected in cases.scalings(shape, dtype):
        actual = laid(grad, layout)
        kernels.scale(actual, factor, target)
        assert_scaled(actual, expected, name)
