"""Scripts in a process of their own, under one instruction set; which ones this processor has."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import torch

# The only type whose loops are compiled for this instruction set: the others take those of AVX-512.
BFLOAT16_ONLY = "avx512_bf16"
SCRIPT_HEAD = """
import os, sys
import numpy as np, torch
import torch.nn.functional as F
sys.path[:0] = {folders!r}
import cases, kernels, limit_cases, longtail, naive, shard_cases
from tolerances import assert_close
OWN_DTYPES = {own_dtypes}
"""


def supported() -> list[str]:
    """Names of the instruction sets that this machine runs."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return ["neon"]
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            flags = next(set(line.split()) for line in cpuinfo if line.startswith("flags"))
    except OSError:  # what torch uses, which its environment can lower
        best = torch.backends.cpu.get_cpu_capability().lower()
        return ["baseline", "avx2", "avx512"][: {"avx512": 3, "avx2": 2}.get(best, 1)]
    needed = {
        "baseline": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
        "avx512_bf16": {"avx512_bf16"},
    }
    runs = [needed[name] <= flags for name in needed]
    return [name for i, name in enumerate(needed) if all(runs[: i + 1])]


def with_floats() -> list[str]:
    """Those with loops of their own over float32 and float64."""
    return [isa for isa in supported() if isa != BFLOAT16_ONLY]


def run(isa: str | None, body: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LONGTAIL_")}
    if isa is not None:
        environment["LONGTAIL_CPU_ISA"] = isa
    own = "(torch.bfloat16,)" if isa == BFLOAT16_ONLY else "cases.DTYPES"
    script = SCRIPT_HEAD.format(folders=sys.path, own_dtypes=own) + body
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
