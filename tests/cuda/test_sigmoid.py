"""Promise: the CUDA kernels compute the sigmoid family, seen on the host, where no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
import sigmoid_cases
from emulation import build, harness
from emulation.harness import SWEEP, WARP, Plan
from emulation.plans import DEVICES, assert_can_run, problems
from emulation.sigmoid_numerics import Batch, check, poison

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
HALVES = (torch.bfloat16, torch.float16)
SIZES = {1: 9, 11: 7, 64: 5, 127: 6, 1003: 3, 2100: 2}
PLANS = {
    "lane": Plan(WARP, True, 64, lanes=1),
    "lanes": Plan(WARP, True, 64, lanes=8),
    "warp": Plan(WARP, True, 64, lanes=32),
    "warp_of_single_elements": Plan(WARP, False, 64, lanes=32),
    "block": Plan(SWEEP, True, 64),
    "widest": Plan(SWEEP, True, 256),
    "cluster_2": Plan(SWEEP, True, 64, cluster=2),
    "cluster_16": Plan(SWEEP, True, 32, cluster=16),
    "single_elements": Plan(SWEEP, False, 32, cluster=2),
}
FEW = ("lanes", "block", "cluster_2", "warp_of_single_elements")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch's threads cost more than they give on tensors of this size, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(
    plan: str, shape: tuple[int, int], kind: str, option_set: str, elementwise: bool,
    dtype: torch.dtype = torch.float32, **how: Any,
) -> Batch:  # fmt: skip
    logits, target = sigmoid_cases.random_case(shape, kind, dtype)
    options = sigmoid_cases.options(option_set, logits)
    return Batch(PLANS[plan], (poison(logits, target), target), options, elementwise, **how)


@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan(plan: str, kind: str) -> None:
    for classes, rows in SIZES.items():
        if plan in ("widest", "cluster_16") and classes not in (1, 127, 2100):
            continue  # many threads are slow
        for elementwise in (False, True):
            check(harness.run, batch(plan, (rows, classes), kind, "mixed", elementwise))


@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
def test_every_option(kind: str) -> None:
    for name in sigmoid_cases.sets_for(kind):
        for i, plan in enumerate(FEW):
            check(harness.run, batch(plan, (6, 127), kind, name, i % 2 == 0))


@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize("dtype", HALVES, ids=cases.name)
def test_half_types(dtype: torch.dtype, kind: str) -> None:
    for plan in FEW:
        for classes in (11, 1003):
            for name, elementwise in (("mixed", False), ("mixed_square", True)):
                case = batch(plan, (4, classes), kind, name, elementwise, dtype)
                check(harness.run, case)
                if kind == "soft":
                    case.target = case.target.to(dtype)
                    check(harness.run, case)


@pytest.mark.parametrize("gamma", cases.GAMMAS)
def test_saturation(gamma: float) -> None:
    """Every margin on both sides, for both classes and between, in value and gradient, with nothing clipped."""
    z = torch.tensor([sign * margin for margin in (17.0, 20.0, 89.0, 1e4) for sign in (1.0, -1.0)])
    y = torch.tensor([0.0, 1.0, 0.4])[:, None].expand(3, 8).contiguous()
    for alpha in (None, 0.25):
        options = {"alpha": alpha, "gamma": gamma, "ignore_index": cases.IGNORE}
        check(harness.run, Batch(PLANS["lanes"], (z.repeat(3, 1), y), options, True))
        for target in (0, 1):
            case = torch.stack([z, -z], 1), torch.full((8,), target)
            check(harness.run, Batch(PLANS["lane"], case, options, True))
    if gamma == 0:
        plain = {"alpha": None, "gamma": 0.0}
        one = Batch(PLANS["lane"], (torch.tensor([[17.0]]), torch.tensor([[0.0]])), plain, True)
        harness.run(one.launches())
        assert one.losses[0].item() == 17.0


@pytest.mark.parametrize("kind", ["class", "soft"])
def test_infinite_and_undefined_logits(kind: str) -> None:
    for classes in (9, 70):
        logits, target = sigmoid_cases.random_case((6, classes), kind)
        target = target.clamp(min=0)
        logits[0, 0], logits[1, 3], logits[2, 5] = torch.inf, -torch.inf, torch.nan
        for name in ("plain", "focal_half", "focal"):
            for plan in FEW:
                options = sigmoid_cases.options(name, logits)
                check(harness.run, Batch(PLANS[plan], (logits, target), options, True), factor=2)


@pytest.mark.parametrize("kind", ["class", "hard"])
def test_infinite_upstream_gradients_of_what_is_ignored(kind: str) -> None:
    logits, target = sigmoid_cases.random_case((9, 70), kind)
    up = torch.ones(9, 70).masked_fill((target == cases.IGNORE).reshape(9, -1), torch.inf)
    for plan in FEW:
        one = Batch(PLANS[plan], (logits, target), sigmoid_cases.options("focal", logits), True, up)
        check(harness.run, one)
        assert one.grads[0].isfinite().all()


@pytest.mark.parametrize("kind", ["class", "hard"])
def test_an_undefined_upstream_gradient_shows_where_the_slope_is_0(kind: str) -> None:
    logits = torch.full((3, 70), -1e4)
    target = torch.zeros(3, 70) if kind == "hard" else torch.zeros(3, dtype=torch.int64)
    up = torch.ones(3, 70)
    up[1, 2:] = torch.nan
    for plan in FEW:
        one = Batch(PLANS[plan], (logits, target), sigmoid_cases.options("plain", logits), True, up)
        harness.run(one.launches())
        for grad in (*one.grads, one.written):
            assert torch.equal(grad.isnan(), up.isnan())


@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("layout", ["row_stride", "offset"])
def test_layouts(layout: str, dtype: torch.dtype, kind: str) -> None:
    """Rows that begin anywhere within 16 bytes, the other matrices' rows alike, and otherwise."""
    for classes in (5, 64, 1003):
        for plan in ("lanes", "block", "cluster_2"):
            check(harness.run, batch(plan, (5, classes), kind, "mixed", False, dtype, layout=layout))
        for plan in ("warp_of_single_elements", "single_elements"):
            apart = {"layout": layout, "grad_layout": "contiguous"}
            check(harness.run, batch(plan, (5, classes), kind, "mixed", True, dtype, **apart))


@pytest.mark.parametrize("kind", ["class", "soft"])
def test_offsets_of_64_bits(kind: str) -> None:
    for plan in FEW:
        for layouts in (("far_apart", "contiguous"), ("contiguous", "far_apart")):
            how = dict(zip(("layout", "grad_layout"), layouts, strict=True))
            check(harness.run, batch(plan, (2, 64), kind, "focal", False, **how))


@pytest.mark.parametrize("upstream", ["stride0", "strided"])
def test_strides_of_upstream_and_target(upstream: str) -> None:
    up = cases.upstreams((6,), torch.float32)[upstream]
    for plan in FEW:
        case = batch(plan, (6, 127), "class", "by_target", False, up=up)
        case.target = case.target.repeat_interleave(3)[::3]
        check(harness.run, case)


def test_class_vectors_anywhere() -> None:
    """Weights that begin at no 16-byte boundary."""
    for kind in ("class", "soft"):
        logits, target = sigmoid_cases.random_case((5, 128), kind)
        options = sigmoid_cases.options("mixed", logits)
        for name in ("weight", "pos_weight"):
            options[name] = cases.LAYOUTS["offset"](options[name])
        check(harness.run, Batch(PLANS["lanes"], (poison(logits, target), target), options, False))


@pytest.mark.parametrize("plan", FEW)
def test_without_an_ignored_target(plan: str) -> None:
    logits, _ = sigmoid_cases.random_case((4, 19), "class")
    one = Batch(PLANS[plan], (logits, torch.tensor([0, 5, 18, 1])), {"alpha": None, "gamma": 2.0}, False)
    one.tail[4] = None
    check(harness.run, one)
    one.target = torch.rand(4, 19)
    one.target[0], one.logits[0] = float(cases.IGNORE), 0.0  # out of [0, 1], but a number like others
    check(harness.run, one)


@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize("plan", FEW)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_there(shape: tuple[int, int], plan: str, kind: str) -> None:
    target = torch.zeros(shape) if kind == "soft" else torch.full(shape[:1], cases.IGNORE)
    options = {"alpha": 0.25, "gamma": 2.0}
    for elementwise in (False, True):
        check(harness.run, Batch(PLANS[plan], (torch.zeros(shape), target), options, elementwise))


@pytest.mark.parametrize("plan", FEW)
@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_targets_out_of_range_trip_an_assertion(bad: int, plan: str) -> None:
    logits, target = sigmoid_cases.random_case((4, 50), "class")
    target[2] = bad
    options = {"alpha": None, "gamma": 0.0}
    for one in Batch(PLANS[plan], (logits, target), options, False).launches():
        with pytest.raises(harness.LaunchFailed, match=r"device-side assertion: .*target"):
            harness.run([one])


@pytest.mark.parametrize("device", DEVICES)
def test_every_chosen_plan_can_run(device: str) -> None:
    for problem in problems():
        plan = harness.plan_of(problem, DEVICES[device], "sigmoid_")
        if plan.regime == WARP:
            plan = Plan(SWEEP, plan.vector, plan.threads)  # no row is held in registers
            assert problem.num_classes <= 2048
        assert_can_run(problem, plan, device)
        assert plan.vector == problem.alike


def test_how_matrices_lie_is_seen() -> None:
    def lie(classes: int, kind: str, dtype: torch.dtype, elementwise: bool, **how: str) -> bool:
        return bool(
            harness.describe(batch("block", (3, classes), kind, "plain", elementwise, dtype, **how).launches()[2]).alike
        )

    for dtype in harness.STORAGES:
        for kind in ("class", "soft"):
            for classes in (64, 127):
                assert lie(classes, kind, dtype, True)
            assert not lie(64, kind, dtype, False, layout="offset", grad_layout="contiguous")
            assert not lie(64, kind, dtype, False, grad_layout="row_stride")
    assert lie(64, "class", torch.bfloat16, False, layout="offset")
    assert not lie(64, "class", torch.bfloat16, True, layout="offset")
    assert lie(64, "soft", torch.bfloat16, False, layout="offset"), "one element past a boundary, each in its type"


@pytest.mark.parametrize("device", ["A100", "H200"])
def test_chosen_plans_give_right_results(device: str) -> None:
    for kind in ("class", "soft"):
        for classes in (10, 1000, 50257):
            for dtype, layout in ((torch.float32, "offset"), (torch.bfloat16, "row_stride")):
                one = batch("block", (2, classes), kind, "mixed", classes == 1000, dtype, layout=layout)
                harness.run([harness.planned(x, DEVICES[device]) for x in one.launches()])
                one.check()


def sanitized() -> list[Batch]:
    found = []
    for plan in ("lanes", "block", "cluster_2", "single_elements"):
        for kind in ("class", "soft"):
            for i, dtype in enumerate(harness.STORAGES):
                layout = ("contiguous", "offset", "row_stride")[i]
                found.append(batch(plan, (5, 123 + i), kind, "mixed", False, dtype, layout=layout))
                found.append(batch(plan, (3, 64), kind, "mixed", True, dtype))
    return found


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_sanitizers_find_nothing(flavour: str, tmp_path: Path) -> None:
    batches = sanitized() if flavour == "address" else sanitized()[::3]
    launches = [one.otherwise() for b in batches for one in b.launches()]
    harness.run_apart(build.linked(flavour), launches, tmp_path)
    for one in batches:
        one.check()
