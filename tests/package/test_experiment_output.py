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
import torch

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import small_texts
from longtail import __main__
from longtail.experiments import (
    cifar,
    cifar_report,
    command,
    demo,
    demo_digits,
    demo_digits_report,
    demo_icd,
    digits,
    digits_report,
    methods,
    output,
    palette,
    tokens_model,
    tokens_report,
)
from longtail.experiments.texts import label_methods, run
from longtail.experiments.texts import report as texts_report
from longtail.training import LongTailScores

RESULTS = Path(__file__).parents[2] / "bench" / "results"
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?")
WIDTHS = (60, 80, 100, 120, 200)


def committed(name: str) -> list[dict[str, Any]]:
    return output.read_csv(RESULTS / f"experiment_{name}.csv")


def cifar_rows() -> list[dict[str, Any]]:
    figures = {"test_error": 12.345, "best_test_error": 11.987, "published_error": 13.52}
    figures |= {"accuracy_many": 0.91234, "accuracy_medium": 0.81, "accuracy_few": 0.5432}
    facts = {"experiment": "cifar", "loss": "class-balanced-sigmoid-focal", "published_in": "Cui et al. 2019, table 2"}
    facts |= {"dataset": "cifar10", "imbalance_factor": 100.0, "train_images": 12406, "incomplete_files": None}
    facts |= {"epochs": 200, "test_images": 10000, "test_error_by_epoch": "70.10 12.35"}
    return [output.with_provenance(figures | facts)]


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
@pytest.mark.parametrize("name", ["digits", "tokens", "cifar", "icd", "debtags"])
def test_reports_show_every_number(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report, rows = {
        "digits": (digits_report, lambda: committed("digits")),
        "tokens": (tokens_report, lambda: committed("tokens")),
        "cifar": (cifar_report, cifar_rows),
        "icd": (texts_report, lambda: small_texts.rows_of("icd")),
        "debtags": (texts_report, lambda: small_texts.rows_of("debtags")),
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
    plan = demo_digits.Plan(list(demo_digits.LOSSES), 50.0, 2, 1)
    scores = [LongTailScores(s, s, None, s, s, s) for s in (0.81234, 1.0)]  # type: ignore[arg-type]
    results = [demo_digits.Result(loss, scores, demo_digits.LossTime(123456e-6, 987654e-6)) for loss in plan.losses]
    demo_digits_report.print_report(plan, demo_digits.load(plan), results, "backend cpu")
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


@pytest.mark.parametrize("name", ["digits", "tokens", "cifar", "icd", "debtags"])
def test_a_csv_is_drawn_again(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"experiment_{name}.csv"
    if name == "cifar":
        output.write_csv(cifar_rows(), path)
    elif name in run.KINDS:
        output.write_csv(small_texts.rows_of(name), path)
    else:
        path.write_bytes((RESULTS / path.name).read_bytes())
    before = path.read_bytes()
    __main__.main(["experiment", "redraw", str(path)])
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "logit adjustment" in printed or name == "cifar"
    assert printed.endswith(f"{path.stem}.png\n")
    output.write_csv(output.read_csv(path), path)
    assert path.read_bytes() == before, "what is read is what was written"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "experiment_x.csv' is not a file"),
        ("", "has no rows"),
        ("experiment,method\ndigits\n", "rows of different lengths"),
        ("experiment,method\ndigits,a,b\n", "rows of different lengths"),
        ("method\na\n", "'None' is no experiment, expected one of digits, tokens, cifar, icd, debtags, places"),
        ("experiment\nmnist\n", "'mnist' is no experiment"),
        ("experiment,method\ndigits,a\n", "'imbalance_factor'"),
        ("experiment,method\nicd,a\n", "no CSV of a whole run"),
        ("incomplete,experiment\n3 of 6 networks,digits\n", "it is of a run that was interrupted: 3 of 6 networks"),
    ],
)
def test_no_other_csv_is_drawn(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "experiment_x.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as left:
        __main__.main(["experiment", "redraw", str(path)])
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not path.with_suffix(".png").exists()


def test_every_method_has_a_colour_of_its_own() -> None:
    chosen = (*methods.grid(), *methods.selection(), methods.HIERARCHICAL, *cifar.METHODS.values())
    families = {method.family for method in chosen} | {method.name for method in label_methods.label_methods()}
    counts = torch.arange(1, 9)
    objectives = {objective.name for objective in (*tokens_model.cross_entropies(), *tokens_model.variants(counts))}
    of_icd = [method.name for method in demo_icd.LOSSES.values()]
    used = {palette.colour_of(name) for name in (*families, *demo_digits.LOSSES.values(), *of_icd, *objectives)}
    assert len(set(palette.COLOURS.values())) == len(palette.COLOURS)
    assert used == {*palette.COLOURS.values()}


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def run(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "RUNNERS", dict.fromkeys(command.RUNNERS, run))
    monkeypatch.setattr(demo, "run", run)
    return None


@pytest.mark.usefixtures("interrupted")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("demo", "longtail demo: interrupted\n"),
        ("experiment digits", "longtail experiment digits: interrupted: no result is kept\n"),
        ("experiment tokens", "longtail experiment tokens: interrupted: no result is kept\n"),
        ("experiment debtags", "longtail experiment debtags: interrupted: no result is kept\n"),
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


# A shell starts what runs in the background with interrupts ignored, and children inherit that.
TELLS = """
import contextlib
import signal
from longtail.__main__ import main
from longtail.experiments import output

@contextlib.contextmanager
def progress(total):
    yield lambda status: print(status, flush=True)

output.progress_bar = progress
signal.signal(signal.SIGINT, signal.default_int_handler)
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
    kept = re.fullmatch(
        r"longtail experiment digits: interrupted: (\d+) of 1110 networks kept in experiment_digits_incomplete.csv\n",
        said,
    )
    assert kept
    (path,) = tmp_path.iterdir()
    rows = output.read_csv(path)
    assert len(rows) == int(kept[1]) >= 1
    assert {row["incomplete"] for row in rows} == {f"{len(rows)} of 1110 networks"}
