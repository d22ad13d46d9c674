"""Promise: the README's code is code, and its complete run prints what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import longtail
from longtail.__main__ import main

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
RESULT = re.compile(r"^(.+): balanced accuracy (0\.\d+), rare digits (0\.\d+)$", re.MULTILINE)


def block(word: str) -> str:
    """The one block that has the word."""
    (code,) = (code for code in BLOCKS if word in code)
    return code


def test_the_complete_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    names: dict[str, Any] = {}
    exec(compile(block("load_digits"), "README.md", "exec"), names)
    said = RESULT.findall(capsys.readouterr().out)
    stated = RESULT.findall(README)
    assert [name for name, *_ in said] == [name for name, *_ in stated] == ["cross-entropy", "logit adjustment"]
    for (_, *got), (_, *want) in zip(said, stated, strict=True):
        # 500 images of the test, 200 of them rare: a processor's rounding may turn some of them.
        assert [float(x) for x in got] == pytest.approx([float(x) for x in want], abs=0.03)
    assert all(float(adjusted) > float(plain) for plain, adjusted in zip(said[0][1:], said[1][1:], strict=True))
    assert names["scores"].per_class.isfinite().all(), "every class is held out"


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_is_python(code: str) -> None:
    compile(code, "README.md", "exec")


def surroundings() -> dict[str, Any]:
    """What the blocks speak of without making it."""
    labels = torch.randint(4, (16,))
    return {
        "model": torch.nn.Linear(5, 4),
        "images": torch.randn(16, 5),
        "labels": labels,
        "logits": torch.randn(16, 4, requires_grad=True),
        "counts": torch.tensor([9, 4, 2, 1]),
        "epoch": 3,
        "longtail": longtail,
        "SGD": torch.optim.SGD,
    }


@pytest.mark.parametrize("word", ["return_stats=True", "DeferredReweighting(counts"])
def test_blocks_that_need_one_process_run(word: str) -> None:
    names = surroundings()
    exec(compile(block(word), "README.md", "exec"), names)
    assert names["loss"].isfinite()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)
