"""Promise: the CUDA kernels give the statistics and the gradient of one shard of the classes, seen on the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cases
from emulation import build, harness
from emulation.harness import ACCUMULATE, APPLY, Plan
from emulation.passes import softmax_launch
from emulation.plans import swept
from shard_cases import expected_grad, expected_stats, shard_case
from tolerances import assert_close, assert_same

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
PLANS = {
    "block": swept().loss,
    "cluster": swept(4, threads=32).loss,
    "single_elements": swept(2, vector=False, threads=32).loss,
}


def over_plans(launch: harness.Launch) -> None:
    """Twice, the second time in another order: to the same bits."""
    harness.run([launch])
    written = launch.fields["stats"] if launch.pass_ == ACCUMULATE else launch.fields["grad"]
    before = written.clone()
    if launch.fields["grad"] is not launch.fields["logits"]:
        harness.run([launch.otherwise()])
    assert_same(written, before, "in another order")


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("option_set", ["plain", "smoothing_weight", "mixed", "mixed_linear"])
@pytest.mark.parametrize("classes", [1, 3, 64, 1000, 4099])
def test_accumulate(classes: int, option_set: str, plan: Plan) -> None:
    logits, target = shard_case(classes)
    options = cases.options(option_set, classes, target)
    for smoothing in (False, True):
        wanted = {k: v for k, v in options.items() if k not in ("label_smoothing", "complement_gamma", "focal_gamma")}
        tail = cases.operator_options(classes, {**wanted, "label_smoothing": float(smoothing)})
        stats = harness.poisoned((6, 5))
        over_plans(softmax_launch(ACCUMULATE, plan, cases.LAYOUTS["offset"](logits), target, tail, stats=stats))
        truth = expected_stats(logits, target, options, smoothing)
        assert_close(stats, truth, what="stats", factor=8 if smoothing else 2)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("option_set", ["plain", "mixed"])
@pytest.mark.parametrize("classes", [1, 3, 64, 1000, 4099])
def test_apply(classes: int, option_set: str, dtype: torch.dtype, plan: Plan) -> None:
    logits, target = shard_case(classes, dtype)
    options = cases.options(option_set, classes, target, dtype)
    wanted = {k: v for k, v in options.items() if k in ("weight", "class_bias", "scale", "softcap")}
    tail = cases.operator_options(classes, {**wanted, "label_smoothing": 1.0})
    for smooth in (0.0, 0.3):  # row by row: kernels learn it from the coefficients
        row_grad = torch.randn(6, 5, generator=cases.generator(2))
        row_grad[:, 0] = torch.where(target[:, None] == cases.IGNORE, 0.0, logits.float()).amax(1) + 2.0
        row_grad[:, 3] *= smooth
        row_grad[2] = torch.nan
        row_grad[3, 2] = 0.0
        z = cases.LAYOUTS["offset"](logits)
        grad = cases.LAYOUTS["offset"](harness.poisoned(logits.shape, dtype))
        one = softmax_launch(APPLY, plan, z, target, tail, grad=grad, row_grad=row_grad)
        over_plans(one)
        assert_close(grad, expected_grad(logits, target, row_grad, options), what="gradient", factor=2)
        over_plans(replace(one, fields={**one.fields, "grad": z, "grad_stride": z.stride(0)}))
        assert_same(z, grad, "in place")


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_shard_without_classes(plan: Plan) -> None:
    logits, target = torch.empty(6, 0), torch.tensor([-1, cases.IGNORE, -1, -1, -1, -1])
    stats = harness.poisoned((6, 5))
    over_plans(softmax_launch(ACCUMULATE, plan, logits, target, cases.operator_options(0, {}), stats=stats))
    expected = torch.tensor([-torch.inf, 0.0, 0.0, 0.0, 0.0]).expand(6, 5).clone()
    expected[1] = 0.0
    assert_same(stats, expected)
    tail = cases.operator_options(0, {"label_smoothing": 1.0})
    harness.run([softmax_launch(APPLY, plan, logits, target, tail, grad=logits.clone(), row_grad=torch.randn(6, 5))])


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_sanitizers_find_nothing(flavour: str, tmp_path: Path) -> None:
    requests = []
    for plan in PLANS.values():
        for classes, option_set in ((3, "mixed"), (1000, "plain"), (4099, "plain")):
            logits, target = shard_case(classes, torch.bfloat16)
            tail = cases.operator_options(classes, cases.options(option_set, classes, target, torch.bfloat16))
            row_grad = torch.randn(6, 5, generator=cases.generator(2)) * torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
            z = cases.LAYOUTS["offset"](logits)
            written = cases.LAYOUTS["offset"](logits)
            requests += [
                softmax_launch(ACCUMULATE, plan, z, target, tail, stats=harness.poisoned((6, 5))),
                softmax_launch(APPLY, plan, z, target, tail, grad=cases.LAYOUTS["offset"](logits), row_grad=row_grad),
                softmax_launch(APPLY, plan, written, target, tail, grad=written, row_grad=row_grad),
            ]
    harness.run_apart(build.linked(flavour), requests, tmp_path)


def test_a_target_of_no_shard_trips_an_assertion() -> None:
    logits, target = shard_case(50)
    for bad in (-2, 50):
        target[0] = bad
        launch = softmax_launch(ACCUMULATE, PLANS["block"], logits, target, cases.operator_options(50, {}),
                                stats=harness.poisoned((6, 5)))  # fmt: skip
        with pytest.raises(harness.LaunchFailed, match=r"device-side assertion: .*target"):
            harness.run([launch])
