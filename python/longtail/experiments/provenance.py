"""Where a measured figure comes from: versions, processor, commit, date."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..ops import cpu

FOLDER = Path(__file__).parent


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor_name() -> str:
    """The processor's name; platform.processor() is empty on most Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def output_of(*command: str) -> str:
    """What a command run in the package's folder prints; nothing where it fails."""
    try:
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit of the package's checkout, with "-dirty" after it where files differ.

    Outside of a checkout ``LONGTAIL_COMMIT`` tells what was installed; without it: "unknown".
    """
    if not output_of("git", "ls-files", Path(__file__).name):  # a package installed inside someone else's checkout
        return os.environ.get("LONGTAIL_COMMIT") or "unknown"
    # The results themselves change with every run.
    changed = output_of("git", "status", "--porcelain", "--", ":/", ":(top,exclude)bench/results")
    return f"{output_of('git', 'rev-parse', '--short', 'HEAD')}{'-dirty' if changed else ''}"


@functools.cache
def provenance() -> dict[str, str | int]:
    """Versions, processor and commit, the same for every row of a run."""
    from ..version import __version__

    return {
        "longtail": __version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "isa": cpu.isa() or "",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
