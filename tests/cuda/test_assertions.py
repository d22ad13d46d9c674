"""Promise: a target out of range trips the device-side assertion of every CUDA kernel, seen on the host."""

from __future__ import annotations

from typing import Any

import pytest

import sigmoid_cases
from batches import SigmoidBatch, SoftmaxBatch, random_case
from emulation import build, harness
from emulation.plans import PIXELS, REGIMES, SIGMOID_PIXELS, SIGMOID_REGIMES, launches

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[int, ...]]] = {
    "softmax": (REGIMES, ("block", "cluster_2", "kept_2", "single_elements", "warp"), (4, 50)),
    "softmax_images": (PIXELS, tuple(PIXELS), (2, 50, 8)),
    "sigmoid": (SIGMOID_REGIMES, ("lanes", "block", "cluster_2", "warp_of_single_elements"), (4, 50)),
    "sigmoid_images": (SIGMOID_PIXELS, ("along", "in_a_warp", "single_pixels_spread"), (2, 50, 24)),
}


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
@pytest.mark.parametrize(("family", "name"), [(family, name) for family, x in FAMILIES.items() for name in x[1]])
def test_targets_out_of_range_trip_an_assertion(family: str, name: str, bad: int) -> None:
    plans, _, shape = FAMILIES[family]
    one: SoftmaxBatch | SigmoidBatch
    if family.startswith("softmax"):
        logits, target = random_case(shape, ignore=False)
        one = SoftmaxBatch(plans[name], (logits, target), {})
    else:
        logits, target = sigmoid_cases.random_case(shape, "class")
        one = SigmoidBatch(plans[name], (logits, target), {"alpha": None, "gamma": 0.0}, False)
    target.view(-1)[2 if len(shape) == 2 else -11] = bad
    for launch in launches(one):
        with pytest.raises(harness.LaunchFailed, match=r"device-side assertion: .*target"):
            harness.run([launch])
