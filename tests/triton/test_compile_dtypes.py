"""Promise: the Triton kernels of the sigmoid family and of images compile as those of the softmax family do.

For sm_80, sm_90 and sm_100, without spills, with wide accesses wherever the layout allows, without atomics.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
import sigmoid_cases

pytest.importorskip("triton")
sigmoid = pytest.importorskip("longtail.triton_kernels.sigmoid_loss")
softmax = pytest.importorskip("longtail.triton_kernels.softmax_loss")
shard = pytest.importorskip("longtail.triton_kernels.softmax_shard")
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
# Several rows per program; rows in one block; in several, beginning anywhere; images.
SHAPES = ((2, 80), (2, 1000), (2, 8191), (2, 32, 1024))
IMAGES = ((1, 2, 4096), (1, 21, 4096), (1, 150, 4096), (1, 1203, 4096))
FOUR_PIXELS = {
    torch.float32: re.compile(r"(ld|st)\.global\S*\.v4\.b32"),
    torch.bfloat16: re.compile(r"(ld|st)\.global\S*\.v2\.b32"),
}


@pytest.fixture
def sigmoid_kernels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return recorded(monkeypatch, sigmoid, "rows_kernel", "pixels_kernel")


@pytest.fixture
def pixel_kernels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return recorded(monkeypatch, softmax, "pixel_tile_kernel", "pixel_sweep_kernel")


def launch_sigmoid(
    what: str, shape: tuple[int, ...], kind: str, option_set: str, dtype: torch.dtype, **changes: Any
) -> None:
    elementwise = kind != "class"
    logits, target = sigmoid_cases.random_case(shape, kind, dtype)
    tail = sigmoid_cases.operator_options(sigmoid_cases.options(option_set, logits) | changes)
    target = target.flatten().clamp(min=0) if kind == "class" else target
    up = torch.zeros(shape if elementwise else (logits.numel() // shape[1],))
    if what == "loss":
        sigmoid.sigmoid_loss(logits, target, *tail, elementwise)
    elif what == "backward":
        sigmoid.sigmoid_loss_backward(up, logits, target, *tail)
    else:
        sigmoid.sigmoid_loss_and_grad(up, logits, target, *tail, elementwise)


def launch_image(what: str, shape: tuple[int, ...], option_set: str, dtype: torch.dtype) -> None:
    rows, classes = shape[0] * shape[2], shape[1]
    logits, up, target = torch.zeros(shape, dtype=dtype), torch.zeros(rows), torch.zeros(rows, dtype=torch.long)
    tail = cases.operator_options(classes, cases.options(option_set, classes, target))
    if what == "loss":
        softmax.softmax_loss(logits, target, *tail)
    elif what == "backward":
        softmax.softmax_loss_backward(up, logits, target, torch.zeros(5, rows).t(), *tail)
    else:
        softmax.softmax_loss_and_grad(up, logits, target, *tail)


def check(kernel: Any, directory: Path, classes: bool = True) -> None:
    ptx = kernel.asm["ptx"]
    assert local_memory(kernel, directory) == 0, "spills"
    assert not re.search(r"\b(atom|red)\.", ptx), "the same bits at every run"
    assert ("__assertfail" in ptx) == classes, "targets out of range trap"
    assert "ex2.approx.ftz" in ptx, "the short exp"


@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize(("arch", "shape"), [(a, s) for a in ARCHS for s in (SHAPES if a == 90 else SHAPES[2:])])
def test_sigmoid(arch: int, shape: tuple[int, ...], kind: str, sigmoid_kernels: list[Any], tmp_path: Path) -> None:
    """Loss and gradient at once with every option: the most registers."""
    activate(arch)
    launch_sigmoid("both", shape, kind, "mixed", torch.bfloat16)
    check(sigmoid_kernels[0], tmp_path, kind == "class")
    wide = accesses(sigmoid_kernels[0])
    assert wide["ld"] > 0
    assert wide["st"] > 0
    assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", sigmoid_kernels[0].asm["ptx"]), "rounded, not cut off"


@pytest.mark.parametrize("kind", ["class", "hard"])
@pytest.mark.parametrize("what", PASSES[:2])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_sigmoid_passes(
    shape: tuple[int, ...], what: str, kind: str, sigmoid_kernels: list[Any], tmp_path: Path
) -> None:
    activate(90)
    launch_sigmoid(what, shape, kind, "mixed_square", torch.float32)
    check(sigmoid_kernels[0], tmp_path, kind == "class")
    wide = accesses(sigmoid_kernels[0])
    assert wide["ld"] > 0
    assert (wide["st"] > 0) == (what != "loss" or kind == "hard")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=cases.name)
@pytest.mark.parametrize(("arch", "shape"), [(a, s) for a in ARCHS for s in (IMAGES if a == 90 else IMAGES[1:3])])
def test_images(
    arch: int, shape: tuple[int, ...], dtype: torch.dtype, pixel_kernels: list[Any], tmp_path: Path
) -> None:
    activate(arch)
    # With softcap too, the assembler gives up 8 bytes per thread on sm_80 for one more program per multiprocessor.
    launch_image("both", shape, "mixed_linear" if arch == 80 else "mixed", dtype)
    check(pixel_kernels[0], tmp_path)
    kinds = FOUR_PIXELS[dtype].findall(pixel_kernels[0].asm["ptx"])
    assert {"ld", "st"} <= set(kinds), "four pixels per access"


@pytest.mark.parametrize("what", PASSES[:2])
@pytest.mark.parametrize("shape", IMAGES[1:3])
def test_image_passes(shape: tuple[int, ...], what: str, pixel_kernels: list[Any], tmp_path: Path) -> None:
    activate(90)
    launch_image(what, shape, "mixed", torch.float32)
    check(pixel_kernels[0], tmp_path)
    assert accesses(pixel_kernels[0])["ld"] > 0


def test_the_loops_have_no_barrier(sigmoid_kernels: list[Any], pixel_kernels: list[Any]) -> None:
    """What a thread adds up stays its own until the end."""
    activate(90)
    launch_image("loss", (1, 1203, 4096), "plain", torch.float32)
    launch_image("loss", (1, 1203, 4096), "mixed", torch.bfloat16)
    launch_sigmoid("both", (2, 8191), "class", "focal", torch.bfloat16)
    launch_sigmoid("both", (2, 80, 1024), "class", "weight", torch.bfloat16)
    for kernel in (*pixel_kernels, *sigmoid_kernels):
        loop = longest_loop(kernel)
        assert loop.count("ex2.approx") >= 8
        assert not has_barrier(loop)


def test_an_unused_option_costs_no_instruction(sigmoid_kernels: list[Any]) -> None:
    activate(90)
    for option_set in ("plain", "sample_weight", "pos_weight", "alpha", "focal", "focal_half"):
        launch_sigmoid("loss", (2, 1000), "class", option_set, torch.bfloat16)
    counts = [kernel.asm["ptx"].count("ex2.approx") for kernel in sigmoid_kernels]
    plain, weighted, positive, alpha, square, power = counts
    assert plain == positive == alpha == square, "one exp per element"
    assert power == weighted == 2 * plain, "and another for gammas other than 0 and 2"


def test_numbers_and_batches_do_not_recompile(sigmoid_kernels: list[Any]) -> None:
    activate(90)
    for what in ("loss", "backward"):
        for rows, gamma in ((2, 0.5), (1, 3.0), (17, 1.0), (16, 5.0)):
            launch_sigmoid(what, (rows, 1000), "class", "mixed", torch.float32, gamma=gamma, alpha=gamma / 10)
    assert len({kernel.hash for kernel in sigmoid_kernels}) == 2, "one kernel for the loss, one for its gradient"


def test_few_kernels_for_all_sizes(sigmoid_kernels: list[Any], pixel_kernels: list[Any]) -> None:
    """Per dtype, options and pass: a few widths of rows and of classes, aligned or not; ignore_index costs none."""
    activate(90)
    for classes in (2, 9, 16, 17, 20, 31, 2049, 5000, 5001, 32000, 50257, 128256):
        launch_sigmoid("loss", (2, classes), "class", "plain", torch.float32)
    assert len({kernel.hash for kernel in sigmoid_kernels}) <= 8
    sigmoid_kernels.clear()
    for classes in (19, 80, 150, 1203):
        for pixels in (32, 33, 64, 1024):
            launch_sigmoid("loss", (1, classes, pixels), "class", "plain", torch.float32)
            launch_image("loss", (1, classes, pixels), "plain", torch.float32)
    assert len({kernel.hash for kernel in sigmoid_kernels}) == 2
    assert len({kernel.hash for kernel in pixel_kernels}) == 4


@pytest.mark.parametrize(("arch", "classes"), [(80, 50257), (90, 1000), (90, 16032), (90, 50257), (100, 50257)])
def test_shards(arch: int, classes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = recorded(monkeypatch, shard, "shard_tile_kernel", "shard_sweep_kernel")
    activate(arch)
    logits, target = torch.zeros(2, classes, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.long)
    vectors = torch.ones(classes), torch.zeros(classes)
    shard.softmax_loss_accumulate(logits, target, *vectors, torch.zeros(classes), cases.IGNORE, True, 1.3, 8.0)
    shard.softmax_loss_apply(logits, target, torch.zeros(2, 5), *vectors, cases.IGNORE, 1.3, 8.0)
    for kernel in found:
        check(kernel, tmp_path)
        assert accesses(kernel)["ld"] > 0
    assert [accesses(kernel)["st"] > 0 for kernel in found] == [False, True]
