"""Promise: the Triton kernel of the hierarchical cross-entropy compiles ahead of time, without spills or atomics.

No GPU is needed: the launchers run as they are, over a driver that stops short of the launch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
hierarchical = pytest.importorskip("longtail.triton_kernels.hierarchical_loss")
from ahead_of_time import activate, check, compiles, has_barrier, longest_loop, recorded  # noqa: E402

pytestmark = compiles
F32, BF16 = torch.float32, torch.bfloat16
PASSES = ("loss", "backward", "both", "in_place")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return recorded(monkeypatch, hierarchical, "hierarchical_kernel")


def tables(classes: int, depth: int, everything: bool) -> tuple[Any, ...]:
    """Of a tree of that depth, where nothing looks at it; everything: with all that may be None."""
    nodes, numbers = torch.zeros(9, dtype=torch.int32), torch.zeros(classes, dtype=torch.int32)
    tree = (torch.zeros(classes, depth, dtype=torch.int32), nodes, nodes, torch.zeros(9))
    vector = torch.zeros(classes)
    return (*tree, *((numbers, numbers, vector, vector) if everything else (None,) * 4))


def launch(what: str, logits: Tensor, depth: int, everything: bool = True) -> None:
    rows, classes = logits.shape
    up, target = torch.zeros(rows), torch.zeros(rows, dtype=torch.long)
    tail = (*tables(classes, depth, everything), torch.zeros(rows) if everything else None, -100)
    if what == "loss":
        hierarchical.hierarchical_loss(logits, target, *tail)
    elif what == "backward":
        hierarchical.hierarchical_loss_backward(up, logits, target, torch.zeros(rows, 2 * depth + 1), *tail)
    elif what == "both":
        hierarchical.hierarchical_loss_and_grad(up, logits, target, *tail)
    else:
        hierarchical.hierarchical_loss_and_grad_(up, logits, target, *tail)


@pytest.mark.parametrize(
    ("arch", "classes", "dtype", "depth", "everything"),
    [
        (90, 1203, F32, 8, True),
        (90, 50257, BF16, 8, True),
        (90, 100, BF16, 3, False),
        (80, 50257, BF16, 7, True),
    ],
)
def test_no_spills_and_wide_accesses(
    arch: int, classes: int, dtype: torch.dtype, depth: int, everything: bool, compiled: list[Any], tmp_path: Path
) -> None:
    activate(arch)
    for what in PASSES:
        launch(what, torch.zeros(2, classes, dtype=dtype), depth, everything)
    loss, *others = (check(kernel, tmp_path) for kernel in compiled)
    assert loss["ld"] >= 1
    assert loss["st"] == 0
    assert all(wide["ld"] >= 1 and wide["st"] >= 1 for wide in others)


@pytest.mark.parametrize(("dtype", "everything"), [(F32, False), (BF16, True)])
def test_the_sweeps_have_no_barrier_in_their_loops(dtype: torch.dtype, everything: bool, compiled: list[Any]) -> None:
    activate(90)
    for what in ("loss", "backward"):
        launch(what, torch.zeros(2, 128256, dtype=dtype), 4, everything)
    for kernel, exponentials in zip(compiled, (17, 16), strict=True):
        loop = longest_loop(kernel)
        assert loop.count("ex2.approx") == exponentials, "16 elements, and one change of the maximum for the loss"
        assert not has_barrier(loop)


def test_few_kernels_for_all_trees_and_sizes(compiled: list[Any]) -> None:
    activate(90)
    for rows, classes, depth in ((1, 5000, 5), (2, 5000, 8), (17, 50257, 7), (3, 4097, 6)):
        launch("loss", torch.zeros(rows, classes), depth, everything=False)
    assert len({kernel.hash for kernel in compiled}) == 2, "rows with edges and without"
