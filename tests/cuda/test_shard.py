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
from shard_cases import VECTORS, expected_grad, expected_stats, shard_case, told_case, told_gradient, told_stats
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
@pytest.mark.parametrize("option_set", ["plain", "smoothing_weight", "mixed_tail", "tail_linear"])
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
@pytest.mark.parametrize("option_set", ["plain", "mixed_tail"])
@pytest.mark.parametrize("classes", [1, 3, 64, 1000, 4099])
def test_apply(classes: int, option_set: str, dtype: torch.dtype, plan: Plan) -> None:
    logits, target = shard_case(classes, dtype)
    options = cases.options(option_set, classes, target, dtype)
    tail = cases.operator_options(classes, apply_options(options))
    for smooth in (0.0, 0.3):  # row by row: kernels learn it from the coefficients
        row_grad = torch.randn(6, 5, generator=cases.generator(2))
        row_grad[:, 0] = expected_stats(logits, target, options, False)[:, 0].clamp(min=0.0) + 2.0
        row_grad[:, 3] *= smooth
        row_grad[2] = torch.nan
        row_grad[3, 2] = 0.0
        z = cases.LAYOUTS["offset"](logits)
        grad = cases.LAYOUTS["offset"](harness.poisoned(logits.shape, dtype))
        one = softmax_launch(APPLY, plan, z, target, tail, grad=grad, row_grad=row_grad)
        over_plans(one)
        eager = told_gradient(logits, target, row_grad, None, options)[1]
        assert_close(grad, expected_grad(logits, target, row_grad, options), eager, what="gradient", factor=2)
        over_plans(replace(one, fields={**one.fields, "grad": z, "grad_stride": z.stride(0)}))
        assert_same(z, grad, "in place")


def apply_options(options: cases.Options) -> cases.Options:
    """What the operator hands to its kernel."""
    names = {*VECTORS, "scale", "softcap", "compensation"} - {"class_margin"}
    return {"label_smoothing": 1.0} | {k: v for k, v in options.items() if k in names}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("option_set", ["target_scale", "seesaw", "mixed_tail"])
@pytest.mark.parametrize("classes", [1, 64, 1003])
def test_terms_that_others_tell(classes: int, option_set: str, dtype: torch.dtype, plan: Plan) -> None:
    """Of every row's target, wherever it is: the terms that its own class has here are not asked for."""
    options = cases.options(option_set, classes, torch.zeros(9))
    logits, target, terms = told_case(9, classes, dtype)
    kept = {k: v for k, v in options.items() if k not in ("complement_gamma", "focal_gamma")}
    tail = cases.operator_options(classes, kept | {"label_smoothing": 1.0})
    stats = harness.poisoned((9, 5))
    over_plans(softmax_launch(ACCUMULATE, plan, logits, target, tail, stats=stats, target_terms=terms))
    truth, eager = told_stats(logits, target, terms, options)
    assert_close(stats, truth, eager, what="stats", factor=4)
    row_grad = torch.randn(9, 5, generator=cases.generator(2))
    row_grad[:, 0] = truth[:, 0].clamp(min=0.0)
    tail = cases.operator_options(classes, apply_options(options))
    grad = harness.poisoned(logits.shape, dtype)
    over_plans(softmax_launch(APPLY, plan, logits, target, tail, grad=grad, row_grad=row_grad, target_terms=terms))
    assert_close(grad, *told_gradient(logits, target, row_grad, terms, options), what="gradient", factor=4)


@pytest.mark.parametrize("option_set", ["plain", "mixed_tail"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_shard_without_classes(plan: Plan, option_set: str) -> None:
    logits, target = torch.empty(6, 0), torch.tensor([-1, cases.IGNORE, -1, -1, -1, -1])
    stats, terms = harness.poisoned((6, 5)), torch.tensor([0.5, 0.0, -3.0]).expand(6, 3).contiguous()
    options = apply_options(cases.options(option_set, 0, target))
    tail = cases.operator_options(0, options)
    over_plans(softmax_launch(ACCUMULATE, plan, logits, target, tail, stats=stats, target_terms=terms))
    expected = torch.tensor([-torch.inf, 0.0, 0.0, 0.0, 0.0]).expand(6, 5).clone()
    expected[1] = 0.0
    assert_same(stats, expected)
    grad, row_grad = logits.clone(), torch.randn(6, 5)
    harness.run([softmax_launch(APPLY, plan, logits, target, tail, grad=grad, row_grad=row_grad, target_terms=terms)])


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_sanitizers_find_nothing(flavour: str, tmp_path: Path) -> None:
    requests = []
    for plan in PLANS.values():
        for classes, option_set in ((3, "mixed_tail"), (1000, "plain"), (1000, "seesaw"), (4099, "plain")):
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


def test_targets_are_read_before_the_gradient_takes_their_place(tmp_path: Path) -> None:
    """Blocks of a cluster wait for each other, and for that alone."""
    logits, target = shard_case(1000)
    row_grad = torch.randn(6, 5, generator=cases.generator(2))

    def met(option_set: str, **environment: str) -> set[str]:
        tail = cases.operator_options(1000, apply_options(cases.options(option_set, 1000, target)))
        z = logits.clone()
        one = softmax_launch(APPLY, PLANS["cluster"], z, target, tail, grad=z, row_grad=row_grad)
        return set(harness.run_apart(build.linked("thread"), [one.otherwise()], tmp_path, **environment))

    barriers = met("seesaw") - met("mitigation")
    with pytest.raises(harness.LaunchFailed, match="data race"):
        met("seesaw", EMULATION_UNORDERED=" ".join(barriers))


def test_a_target_of_no_shard_trips_an_assertion() -> None:
    logits, target = shard_case(50)
    for bad in (-2, 50):
        target[0] = bad
        launch = softmax_launch(ACCUMULATE, PLANS["block"], logits, target, cases.operator_options(50, {}),
                                stats=harness.poisoned((6, 5)))  # fmt: skip
        with pytest.raises(harness.LaunchFailed, match=r"device-side assertion: .*target"):
            harness.run([launch])
