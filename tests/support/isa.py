"""Scripts in a process of their own, under one instruction set; which ones this processor has."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

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


# Runs a script a line in a fork of its own: what takes longest, importing torch, is done once. The library reads the
# instruction set at its first call, which is in the fork.
FORKS = """
import json, signal, tempfile, traceback
def run(isa, own_dtypes, body):
    try:
        os.environ["LONGTAIL_CPU_ISA"] = isa
        exec(body, globals() | {"OWN_DTYPES": [getattr(torch, name) for name in own_dtypes] or cases.DTYPES})
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            signal.alarm(300)
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            status = run(*json.loads(line))
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps((status, *(file.seek(0) or file.read() for file in (out, err)))), flush=True)
"""


def command(body: str) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LONGTAIL_")}
    script = SCRIPT_HEAD.format(folders=sys.path) + body
    return {"args": [sys.executable, "-c", script], "env": environment, "text": True}


def run(body: str) -> subprocess.CompletedProcess[str]:
    """Under the instruction set that is the default."""
    return subprocess.run(**command(body), capture_output=True, timeout=300, check=False)


class Scripts:
    """Runs scripts under one instruction set or another, each in a process of its own."""

    def __init__(self) -> None:
        self.forking: subprocess.Popen[str] | None = None

    def run(self, isa: str, body: str) -> subprocess.CompletedProcess[str]:
        if self.forking is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.forking = subprocess.Popen(**command(FORKS), **pipes)
        assert self.forking.stdin is not None
        assert self.forking.stdout is not None
        own_dtypes = ["bfloat16"] if isa == BFLOAT16_ONLY else []
        self.forking.stdin.write(json.dumps((isa, own_dtypes, body)) + "\n")
        self.forking.stdin.flush()
        status, out, err = json.loads(self.forking.stdout.readline())
        return subprocess.CompletedProcess(isa, status, out, err)

    def says(self, isa: str, body: str, expected: str) -> str:
        """What a script prints; asserts that it ends well and prints ``expected``. -11: a read out of bounds."""
        done = self.run(isa, body)
        assert done.returncode == 0, f"exit {done.returncode}: {done.stdout + done.stderr}"
        assert expected in done.stdout
        return done.stdout

    def stop(self) -> None:
        if self.forking is not None:
            self.forking.communicate()
