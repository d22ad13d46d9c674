"""Promise: by chunks of classes the fused linear loss is what it is by chunks of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from linear_cases import Data, assert_results, fused, plain, problem, truth
from longtail.linear import classes as linear_classes
from longtail.linear import cost as linear_cost
from longtail.linear import rows as linear_rows
from longtail.linear.cost import Task
from longtail.reference import softmax
from tolerances import assert_close

CLASSES = 200  # chunks of 64, 64, 64 and 8
NAMES = ("loss", "stats", "input", "weight", "bias")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_classes, "PLAN", linear_classes.Plan(share=4, least=1, budget=1 << 20))


def choose(monkeypatch: pytest.MonkeyPatch, by_classes: bool) -> None:
    monkeypatch.setattr(linear_rows, "by_classes", lambda *_: by_classes)


def operator(data: Data, upstream: Tensor, needs: tuple[bool, bool, bool], known: bool = False, **options: Any) -> Any:
    """Loss, statistics and gradients in float64; ``known``: from the statistics that a forward has found."""
    values, dtypes = cases.operator_options(data[1].shape[0], options), [torch.float64] * 4
    stats = linear_rows.row_losses(linear_rows.SOFTMAX, *data, 0, *dtypes[:2], *values)[1] if known else None
    return linear_rows.row_losses_and_grad(linear_rows.SOFTMAX, upstream, *data, stats, 0, *dtypes, *needs, *values)


@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
def test_equals_chunks_of_rows(option_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = problem(CLASSES, torch.float64)
    x, weight, _, target = data
    target[[2, 3, 4, 5]] = torch.tensor([64, 127, 128, CLASSES - 1])  # the first and the last of a chunk
    data = (cases.poison_ignored(x, target), weight.t().contiguous().t(), *data[2:])
    options = cases.options(option_set, CLASSES, target, torch.float64)
    if "class_bias" in options:
        options["class_bias"][:70] = -torch.inf  # a chunk of classes that are all out of the question
        target[target >= 0] = target[target >= 0].clamp(min=70)
    upstream = torch.randn(len(target), dtype=torch.float64)
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        choose(monkeypatch, False)
        want = operator(data, upstream, needs, **options)
        choose(monkeypatch, True)
        for known in (False, True):
            got = operator(data, upstream, needs, known, **options)
            for what, a, b in zip(NAMES, got, want, strict=True):
                if what == "stats":
                    # m, d and t may refer to another maximum: what they say is what counts.
                    a, b = (torch.stack(softmax.posterior(s)).masked_fill(target < 0, 0.0) for s in (a, b))
                assert_close(a, b, what=what)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("option_set", ["plain", "mixed", "seesaw"])
@pytest.mark.parametrize("amx", [False, True])
def test_bfloat16(amx: bool, option_set: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_classes, "has_amx", lambda: amx)
    choose(monkeypatch, True)
    data = problem(CLASSES, torch.bfloat16, rows=40)
    options = cases.options(option_set, CLASSES, data[3]) | {"reduction": reduction}
    shape = (40,) if reduction == "none" else ()
    up = cases.upstreams(shape, torch.float32)["random"]
    expected, eager = truth(data, up, **options), plain(data, up, **options)
    actual = fused(data, up, **options)
    assert_results(actual, expected, eager, factor=2)
    choose(monkeypatch, False)
    assert any(not torch.equal(a, b) for a, b in zip(fused(data, up, **options), actual, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("option_set", ["target_scale", "seesaw", "mixed_tail"])
def test_saturated_rows(option_set: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets tens and thousands above or below the others, by what the targets bring, ahead of the first chunk."""
    choose(monkeypatch, True)
    x, weight, bias, target = problem(CLASSES, dtype, rows=40)
    for row, gap in enumerate((20.0, -20.0, 100.0, -100.0, 1e4, -1e4)):
        own = weight[target[row]].double()
        x[row] = gap * own / own.square().sum()
    bias[:] = 0.0
    options = cases.options(option_set, CLASSES, target, dtype) | {"reduction": "none"}
    up = cases.upstreams((40,), torch.float32)["random"]
    data = (x, weight, bias, target)
    assert_results(fused(data, up, **options), truth(data, up, **options), plain(data, up, **options), factor=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=cases.name)
def test_logits_of_targets_are_those_of_the_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the order of a sum, and in whatever pieces."""
    x, weight, bias, _ = problem(CLASSES, dtype, rows=40)
    target = torch.arange(40) * 5
    for pieces in (1, 100, 1 << 18):
        monkeypatch.setattr(linear_classes, "_GATHERED", pieces)
        for b in (None, bias):
            found = linear_classes._target_logits(x, weight, b, target)
            assert found.dtype == dtype
            wanted = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            wanted = wanted.gather(1, target[:, None])[:, 0]
            bound = (16 if dtype == torch.float64 else 1) * torch.finfo(dtype).eps * wanted.abs().clamp(min=1)
            assert ((found.double() - wanted).abs() <= bound).all()


def test_autocast_makes_float32_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, True)
    x, weight, bias, target = problem(CLASSES, torch.float32, rows=40)
    with torch.autocast("cpu", torch.bfloat16):
        actual = fused((x, weight, bias, target))
    assert [t.dtype for t in actual] == [torch.float32] * 4
    half = tuple(t.bfloat16() for t in (x, weight, bias))
    assert_results(actual, truth((x, weight, bias, target)), plain((*half, target)), factor=2)  # type: ignore[arg-type]


def test_logits_are_made_twice_but_for_the_last_and_once_where_statistics_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose(monkeypatch, True)
    data = problem(CLASSES, torch.float64)
    seen: list[int] = []
    make = linear_classes.make_logits
    monkeypatch.setattr(linear_classes, "make_logits", lambda *args: (seen.append(args[1].shape[0]), make(*args)))
    upstream = torch.ones(20).double()
    operator(data, upstream, (True, True, True))
    assert seen == [64, 64, 64, 8, 64, 64, 64]
    seen.clear()
    operator(data, upstream, (True, True, True), known=True)
    assert seen == [64, 64, 64, 8, 8, 64, 64, 64]
    seen.clear()
    fused(data, upstream, reduction="none")
    assert seen == [64, 64, 64, 8, 8, 64, 64, 64]


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BOTH, NONE = (True, True), (False, False)
BY_CLASSES = [  # of (2048, 512) features and 32768 classes where nothing else is said
    (True, Task(2048, 512, BF16, BOTH)),
    (False, Task(2048, 512, FP32, BOTH)),
    (False, Task(2048, 512, FP16, BOTH)),
    (True, Task(2048, 512, FP32, NONE)),
    (True, Task(2048, 512, FP32, BOTH, known=True)),
    (False, Task(128, 512, BF16, BOTH)),
    (False, Task(512, 16, BF16, BOTH)),
]


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize(("expected", "task"), BY_CLASSES)
def test_the_cheaper_way(expected: bool, task: Task, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(linear_cost, "has_amx", lambda: amx)
    x, weight = torch.empty(task.rows, task.features), torch.empty(32768, task.features)
    assert linear_rows._goes_by_classes(x, weight, *task[2:]) == expected


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
