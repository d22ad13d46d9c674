"""Promise: the emulated CUDA kernels of the sigmoid family with every option equal float64 in each of their ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import sigmoid_cases
from batches import SigmoidBatch, check
from emulation import build, harness
from emulation.plans import SIGMOID_PIXELS, SIGMOID_REGIMES, Plans

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
BALANCED = {"rebalance_alpha": 0.1, "rebalance_beta": 10.0, "rebalance_mu": 0.2}
# name -> the numbers, and the vectors; "inverse_counts" with what belongs to it.
OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "asymmetric": ({"gamma": 1.0, "gamma_negative": 4.0, "clip": 0.05, "detach": True}, ()),
    "attached": ({"alpha": 0.25, "gamma": 0.0, "gamma_negative": 2.5, "clip": 0.2}, ("pos_weight",)),
    "balanced": ({"gamma": 2.0, "negative_scale": 2.0, **BALANCED}, ("class_bias", "inverse_counts")),
    "vectors": ({"gamma_negative": 3.0}, ("weight", "class_alpha", "class_gamma", "sample_weight")),
    "own_exponents": ({"gamma": 7.0, "gamma_negative": 3.0, "alpha": 0.7}, ("weight", "class_bias")),
    "smoothed": ({"gamma": 1.5, "clip": 0.05, "label_smoothing": 0.1, "negative_scale": 0.5}, ("sample_weight",)),
    "everything": (
        {"clip": 0.1, "detach": True, "negative_scale": 1.5, "label_smoothing": 0.1, **BALANCED},
        ("weight", "pos_weight", "sample_weight", "class_bias", "class_alpha", "class_gamma", "inverse_counts"),
    ),
}


def options(name: str, logits: Tensor) -> dict[str, Any]:
    numbers, names = OPTIONS[name]
    g = cases.generator(7)

    def uniform(size: tuple[int, ...], low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=g)

    sizes = {"sample_weight": (logits.shape[0], *logits.shape[2:])}
    ranges = {"class_bias": (-1.0, 1.0), "class_alpha": (0.0, 1.0), "class_gamma": (0.0, 4.0)}
    made = {x: uniform(sizes.get(x, (logits.shape[1],)), *ranges.get(x, (0.2, 2.0))) for x in names}
    return {"alpha": None, "gamma": 0.0, **numbers, **made}


def batch(
    plans: Plans, shape: tuple[int, ...], kind: str, name: str, elementwise: bool, dtype: torch.dtype = torch.float32
) -> SigmoidBatch:
    logits, target = sigmoid_cases.random_case(shape, kind, dtype)
    if kind == "hard":  # a row without any label
        target[0] = torch.where(target[0] == 1, 0.0, target[0])
    if kind == "class" and len(shape) == 3 and shape[2] >= 16:
        target[0, :16] = cases.IGNORE  # all that a thread has
    case = sigmoid_cases.poisoned(logits, target), target
    return SigmoidBatch(plans, case, options(name, logits), elementwise)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
def test_every_option(kind: str, name: str) -> None:
    for i, dtype in enumerate(harness.STORAGES):
        for plan, shape in (("lanes", (4, 123)), ("block", (3, 600))):
            check(batch(SIGMOID_REGIMES[plan], shape, kind, name, i == 1, dtype))
        for plan, shape in (("along", (2, 7, 48)), ("single_pixels_spread", (1, 70, 35))):
            check(batch(SIGMOID_PIXELS[plan], shape, kind, name, i == 2, dtype))


@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
@pytest.mark.parametrize("plan", SIGMOID_REGIMES)
def test_every_way_over_rows(plan: str, kind: str) -> None:
    for shape in ((9, 1), (6, 127)) + (() if plan in ("widest", "cluster_16") else ((2, 2100),)):
        for dtype in harness.STORAGES[:2]:
            one = batch(SIGMOID_REGIMES[plan], shape, kind, "balanced", False, dtype)
            check(one)
            if kind == "soft" and dtype != torch.float32:
                one.target = one.target.to(dtype)
                check(one)


@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
@pytest.mark.parametrize("plan", SIGMOID_PIXELS)
def test_every_way_over_images(plan: str, kind: str) -> None:
    for shape in ((3, 7, 35), (1, 3, 96), (2, 70, 40)):
        for dtype in harness.STORAGES[:2]:
            check(batch(SIGMOID_PIXELS[plan], shape, kind, "balanced", False, dtype))


def test_class_vectors_that_no_vector_of_logits_is_aligned_with() -> None:
    for name in ("weight", "class_bias", "class_alpha", "class_gamma", "inverse_counts", "pos_weight"):
        logits, target = sigmoid_cases.random_case((3, 128), "soft")
        chosen = options("everything", logits)
        chosen[name] = cases.LAYOUTS["offset"](chosen[name])
        check(SigmoidBatch(SIGMOID_REGIMES["lanes"], (logits, target), chosen, False))


MARGINS = (1.5, 3.0, 20.0, 87.0, 88.5, 100.0, 1e4, torch.inf)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_saturation(gamma: float, clip: float) -> None:
    """Every margin on both sides for hard and soft targets, and NaN, in value and gradient, unclipped."""
    z = torch.tensor([*(sign * margin for margin in MARGINS for sign in (1.0, -1.0)), 0.0, torch.nan])
    y = torch.tensor([0.0, 1.0, 0.4, 0.999, 1e-5])[:, None].expand(5, len(z)).contiguous()
    for gamma_negative in (None, 0.0, 0.5, 4.0):
        for more in ({}, {"detach": True}, {"negative_scale": 2.0}, {"label_smoothing": 0.1}):
            chosen = {"alpha": 0.25, "gamma": gamma, "gamma_negative": gamma_negative, "clip": clip, **more}
            check(SigmoidBatch(SIGMOID_REGIMES["lanes"], (z.repeat(5, 1), y), chosen, True))


def test_without_a_label_every_weight_is_the_highest() -> None:
    """The sum of inverse counts is 0, and the ratio infinite: 1 + rebalance_alpha."""
    for plan, shape in ((SIGMOID_REGIMES["cluster_2"], (2, 70)), (SIGMOID_PIXELS["warps"], (1, 70, 40))):
        logits, _ = sigmoid_cases.random_case(shape, "hard")
        numbers = {"alpha": None, "gamma": 2.0}
        weighted = SigmoidBatch(
            *(
                plan,
                (logits, torch.zeros(shape)),
                {**numbers, **BALANCED, "inverse_counts": torch.rand(shape[1]) + 0.1},
            ),
            elementwise=True,
        )
        plain = SigmoidBatch(plan, (logits, torch.zeros(shape)), numbers, True)
        for one in (weighted, plain):
            check(one)
        for found, expected in zip((*weighted.losses, *weighted.grads), (*plain.losses, *plain.grads), strict=True):
            torch.testing.assert_close(found, 1.1 * expected, rtol=2e-6, atol=0)
