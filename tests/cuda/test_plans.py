"""Promise: whatever the problem and the GPU, csrc/cuda/plan.h chooses a launch that can run and gives right results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import cases
import sigmoid_cases
from batches import Batch, ProbabilityBatch, SigmoidBatch, SoftmaxBatch, one_thread, probability_case, random_case
from emulation import build, harness
from emulation.devices import DEVICES, assert_can_run, constant, is_power_of_two, problems
from emulation.harness import BACKWARD, LOSS, LOSS_AND_GRAD, SHARED, SWEEP, WARP, Plan, Problem
from emulation.plans import launches, over_pixels, swept

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


def test_many_short_rows_are_taken_together() -> None:
    """As long as every multiprocessor has warps enough."""
    rows = (1, 4096, 32768, 2**20)
    plans = [harness.plan_of(Problem(LOSS, 2, n, 1000, True, True, False), DEVICES["H200"]) for n in rows]
    assert [plan.batch for plan in plans] == [1, 1, 4, 8]


def image_problems() -> Iterator[Any]:
    for pass_ in (LOSS, BACKWARD, LOSS_AND_GRAD):
        for classes in (0, 1, 2, 5, 19, 21, 80, 150, 1203, 5000, 128256, 2**24 - 1):
            for rows in (1, 64, 4096, 2**20, 2**33):
                for size, aligned in ((2, True), (4, True), (2, False), (4, False)):
                    for by_target in (False, True):
                        yield Problem(pass_, size, rows, classes, aligned, aligned, by_target, True, False, by_target)


@pytest.mark.parametrize("device", ["A100", "H200", "RTX 5090"])
def test_every_plan_for_images_can_run(device: str) -> None:
    for problem in image_problems():
        plan = harness.plan_of(problem, DEVICES[device])
        said = f"{plan} for {[getattr(problem, name) for name, _ in Problem._fields_]}"
        assert plan.vector == problem.aligned, said
        assert plan.threads in (32, 64, 128, 256), said
        assert plan.threads <= (128 if plan.vector and problem.element_size == 2 else 256), said
        assert plan.lanes in (8, 16, 32, 64, 128, 256), said
        assert plan.lanes <= plan.threads, said
        assert plan.lanes >= (8 if plan.vector else 32), said
        assert harness.shared_bytes(plan, problem) <= DEVICES[device].shared_per_block, said
        assert plan.regime == SWEEP or (plan.regime == SHARED and problem.pass_ == LOSS_AND_GRAD), said


@pytest.mark.parametrize(
    ("classes", "rows", "expected"),
    [
        (21, 2**21, Plan(SHARED, True, 128, 128)),
        (1203, 2**22, Plan(SHARED, True, 128, 8)),
        (5000, 2**22, Plan(SWEEP, True, 128, 8)),
        (1203, 512, Plan(SHARED, True, 128, 8)),
    ],
)
def test_logits_stay_on_chip_as_long_as_they_fit(classes: int, rows: int, expected: Plan) -> None:
    assert (
        harness.plan_of(Problem(LOSS_AND_GRAD, 2, rows, classes, True, True, False, True), DEVICES["H200"]) == expected
    )
    once = harness.plan_of(Problem(LOSS, 2, rows, classes, True, True, False, True), DEVICES["H200"])
    assert once.regime == SWEEP
    assert (once.lanes < once.threads) == (rows < 2**16), "few pixels share their classes' threads"


@pytest.mark.parametrize("device", DEVICES)
def test_every_plan_for_elements_can_run(device: str) -> None:
    for problem in problems():
        plan = harness.plan_of(problem, DEVICES[device], "sigmoid_")
        if plan.regime == WARP:
            plan = Plan(SWEEP, plan.vector, plan.threads)  # no row is held in registers
            assert problem.num_classes <= 2048
        assert_can_run(problem, plan, device)
        assert plan.vector == problem.alike


@pytest.mark.parametrize("device", DEVICES)
def test_every_plan_for_images_of_elements_can_run(device: str) -> None:
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


SOFTMAX_ROWS = [((2, n), "contiguous", "contiguous") for n in (10, 1000, 6000, 50257)]
SOFTMAX_ROWS += [((2, 1003), "offset", "offset"), ((2, 1003), "offset", "contiguous")]


def softmax_batches(dtype: torch.dtype) -> Iterator[Batch]:
    for shape, layout, grad_layout in SOFTMAX_ROWS:
        case = random_case(shape, dtype)
        options = cases.options("mixed_tail", shape[1], case[1], dtype)
        yield SoftmaxBatch(swept(), case, options, layout=layout, grad_layout=grad_layout)
    for shape in ((2, 21, 16), (1, 100, 9), (1, 1203, 8)):
        case = random_case(shape, dtype)
        for option_set in ("mixed", "mixed_tail"):
            options = cases.options(option_set, shape[1], case[1], dtype)
            yield SoftmaxBatch(over_pixels(32, 128), case, options)


def sigmoid_batches(kind: str) -> Iterator[Batch]:
    for plans, shape, elementwise, layouts in (
        *((swept(), (2, n), n == 1000, ("offset", "row_stride")) for n in (10, 1000, 50257)),
        (over_pixels(32, 32), (2, 21, 100), False, ("offset", "whole_vectors_apart")),
        (over_pixels(32, 32), (1, 300, 64), True, ("offset", "whole_vectors_apart")),
    ):
        for dtype, layout in zip((torch.float32, torch.bfloat16), layouts, strict=True):
            logits, target = sigmoid_cases.random_case(shape, kind, dtype)
            case = sigmoid_cases.poisoned(logits, target), target
            options = sigmoid_cases.options("mixed", logits)
            yield SigmoidBatch(plans, case, options, elementwise, layout=layout)


def dense_batches(dtype: torch.dtype) -> Iterator[Batch]:
    for shape, layout, target_layout in SOFTMAX_ROWS:
        case = probability_case(shape, dtype, torch.float32 if shape[1] == 1000 else dtype)
        options = cases.options("all_of_probabilities", shape[1], case[1][:, 0])
        yield ProbabilityBatch(swept(), case, options, layout=layout, target_layout=target_layout)


def check_planned(batch: Batch, device: str) -> None:
    harness.run([harness.planned(one, DEVICES[device]) for one in launches(batch)])
    batch.check()


@pytest.mark.parametrize("device", ["A100", "H200", "RTX 5090"])
@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
def test_chosen_plans_give_right_softmax(dtype: torch.dtype, device: str) -> None:
    for batch in softmax_batches(dtype):
        check_planned(batch, device)


@pytest.mark.parametrize("device", ["A100", "H200"])
def test_chosen_plans_give_right_losses_of_class_probabilities(device: str) -> None:
    for dtype in harness.STORAGES:
        for batch in dense_batches(dtype):
            check_planned(batch, device)


@pytest.mark.parametrize("device", DEVICES)
def test_every_plan_for_class_probabilities_can_run(device: str) -> None:
    for problem in problems():
        problem.dense = True
        plan = harness.plan_of(problem, DEVICES[device])
        assert plan == harness.plan_of(problem, DEVICES[device], "sigmoid_")
        assert plan.shared == harness.shared_bytes(plan, problem), "what its joins need"


@pytest.mark.parametrize("device", ["A100", "H200", "RTX 5090"])
@pytest.mark.parametrize("kind", ["class", "soft"])
def test_chosen_plans_give_right_sigmoid(kind: str, device: str) -> None:
    for batch in sigmoid_batches(kind):
        check_planned(batch, device)
