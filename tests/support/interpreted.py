"""Tests in Triton's interpreter: it is chosen before Triton is imported, so they run in a pytest of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longtail.ops import plain

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1")
starts_it = pytest.mark.skipif(INTERPRETED, reason="this is that process")
# The interpreter cuts float32 off to bfloat16 where the hardware rounds.
FACTOR = {torch.float32: 1.0, torch.float16: 1.0, torch.bfloat16: 2.0}
HALVES = (torch.bfloat16, torch.float16)


def refuse_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes of images are walked where they lie: nothing may go through rows."""

    def refuse(_x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("an image was transposed")

    monkeypatch.setattr(plain, "to_rows", refuse)


def rerun(file: str, *words: str) -> None:
    """Runs the tests of ``file`` in the interpreter; words: which, as pytest is told."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LONGTAIL_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, *words],
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
