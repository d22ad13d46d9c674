"""Building a wheel of this checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


def build_wheel(folder: Path, carry: str = "", **env: str) -> tuple[subprocess.CompletedProcess, list[Path]]:
    """``carry``: a build folder to start from. CUDA, which takes minutes, is left out unless it is asked for."""
    source = folder / "source"
    unwanted = shutil.ignore_patterns(".venv", ".git", "build", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=unwanted)
    if carry:
        shutil.copytree(ROOT / carry, source / carry)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", str(folder), "."]
    done = subprocess.run(
        command,
        cwd=source,
        env={**os.environ, "LONGTAIL_CUDA": "0", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done, list(folder.glob("*.whl"))
