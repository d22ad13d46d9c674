"""Promise: gradients that add up over chunks do so in float32 at least: the more there are, errors grow no larger."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from linear_cases import Data, fused, problem, truth
from longtail.linear import chunks as linear_chunks
from longtail.linear import classes as linear_classes
from longtail.linear import rows as linear_rows

ROWS = 128
INPUT, WEIGHT, BIAS = range(3)  # gradients
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


class Float32Sums:
    """Stands in for a GPU's GEMMs from a half type into float32, on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.added = 0, 0
        self._mm, self._addmm = torch.mm, torch.addmm
        monkeypatch.setattr(linear_chunks, "_gives_float32", lambda x: x.dtype.itemsize == 2)
        monkeypatch.setattr(torch, "mm", self.mm)
        monkeypatch.setattr(torch, "addmm", self.addmm)

    def mm(self, a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        assert out_dtype in (None, torch.float32)
        return self._mm(a, b, out=out) if out_dtype is None else self._mm(a.float(), b.float(), out=out)

    def addmm(self, x: Tensor, a: Tensor, b: Tensor, *, out: Tensor, beta: int = 1, **given: Any) -> Tensor:
        if not given:
            return self._addmm(x, a, b, beta=beta, out=out)
        assert given == {"out_dtype": torch.float32}
        assert x is out
        self.added += beta
        self.begun += not beta
        return self._addmm(x, a.float(), b.float(), beta=beta, out=out)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many products of a few rows: threads would wait for each other all the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def errors(data: Data, device: str = "cpu", **options: Any) -> Tensor:
    """Of the gradients of input, weight and bias, relative to their norms."""
    expected = truth(data, reduction="sum")[1:]
    moved: Any = tuple(x.to(device) for x in data)
    actual = fused(moved, reduction="sum", **options)[1:]
    pairs = zip(actual, expected, strict=True)
    return torch.stack([(got.cpu().double() - want).norm() / want.norm() for got, want in pairs])


def growth(one: Tensor, two: Tensor, *more: Tensor) -> Tensor:
    """Largest errors of many chunks, by those of one or two: where a product is rounded, parts that cancel out tell."""
    return torch.stack(more).amax(0) / torch.maximum(one, two)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("signs", ["alike", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.name)
def test_chunks_of_rows(dtype: torch.dtype, signs: str, device: str) -> None:
    """Weight and bias. All rows of one class: products that add up to a sum far above each, or that cancel out."""
    x, weight, bias, target = problem(8, dtype, ROWS, seed=3)
    data = (x.abs() if signs == "alike" else x), weight, bias, torch.zeros_like(target)
    few = [errors(data, device, chunk_size=ROWS // chunks) for chunks in (1, 2)]
    more = [errors(data, device, chunk_size=ROWS // chunks) for chunks in (16, ROWS)]
    assert (growth(*few, *more)[WEIGHT:] <= 1.5).all()
    # Not by "forward": float16 that is kept for backward adds up in float32 anyway.
    narrow = errors(data, device, chunk_size=1, accumulate_dtype=dtype, gradient="backward")
    assert (growth(*few, narrow)[WEIGHT:] > 2.5).all(), "which is what float32 is for"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.name)
def test_chunks_of_rows_in_gemms_that_add_up(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is rounded by itself: however many chunks, the weight's gradient is rounded once."""
    data = problem(8, dtype, ROWS, seed=3)
    modes = "forward", "backward"
    one = [errors(data, chunk_size=ROWS, gradient=gradient) for gradient in modes]
    gemms = Float32Sums(monkeypatch)
    many = [errors(data, chunk_size=4, gradient=gradient) for gradient in modes]
    assert (torch.stack(many) <= 1.05 * torch.stack(one)).all()
    counted = int((data[3] != cases.IGNORE).sum())  # on the CPU the others are left out
    assert (gemms.begun, gemms.added) == (2, 2 * (-(-counted // 4) - 1))


@pytest.mark.parametrize("signs", ["alike", "mixed"])
def test_chunks_of_classes(signs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input. The targets are in the last chunk, of 64 classes, whose product comes first and is the largest."""
    x, weight, bias, target = problem(64 * 64, torch.bfloat16, ROWS, seed=3)
    data = x * 0.01, (weight.abs() if signs == "alike" else weight), bias * 0.0, torch.full_like(target, 64 * 64 - 1)

    monkeypatch.setattr(linear_rows, "by_classes", lambda *_: True)

    def in_chunks(count: int) -> Tensor:
        monkeypatch.setattr(linear_classes, "PLAN", linear_classes.Plan(share=count, least=1, budget=1 << 30))
        return errors(data)

    few, many = [in_chunks(count) for count in (1, 2)], in_chunks(64)
    assert growth(*few, many)[INPUT] <= 1.5
    monkeypatch.setattr(linear_classes, "arithmetic_dtype", lambda dtype: dtype)
    assert growth(*few, in_chunks(64))[INPUT] > 2.5, "which is what float32 is for"
