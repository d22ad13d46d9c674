"""Promise: the Triton kernels compile ahead of time for sm_80, sm_90 and sm_100, without spills, with 16-byte accesses.

No GPU is needed: the launchers run as they are, over a driver that stops short of the launch.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import cases

triton = pytest.importorskip("triton")
module = pytest.importorskip("longtail.triton_kernels.softmax_loss")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

ARCHS = (80, 90, 100)
PASSES = ("loss", "backward", "both")
# Rows in registers; swept ones that are aligned; GPT-2's vocabulary, whose rows begin anywhere.
CLASSES = (1000, 4096, 128256, 50257)
WIDE = re.compile(r"(ld|st)\.global\S*\.v4\.b32")


class Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are kept by device

    def get_current_stream(self, _device: int) -> int:
        return 0


class Recorder(NamedTuple):
    """Stands in for a kernel: compiles what would be launched."""

    kernel: Any
    compiled: list[Any]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that the launchers ask for, in order; Triton's own driver comes back afterwards."""
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    found: list[Any] = []
    for name in ("tile_kernel", "sweep_kernel", "scale_grad_kernel"):
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    return found


def activate(arch: int) -> None:
    triton.runtime.driver.set_active(Driver(arch))


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


def local_memory(kernel: Any, directory: Path) -> int:
    """Bytes of local memory per thread, which is where registers spill to, from the assembler's own report."""
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    assert int(used["REG"]) > 0, done.stdout
    return int(used["STACK"]) + int(used["LOCAL"])


def accesses(kernel: Any) -> dict[str, int]:
    """16-byte loads and stores of global memory in the PTX."""
    kinds = [match.group(1) for match in WIDE.finditer(kernel.asm["ptx"])]
    return {kind: kinds.count(kind) for kind in ("ld", "st")}


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
    blocks = re.split(r"^\$L__BB\S+:", kernel.asm["ptx"], flags=re.MULTILINE)
    loop = max(blocks, key=lambda block: block.count("ex2.approx"))
    assert loop.count("ex2.approx") == 17, "16 elements and one change of the maximum"
    assert not re.search(r"bar\.sync|shfl|ld\.shared|st\.shared", loop)


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


def test_the_scaling_of_a_gradient(compiled: list[Any], tmp_path: Path) -> None:
    activate(90)
    for classes in (1000, 128256):
        for factor in (torch.ones(2), torch.ones(()).expand(2)):
            module.scale_grad_(torch.zeros(2, classes, dtype=torch.bfloat16), factor)
    assert len({kernel.hash for kernel in compiled}) == 2
    for kernel in compiled:
        assert local_memory(kernel, tmp_path) == 0
        assert accesses(kernel)["ld"] == accesses(kernel)["st"] > 0
