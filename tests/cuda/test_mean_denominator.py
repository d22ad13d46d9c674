"""Promise: one launch finds what a mean divides by, and one the mean: no digit is lost, the bits stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import cases
import longtail
from emulation import build, harness
from emulation.devices import CLUSTER, DEVICES, is_power_of_two
from emulation.harness import SWEEP, Launch, Plan
from tolerances import assert_same

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
PLANS = {
    "warp": Plan(SWEEP, False, 32),
    "block": Plan(SWEEP, False, 128),
    "widest": Plan(SWEEP, False, 512),
    "cluster_2": Plan(SWEEP, False, 64, cluster=2),
    "cluster_16": Plan(SWEEP, False, 32, cluster=16),
}
CLASSES = 37
ROWS = (0, 1, 31, 33, 700, 5003)


def random_targets(rows: int) -> Tensor:
    target = torch.randint(CLASSES, (rows,), generator=cases.generator(rows))
    target[::3] = cases.IGNORE
    return target


def launch(plan: Plan, target: Tensor, weight: Tensor | None) -> Launch:
    """The result is one of three places, of which the others must stay as they are."""
    result = torch.full((3,), -7, dtype=torch.int64 if weight is None else weight.dtype)
    return harness.mean_denominator(plan, target, weight, CLASSES, result[1:2])


def result(one: Launch) -> Tensor:
    (value,) = one.fields["result"]
    return value


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_every_target_counts_once(name: str, dtype: torch.dtype | None, rows: int) -> None:
    weight = None if dtype is None else torch.rand(CLASSES, generator=cases.generator(5), dtype=dtype)
    target = random_targets(rows)
    counted = target[target != cases.IGNORE]
    expected = torch.tensor(len(counted)) if weight is None else weight.double()[counted].sum()
    for laid in (target, torch.stack([target, target - 10**9], 1)[:, 0], target.flip(0)):
        one = launch(PLANS[name], laid, weight)
        harness.run([one])
        error = (result(one) - expected).abs()
        assert error <= expected * torch.finfo(dtype).eps if dtype else error == 0
        again = launch(PLANS[name], laid, weight).otherwise()
        harness.run([again])
        assert_same(result(again), result(one), "in another order")


@pytest.mark.parametrize("counted", [torch.int64, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_the_mean(name: str, dtype: torch.dtype, counted: torch.dtype) -> None:
    for rows in ROWS:
        loss = torch.randn(rows, 2, generator=cases.generator(rows), dtype=dtype)[:, 0] + 1000
        for denominator in (torch.tensor(7, dtype=counted), torch.tensor(0, dtype=counted)):
            bits = []
            for otherwise in (False, True):
                mean, divisor = (torch.full((3,), -7.0, dtype=dtype) for _ in range(2))
                one = harness.mean_loss(PLANS[name], loss, denominator, mean[1:2], divisor[1:2])
                harness.run([one.otherwise() if otherwise else one])
                bits.append(mean)
            truth = (loss.double().sum() / denominator).to(dtype)
            torch.testing.assert_close(mean[1], truth, rtol=2 * torch.finfo(dtype).eps, atol=0.0, equal_nan=True)
            assert divisor[1] == (denominator if denominator else torch.inf)
            assert mean[::2].tolist() == divisor[::2].tolist() == [-7.0, -7.0]
            assert_same(bits[1], bits[0], "in another order")


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=str)
def test_nothing_counts(dtype: torch.dtype | None) -> None:
    weight = None if dtype is None else torch.full((CLASSES,), torch.nan, dtype=dtype)
    one = launch(PLANS["cluster_2"], torch.full((500,), cases.IGNORE), weight)
    harness.run([one])
    assert result(one) == 0


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_no_numbers_pass_through(value: float) -> None:
    weight = torch.ones(CLASSES)
    weight[3] = value
    one = launch(PLANS["block"], torch.arange(CLASSES).repeat(9), weight)
    harness.run([one])
    assert_same(result(one), torch.tensor(value))


def test_many_small_weights_beside_a_large_one() -> None:
    """A plain float32 sum would lose them."""
    weight = torch.full((CLASSES,), 0.1)
    weight[0] = 2.0**24
    target = torch.ones(300_000, dtype=torch.int64)
    target[0] = 0
    one = launch(PLANS["warp"], target, weight)
    harness.run([one])
    assert_same(result(one), weight.double()[target].sum().float())


@pytest.mark.parametrize("bad", [-1, CLASSES, 2**40])
@pytest.mark.parametrize("name", ["block", "cluster_2"])
def test_a_target_out_of_range_trips_the_assertion(name: str, bad: int) -> None:
    target = random_targets(700)
    target[-5] = bad
    with pytest.raises(harness.LaunchFailed, match="device-side assertion: target is out of bounds"):
        harness.run([launch(PLANS[name], target, None)])


@pytest.mark.parametrize("device", DEVICES)
def test_plans(device: str) -> None:
    """Few targets take a block, and many as large a cluster as there is."""
    for rows in (0, 1, 100, 8192, 8193, 2**20, 2**40):
        plan = harness.mean_plan_of(rows, DEVICES[device])
        assert is_power_of_two(plan.threads)
        assert 32 <= plan.threads <= 512
        assert plan.threads >= min(rows, 512)
        assert is_power_of_two(plan.cluster)
        assert plan.cluster == min(CLUSTER[device], 1 << (-(-max(rows, 1) // 8192) - 1).bit_length())


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_sanitizers_find_nothing(flavour: str, tmp_path: Path) -> None:
    requests = []
    for name in ("block", "cluster_2", "cluster_16"):
        for rows in ROWS if flavour == "address" else (700,):
            target = random_targets(rows)
            requests += [launch(PLANS[name], target, w) for w in (None, torch.rand(CLASSES))]
            requests.append(launch(PLANS[name], target.repeat_interleave(2)[::2], torch.rand(CLASSES).double()))
    harness.run_apart(build.linked(flavour), requests, tmp_path)


def test_its_barriers_are_missed_where_they_are_not(tmp_path: Path) -> None:
    for name in ("block", "cluster_2"):
        one = launch(PLANS[name], random_targets(700), torch.rand(CLASSES)).otherwise()
        met = harness.run_apart(build.linked("thread"), [one], tmp_path)
        missed = []
        for barrier in met:
            try:
                harness.run_apart(build.linked("thread"), [one], tmp_path, EMULATION_UNORDERED=barrier)
            except harness.LaunchFailed as error:
                missed.append("data race" in str(error))
        assert any(missed), met


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 1, 1000, 2**20 + 3, 2**25])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=str)
def test_on_a_gpu(dtype: torch.dtype | None, rows: int) -> None:
    weight = None if dtype is None else torch.rand(CLASSES, device="cuda", dtype=dtype) + 0.1
    target = torch.randint(CLASSES, (rows, 2), device="cuda")
    target[::3] = cases.IGNORE
    for laid in (target[:, 0], target[:, 0].contiguous()):
        counted = laid[laid != cases.IGNORE]
        expected = torch.tensor(len(counted)) if weight is None else weight.double()[counted].sum()
        with longtail.use_backend("cuda"):
            values = [torch.ops.longtail.mean_denominator(laid, weight, cases.IGNORE, CLASSES) for _ in range(3)]
        assert (values[0].double() - expected).abs() <= expected * (torch.finfo(dtype).eps if dtype else 0)
        for again in values[1:]:
            assert_same(again, values[0])
