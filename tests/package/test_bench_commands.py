"""Promise: one command runs every section of the benchmark, explains its options, and is the one that texts name."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from documents import PAGES, ROOT

pytest.importorskip("rich")
pytest.importorskip("matplotlib")


@pytest.fixture
def bench(monkeypatch):
    """The command line, in this process."""
    monkeypatch.syspath_prepend(str(ROOT))
    import bench.__main__

    return bench.__main__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("cpu --shape 2,3,4,5", "section cpu has no problems of that many dimensions"),
        ("cpu --shape 64x96", "'64x96' is not N,C"),
        ("cpu --shape 64,1", "'64,1' is not N,C"),
        ("images --shape 64,96,8", "'64,96,8' is not N,C"),
        ("cpu --rounds 0", "'0' is not a whole number of at least 1"),
        ("cpu --dtype float64", "invalid choice: 'float64'"),
        (
            "--shape 64,96",
            "--shape needs a section before it: all, cpu, statistics, tail, sigmoid, multi_label, soft,",
        ),
        ("-- cpu", "-- needs a section before it: all, cpu,"),
        ("linear --rounds 0", "'0' is not a whole number of at least 1"),
        ("all --rounds 2", "unrecognized arguments: --rounds 2"),
        ("gpu-session tests", "unrecognized arguments: tests"),
        ("gpu-session --first --second", "argument --second: not allowed with argument --first"),
        ("smoke --shape 9", "'9' is not N,C or N,C,P"),
        ("cpu --output cpu.txt", "'cpu.txt' is not a .csv file"),
        ("tpu", "invalid choice: 'tpu'"),
    ],
)
def test_bad_options_are_explained_in_one_line(options, message, bench, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(options.split())
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_folder_at_the_csvs_path_is_noticed_first(bench, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.csv").mkdir()
    for section in ("cpu", "growth", "linear", "pages", "parallel", "step"):
        monkeypatch.setattr(sys, "argv", ["bench", section, "--output", str(tmp_path / "a.csv")])
        with pytest.raises(SystemExit) as stop:
            bench.main()
        assert stop.value.code == 2
        assert "a.csv' is a folder" in capsys.readouterr().err


def test_an_option_given_twice_adds_up(bench):
    twice = ["cpu", "--shape", "2,3", "--shape", "4,5", "--dtype", "float32", "--dtype", "bfloat16"]
    arguments = bench.section_parser("cpu")[0].parse_args(twice[1:])
    assert arguments.shape == [(2, 3), (4, 5)]
    assert arguments.dtype == ["float32", "bfloat16"]


def test_alone_it_names_the_sections(bench, capsys):
    bench.main([])
    alone = capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        bench.main(["--help"])
    assert (stop.value.code, capsys.readouterr().out) == (0, alone)
    for name in bench.SECTIONS:
        assert f"\n    {name} " in alone or f"\n    {name}\n" in alone


def test_all_runs_every_section_until_one_fails(bench, monkeypatch, capsys):
    ran = []

    def run(words, **_options):
        ran.append(words[3:])
        return subprocess.CompletedProcess(words, 3 if words[3] == "parallel" else 0)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as stop:
        bench.main(["all", "--no-compile"])
    assert stop.value.code == 3
    assert capsys.readouterr().err == "bench all: parallel failed\n"
    compiled = [
        (name, "--no-compile")
        for names in ("cpu statistics tail sigmoid multi_label", "soft images few threads overhead gpu")
        for name in names.split()
    ]
    assert ran == [
        *compiled,
        ("pages",),
        ("growth",),
        ("linear",),
        ("linear", "--dtype", "bfloat16"),
        ("step",),
        ("parallel",),
    ]


def commands_of(text):
    """What follows "python -m bench" in a text, as far as it is words of a command."""
    return [found.split() for found in re.findall(r"python -m bench((?: [\w-]+)*)", text)]


def test_every_command_that_is_named_is_one(bench):
    from bench import every

    files = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "Makefile")] + PAGES
    texts = [path.read_text(encoding="utf-8") for path in (*files, *(ROOT / "bench").glob("*.py"))]
    named = [words for text in texts for words in commands_of(text)]
    named += every.COMMANDS
    assert len(named) > 20
    assert not any("python -m bench." in text for text in texts)
    for name, *options in (words for words in named if words):
        if name != "SECTION":
            bench.section_parser(name)[0].parse_args(options)
