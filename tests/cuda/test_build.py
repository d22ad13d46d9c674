"""Promise: an install finds the toolkit and the GPUs to compile for, and says what is missing."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wheels import build_wheel, load_setup, needs_compiler


@needs_compiler
def test_a_required_library_that_cannot_be_built_fails_the_install(tmp_path: Path) -> None:
    done, wheels = build_wheel(tmp_path, LONGTAIL_CUDA="1", LONGTAIL_CPU="0", CUDA_HOME="/nonexistent")
    assert done.returncode != 0
    assert "LONGTAIL_CUDA=1, but the CUDA kernels cannot be built: no nvcc found" in done.stdout
    assert "/nonexistent/bin" in done.stdout
    assert wheels == []


@pytest.fixture
def fake_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Makes a toolkit whose nvcc is of a release and knows some architectures; CUDA_HOME points at it."""

    def make(release: str, architectures: str) -> str:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        listed = "\\n".join(f"compute_{arch}" for arch in architectures.split())
        listing = f'[ "$1" = --list-gpu-arch ] && printf "{listed}\\n"'
        nvcc.write_text(f'#!/bin/sh\n{listing} || echo "Cuda tools, release {release}, V1"\n')
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        return str(nvcc)

    return make


def gencode(*names: str) -> list[str]:
    """'90' stands for machine code, '90+PTX' for code and PTX."""
    flags = []
    for name in names:
        arch = name.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


@pytest.mark.parametrize(
    ("known", "listed", "expected"),
    [
        ("75 80 86 90 100 103 120", "", ("80", "90", "100", "120+PTX")),
        ("50 75 80 86 89 90", "", ("80", "90+PTX")),
        ("80 90", "9.0", ("90",)),
        ("80 90", "7.5 8.0;9.0a+PTX", ("80", "90a+PTX")),
    ],
)
def test_architectures(
    known: str,
    listed: str,
    expected: tuple[str, ...],
    fake_nvcc: Callable[[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    nvcc = fake_nvcc("12.9", known)
    setup = load_setup()
    assert setup.find_nvcc() == nvcc
    assert setup.cuda_major(nvcc) == 12
    assert setup.cuda_architectures(nvcc) == gencode(*expected)


@pytest.mark.parametrize(("listed", "words"), [("Hopper", "'Hopper'"), ("7.5", "8.0 or later")])
def test_architectures_that_cannot_be_served(
    listed: str, words: str, fake_nvcc: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    nvcc = fake_nvcc("13.0", "75 80 90")
    with pytest.raises(SystemExit, match=words):
        load_setup().cuda_architectures(nvcc)


def test_what_is_missing(fake_nvcc: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc("13.0", "80 90")
    setup = load_setup()
    monkeypatch.delenv("LONGTAIL_CUDA", raising=False)
    assert setup.missing_for_cuda() is None
    monkeypatch.setattr(setup, "find_ninja", lambda: None)
    assert "pip install ninja" in setup.missing_for_cuda()
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    assert "no nvcc found" in setup.missing_for_cuda()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Linux" in setup.missing_for_cuda()
    monkeypatch.setenv("LONGTAIL_CUDA", "0")
    assert setup.missing_for_cuda() == "LONGTAIL_CUDA=0"
