"""All that a GPU machine is needed for, in parts of less than 8 minutes each.

Builds the CUDA kernels, runs the GPU tests and compute-sanitizer, and times each GPU backend, the fused linear loss and
a training step, with rows in ``bench/results``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import longtail
from longtail.experiments.command_line import Parser

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 480.0
"""Seconds that one command may take."""

SANITIZED: tuple[tuple[int, ...], ...] = (
    (37, 10), (9, 1000), (5, 1001), (6, 5003), (3, 50257), (2, 300001),
    (3, 21, 40), (2, 21, 35), (1, 1203, 64), (1, 5000, 16),
)  # fmt: skip
"""Shapes for compute-sanitizer, which slows kernels down a hundredfold: one for each way to take a row, or a pixel."""


class Command(NamedTuple):
    """One command of a part, with what it adds to the environment."""

    words: tuple[str, ...]
    environment: dict[str, str] = {}  # noqa: RUF012 - never changed


def _python(*words: str, **environment: str) -> Command:
    return Command((sys.executable, *words), environment)


def _pytest(*words: str, **environment: str) -> Command:
    return _python("-m", "pytest", "-q", "-m", "gpu", *words, **environment)


def _bench(backend: str, dtype: str) -> list[Command]:
    words = ("-m", "bench", "gpu", "--dtype", dtype, "--no-compile")
    return [_python(*words, LONGTAIL_BACKEND=backend)]


def _sanitizer(tool: str) -> list[Command]:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    if found is None:
        print(f"compute-sanitizer is not on the PATH nor in {home}/bin: {tool} is left out")
        return []
    flags = ("--tool", tool, "--error-exitcode", "9", "--kernel-name-exclude", "kernel_substring=at::")
    words = (found, *flags, sys.executable, "-m", "bench", "gpu-session", "--sanitized")
    # The caching allocator would hide accesses beyond a tensor.
    return [Command(words, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "LONGTAIL_BACKEND": "cuda"})]


PARTS: dict[str, Callable[[], list[Command]]] = {
    "build": lambda: [
        _python("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", ".", LONGTAIL_CUDA="1"),
        _python("-m", "longtail", "info"),
    ],
    "test": lambda: [_python("-m", "pytest", "-q", "tests/cuda/test_build.py"), _pytest("-k", "cuda")],
    "test-triton": lambda: [_pytest("-k", "triton")],
    "test-rest": lambda: [_pytest("-k", "not cuda and not triton")],
    "memcheck": lambda: _sanitizer("memcheck"),
    "racecheck": lambda: _sanitizer("racecheck"),
    "bench-bfloat16": lambda: _bench("cuda", "bfloat16"),
    "bench-float32": lambda: _bench("cuda", "float32"),
    "bench-triton-bfloat16": lambda: _bench("triton", "bfloat16"),
    "bench-triton-float32": lambda: _bench("triton", "float32"),
    # torch.compile takes most of the time: the extremes of the shapes alone.
    "bench-compiled": lambda: [
        _python("-m", "bench", "gpu", "--dtype", "bfloat16", "--shape", "32768,1000", "8192,32768", "4096,128256")
    ],
    "bench-linear": lambda: [
        _python("-m", "bench", "linear", "--device", "cuda", "--dtype", "bfloat16", "--shape", *shape.split())
        for shape in ("4096 4096 128256", "8192 2048 256000")
    ],
    "bench-step": lambda: [
        _python("-m", "bench", "step", "--device", "cuda", "--tokens", "8192", "--budget", "20000", "--most", "131072")
    ],
}


def run_part(name: str) -> bool:
    """Runs a part's commands to the end, failures included; whether all succeeded."""
    good = True
    for command in PARTS[name]():
        started = time.monotonic()
        print(f"[{name}] {' '.join(command.words)}", flush=True)
        try:
            environment = {**os.environ, **command.environment}
            code = subprocess.run(command.words, cwd=ROOT, env=environment, timeout=LIMIT, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 124
        nothing_to_test = code == 5 and "pytest" in command.words
        good = good and (code == 0 or nothing_to_test)
        print(f"[{name}] exit status {code} after {time.monotonic() - started:.0f} s", flush=True)
    return good


def run_sanitized() -> None:
    """Every operator on the shapes above, in every mode and with every option, compared with the CPU."""
    for shape in SANITIZED:
        classes = shape[1]
        generator = torch.Generator().manual_seed(classes)
        wide = torch.randn(shape, generator=generator)
        target = torch.randint(classes, (shape[0], *shape[2:]), generator=generator)
        target.view(-1)[0] = -100
        vector = torch.rand(classes, generator=generator)
        softmax = {"weight": vector, "class_bias": vector, "label_smoothing": 0.1, "softcap": 20.0}
        sigmoid = {"weight": vector, "pos_weight": vector, "gamma": 1.5}
        cases: tuple[tuple[Callable[..., Tensor], Tensor, dict[str, Any]], ...] = (
            (longtail.cross_entropy, target, {"complement_gamma": -1.0}),
            (longtail.cross_entropy, target, {"complement_gamma": -1.0, **softmax}),
            (longtail.sigmoid_focal_loss, target, {"reduction": "mean"}),
            (longtail.sigmoid_focal_loss, target, {"reduction": "none", **sigmoid}),
            (longtail.sigmoid_focal_loss, torch.rand(shape, generator=generator), {"reduction": "none", **sigmoid}),
        )
        for dtype in (torch.float32, torch.bfloat16):
            for loss, y, options in cases:
                expected = _gradient(loss, wide.to(dtype), y, "backward", options)
                on_gpu = {k: _on_gpu(v) for k, v in options.items()}
                for mode in ("backward", "forward", "inplace"):
                    actual = _gradient(loss, _on_gpu(wide.to(dtype)), _on_gpu(y), mode, on_gpu)
                    torch.testing.assert_close(actual.cpu().float(), expected.float(), rtol=2e-2, atol=1e-5)
        print(f"{list(shape)}: as on the CPU", flush=True)


def _on_gpu(x: Any) -> Any:
    return x.cuda() if isinstance(x, Tensor) else x


def _gradient(
    loss: Callable[..., Tensor], logits: Tensor, target: Tensor, mode: str, options: dict[str, Any]
) -> Tensor:
    x = logits.clone().requires_grad_()
    (loss(x * 1.0, target, gradient=mode, **options).sum() * 1.7).backward()
    assert x.grad is not None
    return x.grad


def add_options(parser: Parser) -> None:
    parser.add_argument("part", nargs="*", metavar="PART", help=f"of: {', '.join(PARTS)} (default: all, in this order)")
    parser.add_argument("--sanitized", action="store_true", help="what compute-sanitizer runs, without it")


def run(arguments: argparse.Namespace, parser: Parser) -> None:
    unknown = [name for name in arguments.part if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}, expected of: {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        parser.exit(1, f"{parser.prog}: no CUDA device\n")
    if arguments.sanitized:
        run_sanitized()
        return
    failed = [name for name in arguments.part or PARTS if not run_part(name)]
    parser.exit(1 if failed else 0, f"failed: {', '.join(failed)}\n" if failed else "all parts passed\n")
