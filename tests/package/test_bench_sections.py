"""The benchmark's layouts, threads, pages and growth: what their rows say, and that old rows stay beside them."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

import pytest
import torch

import longtail

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
MODES = ["backward", "forward", "inplace"]
CORRECT = longtail.cross_entropy


@pytest.fixture(autouse=True)
def main(monkeypatch):
    """The command line, in this process."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.__main__ import main

    return main


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_few_classes_have_rows_in_both_layouts(tmp_path, main):
    from bench import results

    path = tmp_path / "cpu.csv"
    main(["few", "--shape", "24,2", "2,3,4,5", "--rounds", "1", "--output", str(path)])
    rows = results.read(path)
    expected = [("few-rows", "contiguous", "24", "2")]
    expected += [("few-images", layout, "40", "3") for layout in ("contiguous", "channels_last")]
    assert list(dict.fromkeys((r["section"], r["layout"], r["N"], r["C"]) for r in rows)) == expected
    assert len(rows) == 3 * 2 * (1 + 2 * (1 + len(MODES)))
    copies = {(r["layout"], r["dtype"], r["C"]): r["median_ms"] for r in rows if r["contender"] == "copy"}
    assert len(copies) == 6
    assert all(row["copy_ms"] == copies[row["layout"], row["dtype"], row["C"]] for row in rows)
    for name in ("few-rows_time.png", "few-images_time.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_logits_and_both_sides_of_their_copy_have_the_layout():
    from bench import contenders, measure

    problem = contenders.Problem.make((2, 3, 4, 5), torch.float32, torch.device("cpu"), "channels_last")
    out = contenders.copy(problem).forward.__closure__[0].cell_contents
    ring = measure.Ring(problem.logits)
    for tensor in (problem.logits, out, ring.take()):
        assert tensor.stride() == (60, 1, 15, 3)
    taken = ring.take()
    with torch.no_grad():
        taken.zero_()
    ring.restore(taken)
    assert torch.equal(taken, problem.logits)


def test_rows_from_before_the_layout_stay_and_are_replaced(tmp_path, main):
    from bench import results

    path = tmp_path / "cpu.csv"
    command = ["images", "--shape", "2,3,4,5", "--rounds", "1", "--no-compile", "--no-pictures", "--output", str(path)]
    main(command)
    before = results.read(path)
    other = [{**row, "section": "sigmoid"} for row in before]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in before[0] if name != "layout"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(before + other)
    assert results.read(path) == before + other, "all of them were contiguous"
    main(command)
    after = results.read(path)
    assert after[len(before) :] == other
    assert [row["median_ms"] for row in after[: len(before)]] != [row["median_ms"] for row in before]
    with path.open() as file:
        assert "layout" in file.readline().split(",")


def test_committed_rows_are_read_with_their_numbers():
    from bench import results

    texts = results.read(results.FOLDER / "cpu.csv")
    rows = [results.row_of(text) for text in texts]
    assert len(rows) > 100
    for text, row in zip(texts, rows, strict=True):
        assert (row.section, row.N, row.layout) == (text["section"], int(text["N"]), text["layout"])
        assert row.passes is None or row.bytes == row.passes * row.N * row.C * (4 if row.dtype == "float32" else 2)


@pytest.mark.usefixtures("_two_threads")
def test_threads_go_up_to_all_and_back(tmp_path, main):
    from bench import results, suite

    counts = {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 4], 6: [1, 2, 4, 6]}
    assert {most: suite.thread_counts(most) for most in counts} == counts
    path = tmp_path / "cpu.csv"
    main(["threads", "--shape", "4,96", "1,4096", "--rounds", "1", "--output", str(path)])
    assert torch.get_num_threads() == 2
    contenders = [("copy", ""), *(("longtail", mode) for mode in MODES)]  # eager is compared with, not timed
    found = [(r["threads"], r["N"], r["contender"], r["gradient"]) for r in results.read(path)]
    assert found == [(threads, n, *each) for threads in "12" for n in "41" for each in contenders]
    assert (tmp_path / "threads_speedup.png").exists()


def test_pages_are_measured_in_processes_whose_environment_changes_them(tmp_path, main, monkeypatch):
    from bench import pages, results

    ran = []

    def run(words, env):
        ran.append((words[3:], env))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    path = tmp_path / "cpu.csv"
    options = ["--shape", "64,96", "--rounds", "1", "--output", str(path)]
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        main(["pages", *options])
    variables = {name for setting in pages.SETTINGS.values() for name in setting}
    assert [{k: v for k, v in env.items() if k in variables} for _, env in ran] == [*pages.SETTINGS.values()]
    for words, _ in ran:
        main(words)
    rows = results.read(path)
    expected = [(f"longtail, {kind} pages", mode) for kind in pages.SETTINGS for mode in MODES]
    assert [(r["contender"], r["gradient"]) for r in rows if r["loss"]] == expected
    assert [r["contender"] for r in rows if not r["loss"]] == [f"copy, {kind} pages" for kind in pages.SETTINGS]


def test_growth_has_every_size_or_says_what_it_leaves_out(tmp_path, main, monkeypatch, capsys):
    from bench import growth, results

    path = tmp_path / "growth.csv"
    monkeypatch.setattr(growth, "REPEATED", 400)
    monkeypatch.setattr(growth, "LARGE", 10000)
    monkeypatch.setattr(growth, "memory", lambda: (5000 * 2 + 60 * growth.ROW_BYTES) / growth.SHARE)
    main(["growth", "--elements", "300", "5000", "12000", "--classes", "4", "100", "--output", str(path)])
    found = [(int(r["N"]), int(r["C"]), r["contender"], r["gradient"]) for r in results.read(path)]
    every = [("longtail", "backward"), ("longtail", "inplace"), ("copy", "")]
    assert found == [*((3, 100, *x) for x in every), *((75, 4, *x) for x in every), (48, 100, *every[1])]
    assert (tmp_path / "growth_time.png").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Left out: 48 x 100 backward and copy (memory), 1200 x 4 inplace and backward and copy (memory), 120 x" in said
    )
    assert "x 4 inplace and backward (memory)" in said, "no copy where it is large"
    monkeypatch.setattr(growth, "RESTORING", 1.0)
    main(["growth", "--elements", "300", "--classes", "4", "--seconds", "2", "--output", str(tmp_path / "none.csv")])
    assert "Left out: 75 x 4 (time)" in capsys.readouterr().out
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize("wrong", [1, 10])
def test_growth_compares_the_few_rows_and_their_repeats(wrong, tmp_path, main, monkeypatch, capsys):
    """A loss that is wrong from so many rows on."""
    from bench import growth

    def loss(logits, target, **options):
        return CORRECT(logits, target, **options) * (1 if len(logits) < wrong else 1.1)

    monkeypatch.setattr(growth, "REPEATED", 32)
    monkeypatch.setattr(longtail, "cross_entropy", loss)
    path = tmp_path / "growth.csv"
    with pytest.raises(SystemExit) as stop:
        main(["growth", "--elements", "160", "--classes", "4", "--output", str(path)])
    assert stop.value.code == 1
    assert "of longtail" in capsys.readouterr().err
    assert not path.exists()


def test_goals_are_judged_from_the_rows_of_a_folder(tmp_path, main, capsys):
    main(["goals"])
    printed = capsys.readouterr().out
    for goal in ("cpu, in place: time of a copy", "sigmoid, dense, in place", "fused linear loss, none, float32"):
        assert goal in printed
    with pytest.raises(SystemExit) as stop:
        main(["goals", "--folder", str(tmp_path)])
    assert stop.value.code == 1
    assert "no rows in" in capsys.readouterr().err
