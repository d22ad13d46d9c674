"""Promise: every script of ``examples/`` runs as its docstring says, and shows what it claims."""

from __future__ import annotations

import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NEEDS = {
    "lightning_module": "lightning",
    "segmentation": None,
    "sharded_vocabulary": None,
    "training_loop": "sklearn",
    "transformers_trainer": "transformers",
}
NUMBERS = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")


@pytest.fixture(autouse=True)
def _as_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as models this small want it; what Lightning writes into the environment is taken back."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(name: str, *arguments: str) -> None:
    """The script in this process."""
    if NEEDS[name]:
        pytest.importorskip(NEEDS[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


def rows_of(text: str, *names: str) -> list[list[float]]:
    """The numbers of the lines that begin with the names, in their order."""
    lines = text.splitlines()
    found = [[line.removeprefix(name) for line in lines if line.startswith(name)] for name in names]
    assert [len(one) for one in found] == [1] * len(names), text
    return [[float(number) for number in NUMBERS.findall(line)] for (line,) in found]


@pytest.mark.parametrize("name", NEEDS)
def test_docstring_and_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == NEEDS.keys()
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    first, needs, command = re.match(r'"""(.+)\n\n.*?\n\nNeeds (.+)\nRun: (.+)\n"""', text, re.DOTALL).groups()
    assert command in (f"python examples/{name}.py", f"torchrun --nproc-per-node 2 examples/{name}.py")
    extras = re.findall(r'pip install --no-build-isolation "\.\[(\w+)\]"$', needs)
    assert len(extras) == (NEEDS[name] is not None)
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8") for extra in extras)
    with pytest.raises(SystemExit) as left:
        run(name, "--help")
    assert left.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert first in said
    assert said.count("(default: ") == text.count("add_argument(")


def test_training_loop(capsys: pytest.CaptureFixture[str]) -> None:
    run("training_loop", "--epochs", "15")
    plain, *ours = rows_of(capsys.readouterr().out, "cross-entropy", "logit adjustment", "class-balanced focal")
    for overall, *_, few in ours:
        assert overall > plain[0] + 5
        assert few > plain[-1] + 20


def test_transformers_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    run("transformers_trainer", "--vocabulary", "30", "--sequences", "300", "--epochs", "4")
    plain, adjusted, weighted = rows_of(capsys.readouterr().out, "cross-entropy", "logit adjustment", "class weights")
    for loss, everything, many, _, few in (adjusted, weighted):
        assert few > plain[-1] + 5
        assert many < plain[2]
        assert everything > 100 / 30
        assert loss < math.log(30)
    assert adjusted[0] == pytest.approx(plain[0], abs=0.05), "with its bias the loss is that of the text"
    assert weighted[0] > plain[0] + 0.1


def test_lightning_module(capsys: pytest.CaptureFixture[str]) -> None:
    run("lightning_module", "--samples", "300", "--imbalance-factor", "50", "--epochs", "6")
    # weights of the first and the last class, loss, accuracies of many, medium and few
    epochs = rows_of(capsys.readouterr().out, *(f"{epoch:5} " for epoch in range(6)))
    assert [row[:2] == [1.0, 1.0] for row in epochs] == [True] * 4 + [False] * 2
    assert epochs[-1][0] < 0.5 < 2 < epochs[-1][1]
    assert epochs[-1][2] < epochs[3][2] < epochs[0][2]
    assert epochs[-1][-1] > epochs[3][-1] + 10


def test_segmentation(capsys: pytest.CaptureFixture[str]) -> None:
    run("segmentation", "--images", "100", "--size", "24", "--steps", "100")
    names = [f"{loss}, {kind} %" for loss in ("cross-entropy", "weighted focal") for kind in ("recall", "IoU")]
    plain_recall, plain_iou, recall, iou = rows_of(capsys.readouterr().out, *names)
    assert recall[-1] > plain_recall[-1] + 20
    assert iou[-1] > plain_iou[-1]
    assert sum(iou) > sum(plain_iou)
    assert min(iou[:2] + plain_iou[:2]) > 80


def test_sharded_vocabulary() -> None:
    script = str(ROOT / "examples" / "sharded_vocabulary.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, script, "--vocabulary", "301", "--features", "8", "--steps", "10"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "150 of 301 rows of the head on rank 0 of 2" in done.stdout
    (first, expected_first), (last, expected_last) = rows_of(done.stdout, "    1 ", "   10 ")
    assert first == pytest.approx(expected_first, abs=1e-5)
    assert last == pytest.approx(expected_last, abs=1e-5)
    assert last < first - 0.2
    assert float(re.search(r"of a weight on rank 0: (.+)", done.stdout)[1]) < 1e-4


def test_sharded_vocabulary_without_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("sharded_vocabulary")
    assert "start it on several ranks: torchrun" in capsys.readouterr().err
