"""Building a wheel of this checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


def copy_source(folder: Path) -> Path:
    """This checkout without what is built and without its history, below ``folder``."""
    unwanted = shutil.ignore_patterns(".venv", ".git", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache")
    return shutil.copytree(ROOT, folder / "source", ignore=unwanted)


def build_sdist(folder: Path) -> Path:
    """Compiles nothing, and does not import torch."""
    source, env = copy_source(folder), {**os.environ, "LONGTAIL_CPU": "0", "LONGTAIL_CUDA": "0"}
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def build_wheel(
    folder: Path, carry: str = "", source: Path | None = None, **env: str
) -> tuple[subprocess.CompletedProcess, list[Path]]:
    """Of ``source``, a copy of this checkout by default.

    ``carry``: a build folder to start from, where it exists. CUDA, which takes minutes, is built where asked for.
    """
    source = source or copy_source(folder)
    if carry and (ROOT / carry).exists():
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


def load_setup() -> ModuleType:
    """setup.py's functions, with nothing set up."""
    spec = importlib.util.spec_from_file_location("longtail_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.setenv("LONGTAIL_CPU", "0")
        patch.setenv("LONGTAIL_CUDA", "0")
        patch.delenv("LONGTAIL_REQUIRE_CPU", raising=False)
        spec.loader.exec_module(module)
    return module
