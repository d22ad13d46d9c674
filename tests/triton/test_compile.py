"""Promise: the Triton kernels compile ahead of time for sm_80, sm_90 and sm_100, without spills, with 16-byte accesses.

No GPU is needed: the launchers run as they are, over a driver that stops short of the launch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cases

pytest.importorskip("triton")
module = pytest.importorskip("longtail.triton_kernels.softmax_loss")
scale_grad = pytest.importorskip("longtail.triton_kernels.scale_grad")
from ahead_of_time import (  # noqa: E402
    ARCHS,
    PASSES,
    accesses,
    activate,
    has_barrier,
    local_memory,
    longest_loop,
    recorded,
)  # fmt: skip

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

# Rows in registers, aligned and not; swept ones that are aligned; GPT-2's vocabulary, whose rows begin anywhere.
CLASSES = (1000, 1203, 4096, 128256, 50257)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return recorded(monkeypatch, module, "tile_kernel", "sweep_kernel")


def launch(what: str, logits: Tensor, option_set: str, **changes: Any) -> None:
    rows, classes = logits.shape
    target, up = torch.zeros(rows, dtype=torch.long), torch.zeros(rows)
    options = cases.options(option_set, classes, target) | changes
    tail = cases.operator_options(classes, options)
    if what == "loss":
        module.softmax_loss(logits, target, *tail)
    elif what == "backward":
        module.softmax_loss_backward(up, logits, target, torch.zeros(rows, 5), *tail)
    else:
        module.softmax_loss_and_grad(up, logits, target, *tail)


def check(kernel: Any, what: str, directory: Path) -> None:
    ptx = kernel.asm["ptx"]
    assert local_memory(kernel, directory) == 0, "spills"
    wide = accesses(kernel)
    assert wide["ld"] > 0
    assert (wide["st"] > 0) == (what != "loss")
    assert not re.search(r"\b(atom|red)\.", ptx), "the same bits at every run"
    assert "__assertfail" in ptx, "targets out of range trap"
    assert "ex2.approx.ftz" in ptx, "the short exp"


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_option_at_once(arch: int, classes: int, what: str, compiled: list[Any], tmp_path: Path) -> None:
    """The most registers and the widest code that a kernel can have."""
    activate(arch)
    launch(what, torch.zeros(2, classes, dtype=torch.bfloat16), "mixed")
    (kernel,) = compiled
    check(kernel, what, tmp_path)
    if what != "loss":
        assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", kernel.asm["ptx"]), "gradients are rounded, not cut off"


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("classes", [1000, 128256])
@pytest.mark.parametrize(
    ("dtype", "option_set"),
    [(torch.bfloat16, "plain"), (torch.float32, "plain"), (torch.float32, "mixed"), (torch.float16, "complement")],
)
def test_dtypes_and_options(
    dtype: torch.dtype, option_set: str, classes: int, what: str, compiled: list[Any], tmp_path: Path
) -> None:
    activate(90)
    launch(what, torch.zeros(2, classes, dtype=dtype), option_set)
    (kernel,) = compiled
    check(kernel, what, tmp_path)


@pytest.mark.parametrize("classes", [3, 100, 128, 512, 8192, 32000])
def test_other_sizes_do_not_spill(classes: int, compiled: list[Any], tmp_path: Path) -> None:
    activate(90)
    launch("both", torch.zeros(2, classes), "mixed_linear")
    assert local_memory(compiled[0], tmp_path) == 0


def test_the_sweep_has_no_barrier_in_its_loop(compiled: list[Any]) -> None:
    """What a thread adds up stays its own until the end of the row."""
    activate(90)
    launch("loss", torch.zeros(2, 128256, dtype=torch.bfloat16), "plain")
    (kernel,) = compiled
    assert "ttg.convert_layout" not in kernel.asm["ttgir"]
    loop = longest_loop(kernel)
    assert loop.count("ex2.approx") == 17, "16 elements and one change of the maximum"
    assert not has_barrier(loop)


@pytest.mark.parametrize("classes", [1000, 50257])
def test_an_unused_option_costs_no_instruction(classes: int, compiled: list[Any]) -> None:
    """Focal weighting, complement entropy and class weights cost arithmetic per row, and none per element."""
    activate(90)
    for option_set in ("plain", "focal", "complement_up"):
        launch("loss", torch.zeros(2, classes, dtype=torch.bfloat16), option_set)
    counts = [kernel.asm["ptx"].count("ex2.approx") for kernel in compiled]
    assert counts == [counts[0], counts[0] + 1, counts[0]]


def test_numbers_and_batches_do_not_recompile(compiled: list[Any]) -> None:
    activate(90)
    for what in ("loss", "backward"):
        for rows, gamma in ((2, 0.5), (1, 2.0), (17, 3.0), (16, 1.0), (33, 2.5)):
            logits = torch.zeros(rows, 1000)
            launch(what, logits, "focal_half", focal_gamma=gamma, complement_gamma=-gamma, z_loss=gamma / 100)
    assert len(compiled) == 10
    assert len({kernel.hash for kernel in compiled}) == 2, "one kernel for the loss, one for its gradient"


def test_few_kernels_for_all_sizes(compiled: list[Any]) -> None:
    """Per dtype, options and pass: a tile for each power of two, and three kinds of sweep."""
    activate(90)
    for classes in (2, 9, 10, 16, 17, 20, 31, 4097, 5000, 5001, 32000, 50257, 50304, 128256, 262144):
        launch("loss", torch.zeros(2, classes), "plain")
    flat = torch.zeros(2 * 32000 + 1)
    launch("loss", flat[1:].view(2, 32000), "plain")
    assert len({kernel.hash for kernel in compiled}) <= 4 + 3


def test_the_scaling_of_a_gradient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = recorded(monkeypatch, scale_grad, "scale_rows_kernel", "scale_pixels_kernel")
    activate(90)
    for shape in ((2, 1000), (2, 128256), (2, 21, 128)):
        grad = torch.zeros(shape, dtype=torch.bfloat16)
        rows = grad.numel() // shape[1]
        for factor in (torch.ones(rows), torch.ones(()).expand(rows)):
            scale_grad.scale_grad_(grad, factor, None, -100)
            scale_grad.scale_grad_(grad, factor, torch.zeros(rows, dtype=torch.long), -100)
    assert len({kernel.hash for kernel in compiled}) == 6
    for kernel in compiled:
        assert local_memory(kernel, tmp_path) == 0
        assert accesses(kernel)["ld"] == accesses(kernel)["st"] > 0
