"""Promise: by chunks of classes the fused linear loss is what it is by chunks of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from linear_cases import Data, assert_results, fused, plain, problem, truth
from longtail.linear import classes as linear_classes
from longtail.linear import rows as linear_rows
from longtail.options import SoftmaxOptions
from longtail.reference import softmax
from tolerances import assert_close

CLASSES = 200  # chunks of 64, 64, 64 and 8
NAMES = ("loss", "stats", "input", "weight", "bias")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_classes, "PLAN", linear_classes.Plan(share=4, least=1, budget=1 << 20))


def operator(by_classes: bool, data: Data, upstream: Tensor, needs: tuple[bool, bool, bool], **options: Any) -> Any:
    """Loss, statistics and gradients in float64, one way or the other."""
    x, weight, bias, target = data
    values = cases.operator_options(weight.shape[0], options)
    if not by_classes:
        dtypes = [torch.float64] * 4
        return linear_rows.linear_softmax_loss_and_grad(upstream, x, weight, bias, target, 7, *dtypes, *needs, *values)
    with torch.no_grad():
        return linear_classes.loss_and_grad(
            upstream, x, weight, bias, target, torch.float64, torch.float64, needs, SoftmaxOptions(*values)
        )


@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
def test_equals_chunks_of_rows(option_set: str) -> None:
    data = problem(CLASSES, torch.float64)
    x, weight, _, target = data
    target[[2, 3, 4, 5]] = torch.tensor([64, 127, 128, CLASSES - 1])  # the first and the last of a chunk
    data = (cases.poison_ignored(x, target), weight.t().contiguous().t(), *data[2:])
    options = cases.options(option_set, CLASSES, target, torch.float64)
    if "class_bias" in options:
        options["class_bias"][:70] = -torch.inf  # a chunk of classes that are all out of the question
        target[target >= 0] = target[target >= 0].clamp(min=70)
    upstream = torch.randn(len(target), dtype=torch.float64)
    for needs in ((True, True, True), (False, True, False)):
        got, want = (operator(way, data, upstream, needs, **options) for way in (True, False))
        for what, a, b in zip(NAMES, got, want, strict=True):
            if what == "stats":
                # m, d and t may refer to another maximum: what they say is what counts.
                a, b = (torch.stack(softmax.posterior(s)).masked_fill(target < 0, 0.0) for s in (a, b))
            assert_close(a, b, what=what)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("option_set", ["plain", "mixed"])
def test_bfloat16_takes_this_way(option_set: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = problem(CLASSES, torch.bfloat16, rows=40)
    options = cases.options(option_set, CLASSES, data[3]) | {"reduction": reduction}
    shape = (40,) if reduction == "none" else ()
    up = cases.upstreams(shape, torch.float32)["random"]
    expected, eager = truth(data, up, **options), plain(data, up, **options)
    actual = fused(data, up, **options)
    assert_results(actual, expected, eager, factor=2)
    monkeypatch.setattr(linear_classes, "pays", lambda *_: False)
    assert any(not torch.equal(a, b) for a, b in zip(fused(data, up, **options), actual, strict=True))


def test_autocast_makes_float32_gradients() -> None:
    x, weight, bias, target = problem(CLASSES, torch.float32, rows=40)
    with torch.autocast("cpu", torch.bfloat16):
        actual = fused((x, weight, bias, target))
    assert [t.dtype for t in actual] == [torch.float32] * 4
    half = tuple(t.bfloat16() for t in (x, weight, bias))
    assert_results(actual, truth((x, weight, bias, target)), plain((*half, target)), factor=2)  # type: ignore[arg-type]


def test_four_gemms_a_chunk_but_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _, target = problem(CLASSES, torch.float64)
    seen = []
    make = linear_classes.make_logits
    monkeypatch.setattr(linear_classes, "make_logits", lambda *args: (seen.append(args[1].shape[0]), make(*args)))
    operator(True, (x, weight, torch.zeros(CLASSES).double(), target), torch.ones(20).double(), (True, True, True))
    assert seen == [64, 64, 64, 8, 64, 64, 64]


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 2048, 100_000])
@pytest.mark.parametrize("classes", [1, 63, 32768, 1_000_000])
def test_chunks(rows: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    plan = linear_classes.PLAN
    size = linear_classes.chunk_classes(rows, classes, 2)
    assert 1 <= size <= classes
    assert size == classes or size % 64 == 0
    if rows > plan.least:
        assert (size - 64) * rows <= classes * max(plan.least, -(-rows // plan.share))
    else:
        assert size == classes
