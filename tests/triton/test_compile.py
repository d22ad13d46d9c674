"""Promise: the Triton kernels of the softmax family compile ahead of time for sm_80, sm_90 and sm_100, without spills.

No GPU is needed: the launchers run as they are, over a driver that stops short of the launch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import cases

pytest.importorskip("triton")
softmax = pytest.importorskip("longtail.triton_kernels.softmax_loss")
shard = pytest.importorskip("longtail.triton_kernels.softmax_shard")
means = pytest.importorskip("longtail.triton_kernels.means")
scale_grad = pytest.importorskip("longtail.triton_kernels.scale_grad")
from ahead_of_time import (  # noqa: E402
    ARCHS,
    PASSES,
    SPILLED,
    accesses,
    activate,
    check,
    compiles,
    ex2,
    has_barrier,
    launch_softmax,
    local_memory,
    longest_loop,
    recorded,
)  # fmt: skip

pytestmark = compiles
# Rows in registers, aligned and not; swept ones that are aligned; GPT-2's vocabulary, whose rows begin anywhere.
CLASSES = (1000, 1203, 4096, 128256, 50257)
IMAGES = ((1, 2, 4096), (1, 21, 4096), (1, 150, 4096), (1, 1203, 4096))
FOUR_PIXELS = {
    torch.float32: re.compile(r"(ld|st)\.global\S*\.v4\.b32"),
    torch.bfloat16: re.compile(r"(ld|st)\.global\S*\.v2\.b32"),
}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return recorded(monkeypatch, softmax, "tile_kernel", "sweep_kernel", "pixel_tile_kernel", "pixel_sweep_kernel")


def launch(what: str, logits: torch.Tensor, option_set: str, **changes: Any) -> None:
    launch_softmax(softmax, what, logits, option_set, **changes)


def check_pass(kernel: Any, what: str, directory: Path) -> None:
    wide = check(kernel, directory)
    assert wide["ld"] > 0
    assert (wide["st"] > 0) == (what != "loss")


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_option_at_once(arch: int, classes: int, what: str, compiled: list[Any], tmp_path: Path) -> None:
    """The most registers and the widest code that a kernel can have."""
    activate(arch)
    launch(what, torch.zeros(2, classes, dtype=torch.bfloat16), "mixed_tail")
    (kernel,) = compiled
    check_pass(kernel, what, tmp_path)
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
    check_pass(kernel, what, tmp_path)


@pytest.mark.parametrize("classes", [3, 100, 128, 512, 8192, 32000])
def test_other_sizes_do_not_spill(classes: int, compiled: list[Any], tmp_path: Path) -> None:
    activate(90)
    launch("both", torch.zeros(2, classes), "mixed_linear")
    assert local_memory(compiled[0], tmp_path) <= SPILLED


def test_the_sweep_has_no_barrier_in_its_loop(compiled: list[Any]) -> None:
    """What a thread adds up stays its own until the end of the row."""
    activate(90)
    launch("loss", torch.zeros(2, 128256, dtype=torch.bfloat16), "plain")
    (kernel,) = compiled
    assert "ttg.convert_layout" not in kernel.asm["ttgir"]
    loop = longest_loop(kernel)
    assert loop.count("ex2.approx") == 17, "16 elements and one change of the maximum"
    assert not has_barrier(loop)


def test_the_loops_over_images_have_no_barrier(compiled: list[Any]) -> None:
    activate(90)
    launch("loss", torch.zeros(1, 1203, 4096), "plain")
    launch("loss", torch.zeros(1, 1203, 4096, dtype=torch.bfloat16), "mixed")
    for kernel in compiled:
        loop = longest_loop(kernel)
        assert loop.count("ex2.approx") >= 8
        assert not has_barrier(loop)


@pytest.mark.parametrize("classes", [1000, 50257])
def test_an_unused_option_costs_no_instruction(classes: int, compiled: list[Any]) -> None:
    """Focal weighting, complement entropy and class weights cost arithmetic per row, and none per element. Scales,
    mitigation and compensation, though a factor of each class, cost no exponential."""
    activate(90)
    for option_set in ("plain", "focal", "complement_up", "vector_scaling", "target_scale", "seesaw"):
        launch("loss", torch.zeros(2, classes, dtype=torch.bfloat16), option_set)
    counts = [ex2(kernel) for kernel in compiled]
    assert counts == [counts[0], counts[0] + 1, *[counts[0]] * 4]


def test_numbers_and_batches_do_not_recompile(compiled: list[Any]) -> None:
    activate(90)
    for what in ("loss", "backward"):
        for rows, gamma in ((2, 0.5), (1, 2.0), (17, 3.0), (16, 1.0), (33, 2.5)):
            logits = torch.zeros(rows, 1000)
            changes = {"complement_gamma": -gamma, "z_loss": gamma / 100, "compensation": gamma}
            launch(what, logits, "focal_half", focal_gamma=gamma, **changes)
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
    compiled.clear()
    for classes in (19, 80, 150, 1203):
        for pixels in (32, 33, 64, 1024):
            launch("loss", torch.zeros(1, classes, pixels), "plain")
    assert len({kernel.hash for kernel in compiled}) == 4


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


@pytest.mark.parametrize("arch", ARCHS)
def test_means(arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = recorded(monkeypatch, means, "denominator_kernel", "mean_kernel")
    activate(arch)
    for rows in (100, 2**20):
        for weight in (None, torch.ones(10), torch.ones(10, dtype=torch.float64)):
            means.mean_denominator(torch.zeros(rows, dtype=torch.long), weight, cases.IGNORE, 10)
            means.mean_loss(torch.zeros(rows), torch.ones((), dtype=torch.int64 if weight is None else weight.dtype))
    assert len({kernel.hash for kernel in compiled}) == 6, "the number of rows costs none"
    for kernel in compiled:
        assert local_memory(kernel, tmp_path) == 0
        assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"]), "the same bits at every run"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=cases.name)
@pytest.mark.parametrize(("arch", "shape"), [(a, s) for a in ARCHS for s in (IMAGES if a == 90 else IMAGES[1:3])])
def test_images(arch: int, shape: tuple[int, ...], dtype: torch.dtype, compiled: list[Any], tmp_path: Path) -> None:
    activate(arch)
    # Of softcap on sm_80, and of all options at once with float32, the assembler gives up 8 and 16 bytes per thread for
    # one more program per multiprocessor.
    every = "mixed" if dtype == torch.float32 else "mixed_tail"
    launch("both", torch.zeros(shape, dtype=dtype), "tail_linear" if arch == 80 else every)
    check(compiled[0], tmp_path)
    kinds = FOUR_PIXELS[dtype].findall(compiled[0].asm["ptx"])
    assert {"ld", "st"} <= set(kinds), "four pixels per access"


@pytest.mark.parametrize("what", PASSES[:2])
@pytest.mark.parametrize("shape", IMAGES[1:3])
def test_image_passes(shape: tuple[int, ...], what: str, compiled: list[Any], tmp_path: Path) -> None:
    activate(90)
    launch(what, torch.zeros(shape), "mixed_tail")
    check(compiled[0], tmp_path)
    assert accesses(compiled[0])["ld"] > 0


@pytest.mark.parametrize(("arch", "classes"), [(80, 50257), (90, 1000), (90, 16032), (90, 50257), (100, 50257)])
def test_shards(arch: int, classes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = recorded(monkeypatch, softmax, "tile_kernel", "sweep_kernel")
    activate(arch)
    logits, target = torch.zeros(2, classes, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.long)
    vectors, numbers = [torch.ones(classes) for _ in range(5)], (1.3, 8.0, 0.6)
    terms, margin = torch.zeros(2, 3), torch.zeros(classes)
    shard.softmax_loss_accumulate(
        logits, target, *vectors[:2], margin, *vectors[2:], terms, cases.IGNORE, True, *numbers
    )
    for given in (terms, None):
        shard.softmax_loss_apply(logits, target, torch.zeros(2, 5), *vectors, given, cases.IGNORE, *numbers)
    for kernel in found:
        check(kernel, tmp_path)
        assert accesses(kernel)["ld"] > 0
    assert [accesses(kernel)["st"] > 0 for kernel in found] == [False, True, True]


def test_the_target_is_read_before_it_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, one warp may come to the target's logit before another has read it. No one waits for less."""
    found = recorded(monkeypatch, softmax, "tile_kernel", "sweep_kernel")
    activate(90)
    target, row_grad = torch.zeros(2, dtype=torch.long), torch.zeros(2, 5)
    for terms, compensation in ((None, 0.6), (torch.zeros(2, 3), 0.6), (None, 0.0)):
        tail = (*[None] * 5, terms, cases.IGNORE, 1.0, 0.0, compensation)
        shard.softmax_loss_apply_(torch.zeros(2, 50304, dtype=torch.bfloat16), target, row_grad, *tail)
    read, given, off = (kernel.asm["ptx"] for kernel in found)
    before, after = read.split("bar.sync")
    assert re.search(r"ld\.global\S*\.b16", before)
    assert "st.global" not in before
    assert "st.global" in after
    assert not has_barrier(given + off)
