"""Promise: the CUDA kernels compute the sigmoid family over images [N, C, P], seen on the host, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
import sigmoid_cases
from emulation import build, harness, image_layouts
from emulation.harness import BACKWARD, LOSS, SWEEP, Plan, Problem
from emulation.numerics import one_thread
from emulation.plans import DEVICES, constant, is_power_of_two
from emulation.sigmoid_numerics import Batch, check, poison

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
HALVES = (torch.bfloat16, torch.float16)
# Classes in one thread; over several, in one warp or in many.
PLANS = {
    "along": Plan(SWEEP, True, 32, lanes=32),
    "in_a_warp": Plan(SWEEP, True, 32, lanes=4),
    "warps": Plan(SWEEP, True, 128, lanes=32),
    "widest": Plan(SWEEP, True, 256, lanes=4),
    "single_pixels": Plan(SWEEP, False, 32, lanes=32),
    "single_pixels_spread": Plan(SWEEP, False, 64, lanes=16),
}
FEW = ("along", "in_a_warp", "single_pixels_spread")
SHAPES = ((3, 7, 35), (2, 19, 64), (1, 1, 96), (2, 70, 40), (5, 3, 1))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def batch(
    plan: str, shape: tuple[int, int, int], kind: str, option_set: str, elementwise: bool,
    dtype: torch.dtype = torch.float32, **how: Any,
) -> Batch:  # fmt: skip
    logits, target = sigmoid_cases.random_case(shape, kind, dtype)
    if kind == "class" and shape[2] >= 16:
        target[0, :16] = cases.IGNORE  # all that a thread has
    options = sigmoid_cases.options(option_set, logits)
    return Batch(PLANS[plan], (poison(logits, target), target), options, elementwise, **how)


@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan(plan: str, kind: str) -> None:
    for shape in SHAPES:
        for elementwise in (False, True):
            check(harness.run, batch(plan, shape, kind, "mixed", elementwise))


@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
def test_every_option(kind: str) -> None:
    for name in sigmoid_cases.sets_for(kind):
        for i, plan in enumerate(FEW):
            check(harness.run, batch(plan, (2, 21, 48), kind, name, i % 2 == 0))


@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize("dtype", HALVES, ids=cases.name)
def test_half_types(dtype: torch.dtype, kind: str) -> None:
    for plan in FEW:
        for shape in ((2, 19, 64), (3, 7, 35)):
            for name, elementwise in (("mixed", False), ("mixed_square", True)):
                case = batch(plan, shape, kind, name, elementwise, dtype)
                check(harness.run, case)
                if kind == "soft":
                    case.target = case.target.to(dtype)
                    check(harness.run, case)


def test_sums_of_many_classes_are_as_exact_as_of_few() -> None:
    logits = torch.full((1, 5000, 4), 0.3)  # equal losses: their roundings add up
    for target in (torch.zeros(1, 4, dtype=torch.int64), torch.zeros_like(logits)):
        check(harness.run, Batch(PLANS["along"], (logits, target), sigmoid_cases.options("plain", logits), False))


@pytest.mark.parametrize("kind", ["class", "soft"])
def test_infinite_and_undefined_logits(kind: str) -> None:
    logits, target = sigmoid_cases.random_case((2, 9, 16), kind)
    target = target.clamp(min=0)
    logits[0, 0, 1], logits[1, 3, 4], logits[1, 5, 9] = torch.inf, -torch.inf, torch.nan
    for name in ("plain", "focal_half", "focal"):
        for plan in FEW:
            options = sigmoid_cases.options(name, logits)
            check(harness.run, Batch(PLANS[plan], (logits, target), options, True), factor=2)


@pytest.mark.parametrize("kind", ["class", "hard"])
def test_infinite_upstream_gradients_and_weights_of_what_is_ignored(kind: str) -> None:
    logits, target = sigmoid_cases.random_case((2, 5, 64), kind)
    ignored = target == cases.IGNORE
    for elementwise in (True, False):
        up = torch.ones(2, 5, 64) if elementwise else torch.ones(2, 64)
        if elementwise or kind == "class":
            up.masked_fill_(ignored if kind == "hard" else ignored.unsqueeze(1) if elementwise else ignored, torch.inf)
        options = sigmoid_cases.options("focal", logits)
        if kind == "class":
            options["sample_weight"] = torch.ones(2, 64).masked_fill(ignored, torch.nan)
        for plan in FEW:
            up_rows = up if elementwise else up.view(-1)
            one = Batch(PLANS[plan], (poison(logits, target), target), options, elementwise, up_rows)
            harness.run(one.launches())
            for x in (*one.losses, *one.grads, one.written):
                assert x.isfinite().all()


@pytest.mark.parametrize("kind", ["class", "hard"])
def test_an_undefined_upstream_gradient_shows_where_the_slope_is_0(kind: str) -> None:
    logits = torch.full((1, 3, 64), -1e4)
    target = torch.zeros(1, 3, 64) if kind == "hard" else torch.zeros(1, 64, dtype=torch.int64)
    up = torch.ones(1, 3, 64)
    up[0, 1, 5:] = torch.nan
    for plan in FEW:
        one = Batch(PLANS[plan], (logits, target), sigmoid_cases.options("plain", logits), True, up)
        harness.run(one.launches())
        for grad in (*one.grads, one.written):
            assert torch.equal(grad.isnan(), up.isnan())


@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("layout", [name for name in image_layouts.LAYOUTS if name != "far_apart"])
def test_layouts(layout: str, dtype: torch.dtype, kind: str) -> None:
    """Pixels that begin anywhere within 16 bytes, the gradient's as the logits' and otherwise."""
    for plan, pixels in (("along", 64), ("in_a_warp", 40), ("single_pixels_spread", 37)):
        check(harness.run, batch(plan, (2, 8, pixels), kind, "mixed", False, dtype, layout=layout))
        apart = {"layout": layout, "grad_layout": "contiguous"}
        check(harness.run, batch(plan, (2, 8, pixels), kind, "mixed", True, dtype, **apart))


@pytest.mark.parametrize("kind", ["class", "soft"])
def test_offsets_of_64_bits(kind: str) -> None:
    for plan in FEW:
        for layouts in (("far_apart", "contiguous"), ("contiguous", "far_apart")):
            how = dict(zip(("layout", "grad_layout"), layouts, strict=True))
            check(harness.run, batch(plan, (2, 3, 16), kind, "focal", False, **how))


@pytest.mark.parametrize("upstream", ["stride0", "strided"])
def test_strides_of_upstream_and_target(upstream: str) -> None:
    for plan in FEW:
        up = cases.upstreams((2 * 64,), torch.float32)[upstream]
        case = batch(plan, (2, 7, 64), "class", "by_target", False, up=up)
        case.target = case.target.view(-1).repeat_interleave(3)[::3].view(-1)
        check(harness.run, case)


@pytest.mark.parametrize("plan", FEW)
def test_without_an_ignored_target(plan: str) -> None:
    logits, _ = sigmoid_cases.random_case((1, 19, 16), "class")
    one = Batch(PLANS[plan], (logits, torch.arange(16).view(1, 16)), {"alpha": None, "gamma": 2.0}, False)
    one.tail[4] = None
    check(harness.run, one)
    one.target = torch.rand(1, 19, 16)
    one.target[0, 0], one.logits[0, 0] = float(cases.IGNORE), 0.0  # out of [0, 1], but a number like others
    check(harness.run, one)


@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize("plan", FEW)
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (2, 3, 0)])
def test_nothing_there(shape: tuple[int, int, int], plan: str, kind: str) -> None:
    target = torch.zeros(shape) if kind == "soft" else torch.full((shape[0], shape[2]), cases.IGNORE)
    options = {"alpha": 0.25, "gamma": 2.0}
    for elementwise in (False, True):
        check(harness.run, Batch(PLANS[plan], (torch.zeros(shape), target), options, elementwise))


@pytest.mark.parametrize("plan", FEW)
@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_targets_out_of_range_trip_an_assertion(bad: int, plan: str) -> None:
    logits, target = sigmoid_cases.random_case((2, 50, 24), "class")
    target[1, 13] = bad
    for one in Batch(PLANS[plan], (logits, target), {"alpha": None, "gamma": 0.0}, False).launches():
        with pytest.raises(harness.LaunchFailed, match=r"device-side assertion: .*target"):
            harness.run([one])


@pytest.mark.parametrize("device", DEVICES)
def test_every_chosen_plan_can_run(device: str) -> None:
    most = constant("kBlockThreads")
    for size in (2, 4):
        for pixels in (1, 48, 1024, 512 * 512 * 8, 2**33):
            for classes in (1, 2, 21, 1203, 2**20):
                for alike in (True, False):
                    problem = Problem(LOSS, size, pixels, classes, False, alike, False)
                    plan = harness.plan_of(problem, DEVICES[device], "sigmoid_pixels_")
                    assert plan.vector == alike
                    assert plan.cluster == 1
                    assert is_power_of_two(plan.lanes)
                    assert is_power_of_two(plan.threads)
                    assert 32 <= plan.threads <= most
                    assert plan.lanes <= plan.threads
                    assert plan.lanes * (16 if alike else size) >= constant("kNarrowest")


def test_few_pixels_share_their_classes_among_threads() -> None:
    def groups(pixels: int, classes: int) -> int:
        problem = Problem(LOSS, 2, pixels, classes, False, True, False)
        plan = harness.plan_of(problem, DEVICES["H200"], "sigmoid_pixels_")
        return plan.threads // plan.lanes

    assert groups(2**22, 1203) == 1
    assert groups(1024, 1203) == constant("kBlockThreads") * 16 // constant("kNarrowest")
    assert groups(1024, 9) == 8, "no block of less than a warp"


def test_how_images_lie_is_seen() -> None:
    def lie(pixels: int, kind: str, dtype: torch.dtype, pass_: int = 2, **how: str) -> bool:
        one = batch("along", (2, 8, pixels), kind, "plain", True, dtype, **how)
        return bool(harness.describe(one.launches()[pass_]).alike)

    for dtype in harness.STORAGES:
        for kind in ("class", "soft"):
            assert lie(64, kind, dtype)
            assert lie(64, kind, dtype, layout="whole_vectors_apart")
            assert not lie(63, kind, dtype)
            for layout in ("class_stride", "image_stride", "offset"):
                assert not lie(64, kind, dtype, layout=layout)
                assert not lie(64, kind, dtype, grad_layout=layout)
            assert lie(64, kind, dtype, LOSS, grad_layout="offset"), "not written"
            assert not lie(64, kind, dtype, BACKWARD, grad_layout="class_stride")
    assert lie(4, "class", torch.float32)
    assert not lie(4, "class", torch.bfloat16)


@pytest.mark.parametrize("device", ["A100", "H200"])
def test_chosen_plans_give_right_results(device: str) -> None:
    for kind in ("class", "soft"):
        for shape in ((2, 21, 100), (1, 300, 64)):
            for dtype, layout in ((torch.float32, "offset"), (torch.bfloat16, "whole_vectors_apart")):
                one = batch("along", shape, kind, "mixed", shape[0] == 1, dtype, layout=layout)
                harness.run([harness.planned(x, DEVICES[device]) for x in one.launches()])
                one.check()


def sanitized() -> list[Batch]:
    found = []
    for plan in ("along", "in_a_warp", "warps", "single_pixels_spread"):
        for kind in ("class", "soft"):
            for i, dtype in enumerate(harness.STORAGES):
                layout = ("contiguous", "class_stride", "offset")[i]
                found.append(batch(plan, (2, 5 + i, 35), kind, "mixed", False, dtype, layout=layout))
                found.append(batch(plan, (2, 3, 64), kind, "mixed", i == 1, dtype, layout="whole_vectors_apart"))
    return found


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_sanitizers_find_nothing(flavour: str, tmp_path: Path) -> None:
    batches = sanitized() if flavour == "address" else sanitized()[1::4]
    launches = [one.otherwise() for b in batches for one in b.launches()]
    harness.run_apart(build.linked(flavour), launches, tmp_path)
    for one in batches:
        one.check()


def test_nothing_is_read_where_nothing_counts(tmp_path: Path) -> None:
    """Far more classes than the logits have: AddressSanitizer sees whoever looks for them."""
    for counted in (False, True):
        target = torch.full((1, 64), cases.IGNORE)
        target[0, 9] = 0 if counted else cases.IGNORE
        options = {"alpha": None, "gamma": 0.0}
        one = Batch(PLANS["along"], (torch.zeros(1, 3, 64), target), options, False).launches()[0]
        beyond = replace(one, fields={**one.fields, "num_classes": 1000})
        if counted:
            with pytest.raises(harness.LaunchFailed, match="heap-buffer-overflow"):
                harness.run_apart(build.linked("address"), [beyond], tmp_path)
        else:
            harness.run_apart(build.linked("address"), [beyond], tmp_path)
            assert torch.equal(one.fields["loss"], torch.zeros(64))


def test_both_barriers_are_missed_where_they_are_not(tmp_path: Path) -> None:
    """One before the groups' sums are added, one before the next pixels' are written."""
    one = batch("warps", (3, 9, 256), "class", "focal", False)
    launches = [x.otherwise() for x in one.launches()[:1]]
    met = harness.run_apart(build.linked("thread"), launches, tmp_path)
    assert len(met) == 2
    for barrier in met:
        with pytest.raises(harness.LaunchFailed, match="data race"):
            harness.run_apart(build.linked("thread"), launches, tmp_path, EMULATION_UNORDERED=barrier)
