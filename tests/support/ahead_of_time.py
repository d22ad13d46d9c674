"""Compiling Triton kernels ahead of time: launchers run as they are, over a driver that stops short of the launch."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton

import cases
from interpreted import INTERPRETED

ARCHS = (80, 90, 100)
PASSES = ("loss", "backward", "both")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
# Bytes of local memory. Before Triton 3.9 loss and gradient at once take up to these with every option, few in a loop.
SPILLED = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 64
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


def recorded(monkeypatch: pytest.MonkeyPatch, module: Any, *names: str) -> list[Any]:
    """The kernels that the launchers of ``module`` ask for, in order; Triton's own driver comes back afterwards."""
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    found: list[Any] = []
    for name in names:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    return found


def activate(arch: int) -> None:
    triton.runtime.driver.set_active(Driver(arch))


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


def longest_loop(kernel: Any) -> str:
    """The code of the PTX between a label and a branch back to it with most exponentials."""
    ptx = kernel.asm["ptx"]
    begins = {match.group(1): match.end() for match in re.finditer(r"^(\$L__BB\S+):", ptx, re.MULTILINE)}
    ends = ((begins[match.group(1)], match.start()) for match in re.finditer(r"\bbra\S*\s+(\$L__BB\S+);", ptx))
    return max((ptx[begin:end] for begin, end in ends), key=lambda code: str(code).count("ex2.approx"))


def has_barrier(code: str) -> bool:
    """Whether threads wait for each other, or exchange anything."""
    return bool(re.search(r"bar\.sync|shfl|ld\.shared|st\.shared", code))


def launch_softmax(softmax: Any, what: str, logits: torch.Tensor, option_set: str, **changes: Any) -> None:
    """What `softmax`, the module, launches for one of PASSES over rows [N, C] or images [N, C, P]."""
    rows, classes = logits.numel() // logits.shape[1], logits.shape[1]
    up, target = torch.zeros(rows), torch.zeros(rows, dtype=torch.long)
    tail = cases.operator_options(classes, cases.options(option_set, classes, target) | changes)
    if what == "loss":
        softmax.softmax_loss(logits, target, *tail)
    elif what == "backward":
        stats = torch.zeros(5, rows).t() if logits.dim() == 3 else torch.zeros(rows, 5)
        softmax.softmax_loss_backward(up, logits, target, stats, *tail)
    else:
        softmax.softmax_loss_and_grad(up, logits, target, *tail)


def check(kernel: Any, directory: Path, classes: bool = True) -> dict[str, int]:
    """What holds for every kernel of a loss; classes: whether it takes class indices. Returns its wide accesses."""
    ptx = kernel.asm["ptx"]
    assert local_memory(kernel, directory) <= SPILLED, "spills"
    assert not re.search(r"\b(atom|red)\.", ptx), "the same bits at every run"
    assert ("__assertfail" in ptx) == classes, "targets out of range trap"
    assert "ex2.approx.ftz" in ptx, "the short exp"
    assert ".f64" not in ptx, "float32 throughout"
    return accesses(kernel)


def ex2(kernel: Any) -> int:
    return str(kernel.asm["ptx"]).count("ex2.approx")
