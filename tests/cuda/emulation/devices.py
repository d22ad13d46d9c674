"""Devices, the kinds of problems there are, and what makes a plan one that can run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

from . import build, harness
from .harness import ACCUMULATE, APPLY, BACKWARD, LOSS, LOSS_AND_GRAD, SHARED, WARP, Device, Plan, Problem

KB = 1024
# compute capability, multiprocessors, shared memory of a block and of a multiprocessor
DEVICES = {
    "A100": Device(80, 108, 163 * KB, 164 * KB),
    "L40": Device(89, 142, 99 * KB, 100 * KB),
    "H200": Device(90, 132, 227 * KB, 228 * KB),
    "B200": Device(100, 148, 227 * KB, 228 * KB),
    "RTX 5090": Device(120, 170, 99 * KB, 100 * KB),
}
CLUSTER = {"A100": 1, "L40": 1, "H200": 16, "B200": 16, "RTX 5090": 8}  # the largest that it has
CLASSES = [0, 1, 2, 31, 127, 256, 257, 512, 1000, 1024, 1025, 4096, 5003, 32000, 50257, 128256, 2**20, 2**22, 2**29]
PASSES = (LOSS, BACKWARD, LOSS_AND_GRAD, ACCUMULATE, APPLY)


def constant(name: str) -> int:
    """A number of plan.h."""
    found = re.search(rf"constexpr int {name} = (\d+);", (build.KERNELS / "plan.h").read_text())
    assert found, f"plan.h has no {name}"
    return int(found.group(1))


def problems() -> Iterator[Any]:
    """Every kind there is, of rows that can be: whole vectors have rows that can be aligned."""
    sizes = itertools.product(PASSES, (2, 4), (1, 7, 300, 2**31 + 5), CLASSES)
    for (pass_, size, rows, classes), alike, extras in itertools.product(sizes, (True, False), (True, False)):
        for aligned in {False, alike and classes * size % 16 == 0}:
            yield Problem(pass_, size, rows, classes, aligned, alike, extras)


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def assert_can_run(problem: Any, plan: Plan, device: str) -> None:
    assert is_power_of_two(plan.threads)
    assert plan.threads % 32 == 0, "whole warps"
    assert is_power_of_two(plan.cluster)
    assert plan.cluster <= CLUSTER[device]
    assert harness.shared_bytes(plan, problem) <= DEVICES[device].shared_per_block
    if plan.regime == WARP:
        assert plan.threads <= constant("kWarpThreads")
        assert is_power_of_two(plan.lanes)
        assert plan.lanes <= 32
        assert is_power_of_two(plan.batch)
        assert plan.batch <= plan.lanes, "each row of a batch has a lane"
        assert problem.pass_ not in (ACCUMULATE, APPLY), "no warp has a shard's rows"
        assert problem.num_classes <= plan.lanes * (32 if plan.vector else 16), "a row is in its lanes' registers"
        assert problem.aligned or not plan.vector
        assert plan.cluster == 1
    else:
        assert plan.threads <= constant("kBlockThreads")
        assert problem.alike or problem.pass_ in (LOSS, ACCUMULATE) or not plan.vector
    if plan.regime == SHARED:
        assert problem.pass_ == LOSS_AND_GRAD
        assert plan.vector
