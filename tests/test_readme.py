"""Promise: the README's complete run is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from longtail.__main__ import main


def test_the_complete_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_digits" in x)
    exec(compile(code, "README.md", "exec"), {})
    said = re.fullmatch(r"balanced accuracy (0\.\d+), rare digits (0\.\d+)\n", capsys.readouterr().out)
    assert said is not None
    assert float(said[1]) > 0.8
    assert float(said[2]) > 0.6


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)
