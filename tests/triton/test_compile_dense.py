"""Promise: the Triton kernels for class probabilities compile ahead of time as those for class indices do.

No GPU is needed: the launchers run as they are, over a driver that stops short of the launch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cases

pytest.importorskip("triton")
softmax = pytest.importorskip("longtail.triton_kernels.softmax_loss")
dense = pytest.importorskip("longtail.triton_kernels.softmax_dense")
from ahead_of_time import ARCHS, activate, check, compiles, has_barrier, longest_loop, recorded  # noqa: E402

pytestmark = compiles


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return recorded(monkeypatch, dense, "dense_tile_kernel", "dense_sweep_kernel")


def launch(logits: torch.Tensor, option_set: str, target_dtype: torch.dtype | None = None, **changes: Any) -> None:
    """Both passes."""
    rows, classes = logits.shape
    target = torch.zeros(logits.shape, dtype=target_dtype or logits.dtype)
    tail = cases.operator_options(classes, cases.options(option_set, classes, target[:, 0]) | changes)
    softmax.softmax_loss(logits, target, *tail)
    softmax.softmax_loss_backward(torch.zeros(rows), logits, target, torch.zeros(rows, 5), *tail)


F32, BF16 = torch.float32, torch.bfloat16
ALL = "all_of_probabilities"
TYPES = [(F32, F32), (BF16, BF16), (BF16, F32)]  # of logits and targets


@pytest.mark.parametrize(
    ("arch", "classes", "option_set", "dtype", "target_dtype"),
    [
        *((90, classes, ALL, *types) for classes in (1203, 50257) for types in TYPES),
        *((90, classes, "plain", BF16, F32) for classes in (1000, 8192)),
        *((arch, classes, ALL, BF16, F32) for arch in ARCHS if arch != 90 for classes in (4096, 50257)),
    ],
)  # fmt: skip
def test_no_spills_and_wide_accesses(
    arch: int, classes: int, option_set: str, dtype: torch.dtype, target_dtype: torch.dtype,
    compiled: list[Any], tmp_path: Path,
) -> None:  # fmt: skip
    activate(arch)
    launch(torch.zeros(2, classes, dtype=dtype), option_set, target_dtype)
    loss, backward = (check(kernel, tmp_path, classes=False) for kernel in compiled)
    assert loss["ld"] >= 2
    assert loss["st"] == 0
    assert backward["ld"] >= 2
    assert backward["st"] >= 1


@pytest.mark.parametrize(("dtype", "target_dtype"), TYPES)
def test_the_sweeps_have_no_barrier_in_their_loops(
    dtype: torch.dtype, target_dtype: torch.dtype, compiled: list[Any]
) -> None:
    activate(90)
    launch(torch.zeros(2, 128256, dtype=dtype), ALL, target_dtype)
    for kernel, exponentials in zip(compiled, (9, 8), strict=True):
        loop = longest_loop(kernel)
        assert loop.count("ex2.approx") == exponentials, "8 elements, and one change of the maximum for the loss"
        assert not has_barrier(loop)


def test_numbers_and_batches_do_not_recompile(compiled: list[Any]) -> None:
    activate(90)
    for rows, scale in ((2, 0.5), (1, 2.0), (17, 3.0)):
        launch(torch.zeros(rows, 1000), ALL, scale=scale, z_loss=scale / 100)
    assert len({kernel.hash for kernel in compiled}) == 2, "one kernel for the loss, one for its gradient"


def test_few_kernels_for_all_sizes(compiled: list[Any]) -> None:
    activate(90)
    for classes in (4097, 5000, 50257, 50304):
        launch(torch.zeros(2, classes), "plain")
    assert len({kernel.hash for kernel in compiled}) == 4, "sweeps with edges and without"
