"""Promise: whatever the problem and the GPU, csrc/cuda/plan.h chooses a launch that can run and gives right results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cases
from emulation import build, harness
from emulation.harness import BACKWARD, LOSS, LOSS_AND_GRAD, SHARED, SWEEP, WARP, Problem
from emulation.numerics import Batch, one_thread, swept
from emulation.plans import DEVICES, assert_can_run, problems

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("device", DEVICES)
def test_every_plan_can_run(device: str) -> None:
    for problem in problems():
        plan = harness.plan_of(problem, DEVICES[device])
        try:
            assert_can_run(problem, plan, device)
        except AssertionError as error:
            fields = {name: getattr(problem, name) for name, _ in Problem._fields_}
            raise AssertionError(f"{error}: {plan} for {fields}") from None


# Rows of 16-bit elements in loss and gradient -> regime.
EXPECTED = [
    ("H200", 10, WARP),
    ("H200", 1000, WARP),
    ("H200", 4096, SHARED),
    ("H200", 128256, SHARED),
    ("H200", 2**20, SHARED),
    ("H200", 2**22, SWEEP),
    ("A100", 1000, WARP),
    ("A100", 32000, SHARED),
    ("A100", 128256, SWEEP),
    ("B200", 2**20, SHARED),
    ("RTX 5090", 128256, SHARED),
]


@pytest.mark.parametrize(("device", "classes", "regime"), EXPECTED)
def test_a_row_stays_on_chip_as_long_as_it_fits(device: str, classes: int, regime: int) -> None:
    aligned = classes * 2 % 16 == 0
    plan = harness.plan_of(Problem(LOSS_AND_GRAD, 2, 4096, classes, aligned, True, False), DEVICES[device])
    assert plan.regime == regime
    for pass_ in (LOSS, BACKWARD):
        once = harness.plan_of(Problem(pass_, 2, 4096, classes, aligned, True, False), DEVICES[device])
        assert once.regime == (WARP if regime == WARP else SWEEP), "nothing to keep"


def test_few_rows_are_spread_over_the_multiprocessors() -> None:
    plans = [harness.plan_of(Problem(LOSS, 2, n, 128256, True, True, False), DEVICES["H200"]) for n in (1, 4096)]
    assert [plan.cluster > 1 for plan in plans] == [True, False]


def test_how_rows_lie_is_seen() -> None:
    def lie(classes: int, layout: str, grad_layout: str) -> tuple[bool, bool]:
        batch = Batch(swept(), cases.random_case(3, classes), {}, layout=layout, grad_layout=grad_layout)
        problem = harness.describe(batch.launches()[1])
        return problem.aligned, problem.alike

    assert lie(128, "contiguous", "contiguous") == (True, True)
    assert lie(127, "contiguous", "contiguous") == (False, True)
    assert lie(128, "offset", "offset") == (False, True)
    assert lie(128, "offset", "contiguous") == (False, False)
    assert lie(128, "contiguous", "row_stride") == (False, False)


@pytest.mark.parametrize("device", ["A100", "H200", "RTX 5090"])
@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
def test_chosen_plans_give_right_results(dtype: torch.dtype, device: str) -> None:
    for classes, grad_layout in (
        (10, None),
        (1000, None),
        (1003, None),
        (1003, "contiguous"),
        (6000, None),
        (50257, None),
    ):
        logits, target = cases.random_case(2, classes, dtype)
        case = cases.poison_ignored(logits, target), target
        options = cases.options("mixed", classes, target, dtype)
        batch = Batch(
            swept(), case, options, layout="offset" if classes == 1003 else "contiguous", grad_layout=grad_layout
        )
        launches = [harness.planned(one, DEVICES[device]) for one in batch.launches()]
        harness.run(launches)
        batch.check()
