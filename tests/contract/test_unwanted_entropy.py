"""Promise: where nobody wants the complement entropy, its statistic may be anything, and nothing else is different."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cases
from batches import Kernels, SoftmaxBatch, one_thread, random_case
from emulation.harness import STORAGES
from emulation.plans import PIXELS, REGIMES, emulated
from kernels import CPU, GPU, over

EMULATED = emulated(REGIMES, "block", "cluster_2", "kept_1", "kept_2", "single_elements")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("option_set", ["plain", "complement", "mixed"])
@pytest.mark.parametrize(
    ("kernels", "shape", "dtype"),
    [
        *over(CPU, [(6, 127), (3, 19, 16)], STORAGES),
        *over(EMULATED, [(6, 127), (6, 1001), (5, 5000)], STORAGES),
        *over(emulated(REGIMES, "warp_of_vectors"), [(6, 8), (6, 1000)], STORAGES),
        *over(emulated(PIXELS, "shared_classes", "kept"), [(3, 19, 16)], STORAGES),
        *over(GPU, [(6, 127), (300, 1000), (65, 5000), (9, 128256)], STORAGES),
    ],
)
def test_without(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, option_set: str) -> None:
    logits, target = random_case(shape, dtype)
    logits[1, ::3] = -torch.inf  # 0 * -inf, where the entropy is wanted
    logits[2, 1::2] = torch.finfo(dtype).min
    options = cases.options(option_set, shape[1], target, dtype)
    wanted, unwanted = (SoftmaxBatch(kernels, (logits, target), options) for _ in range(2))
    unwanted.tail[-1] = False
    for batch in (wanted, unwanted):
        batch.run()
    for stats, whole in zip(unwanted.stats, wanted.stats, strict=True):
        stats[:, 2] = whole[:, 2]
    unwanted.check()
