"""Tests in Triton's interpreter: it is chosen before Triton is imported, so they run in a pytest of their own."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longtail.ops import plain

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1")
starts_it = pytest.mark.skipif(
    INTERPRETED or importlib.util.find_spec("triton") is None, reason="this is that process, or Triton is not there"
)
# The interpreter cuts float32 off to bfloat16 where the hardware rounds.
FACTOR = {torch.float32: 1.0, torch.float16: 1.0, torch.bfloat16: 2.0}
HALVES = (torch.bfloat16, torch.float16)


def patch_once_a_launch() -> None:
    """Triton's interpreter replaces the functions of triton.language at a launch, and again, by the same, at each call
    within a kernel, which takes half of its time: the launch's will do."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, scope_type = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", None)
    if scope_type is None:  # of a release that does otherwise
        return
    launched: set[str] = set()  # the modules of the launch under way
    left: set[str] = set()  # those that calls have replaced, which the interpreter leaves so

    class Launch(scope_type):  # type: ignore[misc, valid-type]
        def restore(self) -> None:
            super().restore()
            launched.clear()

    @functools.cache
    def modules(function: Any) -> set[str]:
        return {x.__name__ for x in function.__globals__.values() if x is tl or x is tl.core}

    def once(function: Any) -> Any:
        if not launched:
            scope = Launch()
            scope._changes = patch(function)._changes
            launched.update(modules(function))
            return scope
        if not modules(function) <= launched | left:
            patch(function)
            left.update(modules(function))
        return scope_type()

    interpreter._patch_lang = once


def obey_assertions() -> None:
    """Triton's interpreter leaves the kernels' assertions out: with them, what would trap on a GPU fails here, too."""
    import numpy as np
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    for name, value in (("debug", True), ("sanitize_overflow", False)):
        object.__setattr__(options, name, value)  # frozen

    def create_assert(_: Any, condition: Any, message: str) -> None:
        assert np.all(getattr(condition, "data", condition)), message

    interpreter.InterpreterBuilder.create_assert = create_assert


TRAPPED: tuple[type[Exception], ...] = ()
"""What an assertion of a kernel becomes."""
if INTERPRETED:
    from triton.runtime.errors import InterpreterError

    TRAPPED = (InterpreterError,)
    patch_once_a_launch()
    obey_assertions()


def refuse_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes of images are walked where they lie: nothing may go through rows."""

    def refuse(_x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("an image was transposed")

    monkeypatch.setattr(plain, "to_rows", refuse)


def rerun(*files: Path) -> None:
    """Runs the tests of the Triton kernels in ``files`` in the interpreter; of each there is one at least."""
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-x", "-rfEp", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LONGTAIL_")}
    done = subprocess.run(
        [*command, "-k", "triton", "-m", "not gpu", *files],
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = {line.split("::")[0].split("/")[-1] for line in done.stdout.splitlines() if line.startswith("PASSED ")}
    assert passed == {file.name for file in files}
