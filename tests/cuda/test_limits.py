"""Promise: the CUDA kernels are right at the limits of the arithmetic, seen on the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cases
import limit_cases
from emulation import build, harness
from emulation.image_numerics import ImageBatch, over_pixels
from emulation.numerics import Batch, in_warp, kept, one_thread, swept

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
ROWS = {"warp": in_warp(32), "block": swept(), "cluster": swept(2), "kept": kept(2), "single": swept(vector=False)}
IMAGES = {
    "alone": over_pixels(32, 32),
    "shared_classes": over_pixels(8, 64),
    "kept": over_pixels(16, 64, kept=True),
    "single": over_pixels(32, 64, vector=False),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("plans", ROWS)
def test_rows(plans: str, dtype: torch.dtype) -> None:
    for classes in (2, 9, 259):
        for name, (logits, target, options, coefficient), loss, grad in limit_cases.problems(classes, dtype):
            up = torch.tensor(-1.25).expand(len(target))
            run = Batch(ROWS[plans], (logits, target), options, up)
            run.tail = cases.operator_options(classes, options, cross_entropy_coefficient=coefficient)
            harness.run(run.launches())
            grads = (*run.grads, run.written)
            limit_cases.check(f"{name} {classes}", run.losses, grads, loss, grad * -1.25, factor=2)


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("plans", IMAGES)
def test_images(plans: str, dtype: torch.dtype) -> None:
    for classes in (2, 9, 70):
        for name, (logits, target, options, coefficient), loss, grad in limit_cases.problems(classes, dtype, 8):
            up, shape = torch.tensor(-1.25).expand(len(target)), (len(limit_cases.TARGETS), classes, 8)
            run = ImageBatch(IMAGES[plans], (logits, target), options, shape, up)
            run.tail = cases.operator_options(classes, options, cross_entropy_coefficient=coefficient)
            harness.run(run.launches())
            grads = [x.movedim(1, 2).reshape(logits.shape) for x in (*run.grads, run.written)]
            limit_cases.check(f"{name} {classes}", run.losses, grads, loss, grad * -1.25, factor=2)
