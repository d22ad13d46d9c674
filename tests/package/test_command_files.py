"""What the commands write and print: looked at before training, whole or not at all, and on any terminal."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from full_disk import full_disk
from longtail import __main__, files
from longtail.experiments import command, demo_digits, demo_digits_report, output


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain,  as it is: é", "plain,  as it is: é"),
        ("\x1b[2J\x07\u202egnp.exe\x9b", "\\x1b[2J\\x07\\u202egnp.exe\\x9b"),
        ("several\r\nlines\x85  of it\t", "several lines of it"),
        ("not \udcff a character", "not \\udcff a character"),
        ("long" * 1000, "long" * 499 + "l..."),
        (ValueError("x\x00"), "x\\x00"),
    ],
)
def test_a_text_is_one_line_without_control_characters(text: object, shown: str) -> None:
    assert files.one_line(text) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12, "12"),
        (1 << 101, "an integer of more than 100 bits"),
        (2.5, "2.5"),
        (None, "None"),
        (True, "True"),
        ("a\x1bb", r"'a\x1bb'"),
        (b"x" * 10**6, "b'" + "x" * 95 + "..."),
        ([1], "a list"),
    ],
)
def test_values_are_shown_briefly(value: object, shown: str) -> None:
    assert files.brief(value) == shown


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", files.MAX_BYTES + 1)
    for path, said in ((tmp_path, "is not a file"), (tmp_path / "huge", "expected at most 1073741824")):
        with pytest.raises(ValueError, match=f"{path.name}' .*{said}"):
            files.read_whole(path)


def test_neither_a_protected_file_nor_a_device_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protected, device = tmp_path / "protected", tmp_path / "device"
    protected.touch()
    device.symlink_to("/dev/null")
    monkeypatch.setattr(os, "access", lambda path, _: path != protected)  # root may write everywhere
    for path, said in ((protected, "cannot be written to"), (device, "is not a file")):
        with pytest.raises(ValueError, match=f"{path.name}' {said}"):
            files.check_writable(path)
    files.check_writable(tmp_path / "other")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=f"the folder '{tmp_path}' cannot be written to"):
        files.check_folder(tmp_path / "new" / "folder")


def test_folders_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (Path("new/folder"), tmp_path / "other", Path()):
        files.check_folder(folder)
        files.make_folder(folder)
        files.make_folder(folder)
        assert folder.is_dir()
    Path("file").touch()
    Path("dangling").symlink_to("nowhere")
    for name in ("file", "file/folder", "dangling"):
        with pytest.raises(ValueError, match="' is not a folder"):
            files.check_folder(Path(name))
        with pytest.raises(OSError, match=f"the folder '{name}' cannot be made: "):
            files.make_folder(Path(name))


class SmallReport:
    @staticmethod
    def print_report(rows: list[output.Row]) -> None:
        lines = [(str(row["method"]), "81.2 ± 3.4") for row in rows]
        output.print_table("in µs", (("method",), ("mean ± spread",)), lines, ["± is the standard deviation"])

    @staticmethod
    def draw(_: list[output.Row], path: Path) -> None:
        output.save_figure(output.plotting().figure(figsize=(1, 1)), path, 10)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Experiments that are done at once; the list tells which of them ran."""
    ran: list[str] = []

    def run(arguments: Any) -> Any:
        ran.append(arguments.experiment)
        return [{"method": "class-balanced softmax"}], SmallReport

    monkeypatch.setattr(command, "RUNNERS", dict.fromkeys(command.RUNNERS, run))
    return ran


NAMES = {
    "digits": "experiment_digits",
    "tokens": "experiment_tokens",
    "tokens --seed 2": "experiment_tokens_seed2",
    "cifar --data .": "experiment_cifar10_100",
    "cifar --data . --seed 3": "experiment_cifar10_100_seed3",
    "cifar --data . --imbalance-factor 10.0000001": "experiment_cifar10_10.0000001",
}


def test_runs_of_other_settings_have_other_files(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, name in NAMES.items():
        __main__.main(["experiment", *options.split(), "-o", str(tmp_path)])
        assert (tmp_path / f"{name}.csv").exists(), options
        assert f"{name}.csv and " in capsys.readouterr().out
    assert len(trained) == len(NAMES) == len(list(tmp_path.glob("*.png")))


@pytest.mark.parametrize("suffix", ["csv", "png", "csv.partial"])
@pytest.mark.parametrize("options", NAMES)
def test_a_result_that_cannot_be_written_is_noticed_first(
    options: str, suffix: str, trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{NAMES[options]}.{suffix}").mkdir()
    with pytest.raises(SystemExit) as left:
        __main__.main(["experiment", *options.split(), "-o", str(tmp_path)])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"longtail experiment \w+: error: '.*{NAMES[options]}.{suffix}' is a folder.*\n", said)
    assert not trained


@pytest.mark.parametrize(("most_bytes", "failed"), [(60, ["png"]), (0, ["csv", "png"])])
@pytest.mark.usefixtures("trained")
def test_a_full_disk_takes_no_other_result_with_it(
    most_bytes: int, failed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tmp_path / "experiment_digits.csv"
    csv.write_text("before")
    with full_disk(most_bytes), pytest.raises(SystemExit) as left:
        __main__.main(["experiment", "digits", "-o", str(tmp_path)])
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert "class-balanced softmax" in printed.out
    assert printed.err.count("\n") == 1
    for suffix in failed:
        assert f"experiment_digits.{suffix}' cannot be written: File too large" in printed.err
    assert (csv.read_text() == "before") == ("csv" in failed)
    assert [*tmp_path.iterdir()] == [csv]


@pytest.mark.usefixtures("trained")
def test_a_full_disk_is_named_where_nobody_reads_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(SmallReport, "print_report", stop)
    with full_disk(), pytest.raises(SystemExit) as left:
        __main__.main(["experiment", "digits", "-o", str(tmp_path)])
    assert left.value.code == 2
    assert "experiment_digits.csv' cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("buffered", [True, False])
def test_output_that_nobody_reads_is_no_traceback(
    buffered: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(open(writer, "wb"), write_through=not buffered) as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as left:
            __main__.main(["info"])
        monkeypatch.undo()
    assert left.value.code == 1
    assert capsys.readouterr().err == ""


def test_links_are_followed_but_for_the_partial_file(tmp_path: Path) -> None:
    victim, target, link = (tmp_path / name for name in ("victim", "target", "link"))
    victim.write_bytes(b"kept")
    link.symlink_to(target)
    (tmp_path / "target.partial").symlink_to(victim)
    files.write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert victim.read_bytes() == b"kept"
    assert {path.name for path in tmp_path.iterdir()} == {"victim", "target", "link"}


def test_a_terminal_of_ascii(trained: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "caf\u00e9"
    folder.mkdir()
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    __main__.main(["experiment", "digits", "-o", str(folder)])
    terminal.seek(0)
    printed = terminal.read()
    assert trained == ["digits"]
    assert "+- is the standard deviation" in printed
    assert "81.2 +- 3.4" in printed
    assert "in us" in printed
    assert "caf\\xe9" in printed
    assert {path.suffix for path in folder.iterdir()} == {".csv", ".png"}


def test_an_option_given_twice_adds_up() -> None:
    parse = __main__.make_parser().parse_args
    twice = ["--loss", "cross-entropy", "--loss", "complement-cross-entropy"]
    both = ["cross-entropy", "complement-cross-entropy"]
    assert parse(["demo", *twice]).loss == both
    assert parse(["experiment", "cifar", "--data", ".", *twice]).loss == both
    factors = ["--imbalance-factor", "10", "--imbalance-factor", "20", "50"]
    assert parse(["experiment", "digits", *factors]).imbalance_factor == [10, 20, 50]


DIGITS = ["--data", "digits", "--seeds", "2", "--loss", "cross-entropy"]


def small_demo(monkeypatch: pytest.MonkeyPatch, draw: Any) -> None:
    """A demo that trains nothing."""
    scores = [demo_digits.LongTailScores(s, s, None, s, s, s) for s in (0.5, 1.0)]  # type: ignore[arg-type]
    results = [demo_digits.Result("cross-entropy", scores, demo_digits.LossTime(1e-6, 2e-6))]
    monkeypatch.setattr(demo_digits_report, "run_with_progress", lambda *_: results)
    monkeypatch.setattr(demo_digits_report, "draw", draw)


def test_a_demo_without_room_for_its_picture_prints_its_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_demo(monkeypatch, lambda *arguments: files.write_whole(arguments[-1] / "no folder", b""))
    with pytest.raises(SystemExit) as left:
        __main__.main(["demo", *DIGITS, "--output", str(tmp_path / "a.png")])
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert "75.0±35.4" in printed.out
    assert re.fullmatch(r"longtail demo: error: '.*no folder' cannot be written: .*\n", printed.err)


def test_a_demo_draws_before_it_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever reads the table may stop listening."""

    def stop(*_: Any) -> None:
        raise SystemExit(1)

    small_demo(monkeypatch, lambda *arguments: files.write_whole(arguments[-1], b"picture"))
    monkeypatch.setattr(demo_digits_report, "print_report", stop)
    with pytest.raises(SystemExit):
        __main__.main(["demo", *DIGITS, "--output", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes() == b"picture"
