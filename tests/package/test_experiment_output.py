"""Tables show every number at any width, notes break between words, and Ctrl-C ends a command with one line."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from longtail import __main__
from longtail.experiments import (
    cifar_report,
    command,
    demo,
    demo_report,
    digits,
    digits_report,
    methods,
    output,
    tokens_report,
)
from longtail.training import LongTailScores

RESULTS = Path(__file__).parents[2] / "bench" / "results"
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?")
WIDTHS = (60, 80, 100, 120, 200)


def committed(name: str) -> list[dict[str, Any]]:
    """The rows of a CSV, with numbers where they are numbers."""
    with (RESULTS / name).open(newline="") as file:
        return [
            {
                k: (float(v) if "." in v or "e" in v else int(v)) if NUMBER.fullmatch(v) else v or None
                for k, v in r.items()
            }
            for r in csv.DictReader(file)
        ]


def digits_rows() -> list[dict[str, Any]]:
    rows = committed("experiment_digits.csv")
    shares = ("balanced", "few", "medium", "many", "train")
    for row in rows:
        row |= {
            k: float(v) for k, v in row.items() if k.startswith(shares) and isinstance(v, int) and k != "train_images"
        }
        row |= {f"{metric}_verdict": row[f"{metric}_verdict"] or "" for metric in digits.TESTED}
    return rows


def cifar_rows() -> list[dict[str, Any]]:
    numbers = {"test_error": 12.345, "best_test_error": 11.987, "published_error": 13.52}
    numbers |= {
        f"accuracy_{group}": share
        for group, share in (
            ("many", 0.91234),
            (
                "medium",
                0.81,
            ),
            ("few", 0.5432),
        )
    }
    facts = {
        "loss": "class-balanced-sigmoid-focal",
        "published_in": "Cui et al. 2019, table 2",
        "imbalance_factor": 100.0,
    }
    return [
        numbers
        | facts
        | {"dataset": "cifar10", "train_images": 12406, "epochs": 200, "test_images": 10000, "incomplete_files": None}
    ]


def cells_of(report: ModuleType, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that a report puts into tables."""
    cells: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            report, "print_table", lambda _title, _groups, lines, *_: cells.extend(c for x in lines for c in x)
        )
        report.print_report(rows)
    return cells


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["digits", "tokens", "cifar"])
def test_reports_show_every_number(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report, rows = {
        "digits": (digits_report, digits_rows),
        "tokens": (tokens_report, lambda: committed("experiment_tokens.csv")),
        "cifar": (cifar_report, cifar_rows),
    }[name]
    monkeypatch.setenv("COLUMNS", str(width))
    made: Any = rows()
    cells = cells_of(report, made, monkeypatch)
    assert sum(bool(NUMBER.search(cell)) for cell in cells) > 5
    capsys.readouterr()
    report.print_report(made)
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width
    # Names may be broken between words; what begins with a number is whole.
    words = printed.split()
    for cell in cells:
        for word in cell.split():
            assert word in words or not NUMBER.match(word), word
    for name_of_row in {str(row.get("method", "")) for row in made}:
        assert all(word in words for word in name_of_row.split())


@pytest.mark.parametrize("width", WIDTHS)
def test_the_demos_table_shows_every_number(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    plan = demo.Plan(list(demo.LOSSES), 50.0, 2, 1)
    scores = [LongTailScores(s, s, None, s, s, s) for s in (0.81234, 1.0)]  # type: ignore[arg-type]
    results = [demo.Result(loss, scores, demo.LossTime(123456e-6, 987654e-6)) for loss in plan.losses]
    demo_report.print_report(plan, demo.load_splits(plan), results, "backend cpu")
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= width
    words = printed.split()
    assert words.count("90.6±13.3") == 5 * len(results)
    assert words.count("123456") == words.count("987654") == len(results)
    assert "F.cross_entropy" in words


def test_a_narrow_table_keeps_groups_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = (("name",), ("a", "b"), ("c",), ("d", "e"))
    lines = [("one two", "11111", "22222", "33333", "44444", "55555")]
    tables = {
        60: ["name a b c d e"],
        43: ["name a b c d e"],
        30: ["name a b c", "name d e"],
        20: ["name a b", "name c", "name d e"],
    }
    for width, expected in tables.items():
        monkeypatch.setenv("COLUMNS", str(width))
        output.print_table("title", groups, lines, ["[not markup] :smile: and a note"])
        printed = capsys.readouterr().out.splitlines()
        assert [" ".join(line.split()) for line in printed if "name" in line] == expected
        assert "[not markup] :smile: and a note" in " ".join(printed).replace("  ", " ")


def test_a_factor_of_one_has_no_rare_classes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every class has as many images: methods that only re-weight equal cross-entropy, nothing is few-shot."""
    chosen = [methods.CROSS_ENTROPY, methods.class_balanced_softmax(0.9), methods.softmax_focal(2.0)]
    monkeypatch.setattr(digits, "grid", lambda: chosen)
    options = ["--imbalance-factor", "1", "50", "--seeds", "2", "--epochs", "1", "--jobs", "1", "-o", str(tmp_path)]
    __main__.main(["experiment", "digits", *options])
    printed = capsys.readouterr().out
    assert "nan" not in printed
    assert printed.count("few-shot accuracy: not tested.") == 1
    with (tmp_path / "experiment_digits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    even, long_tailed = rows[:3], rows[3:]
    assert [row["few_mean"] for row in even] == [""] * 3
    assert [row["few_p_holm"] for row in even] == [""] * 3
    assert float(even[1]["balanced_p"]) == 1
    assert even[1]["balanced_by_seed"] == even[0]["balanced_by_seed"]
    assert all(row["few_mean"] for row in long_tailed)
    assert "nan" not in (tmp_path / "experiment_digits.csv").read_text()


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def run(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "RUNNERS", dict.fromkeys(command.RUNNERS, run))
    monkeypatch.setattr(__main__, "run_demo", run)
    return None


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("demo", "longtail demo: interrupted\n"),
        ("experiment digits", "longtail experiment digits: interrupted: no result is kept\n"),
        ("experiment tokens", "longtail experiment tokens: interrupted: no result is kept\n"),
        (
            "experiment cifar --data .",
            "longtail experiment cifar: interrupted: its checkpoints are kept, the same command goes on from them\n",
        ),
    ],
)
def test_an_interrupt_is_one_line(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        __main__.main(arguments.split())
    assert left.value.code == 130
    assert capsys.readouterr().err == said


TELLS = """
import contextlib
from longtail.__main__ import main
from longtail.experiments import output

@contextlib.contextmanager
def progress(total):
    yield lambda status: print(status, flush=True)

output.progress_bar = progress
main(["experiment", "digits", "--jobs", "2", "--epochs", "1"])
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of a process group")
def test_an_interrupt_of_all_processes(tmp_path: Path) -> None:
    """As a terminal sends it: to the command and to the processes that it has started."""
    run, pipe = [sys.executable, "-c", TELLS], subprocess.PIPE
    with subprocess.Popen(run, stdout=pipe, stderr=pipe, text=True, start_new_session=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert "seed 0, cross-entropy" in process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert said == "longtail experiment digits: interrupted: no result is kept\n"
    assert not list(tmp_path.iterdir())
