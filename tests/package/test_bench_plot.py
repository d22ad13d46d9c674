"""Promise: pictures give a contender one colour, name the commits of a panel, and put no bar on a log axis."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
import numpy as np
import torch
from matplotlib.colors import to_hex
from PIL import Image

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
LATER = "abc1234"

# How the colour-blind see linear RGB: Machado, Oliveira and Fernandes 2009, at full severity.
SIGHT = {
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


class Drawn(NamedTuple):
    """A picture, the rows that it is of, and what it was written to."""

    figure: Any
    rows: list[dict[str, str]]
    path: Path

    def panels(self) -> list[Any]:
        return [axis for axis in self.figure.axes if axis.get_visible()]


@pytest.fixture(scope="module", autouse=True)
def _bench_on_the_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Drawn]:
    """All that ``python -m bench plot`` draws of the rows here, of which one panel's are from a later commit."""
    from bench import __main__, figures, results

    folder = tmp_path_factory.mktemp("results")
    for name in ("cpu.csv", "growth.csv"):
        rows = results.read(RESULTS / name)
        for row in rows:
            if (row["section"], row["C"], row["dtype"]) == ("cpu", "1000", "bfloat16"):
                row["commit"] = LATER
        results.write_table(folder / name, list(rows[0]), rows)
    drawn = []
    save = figures.save

    def kept(figure: Any, path: Path, what: str, rows: list[dict[str, str]], *rest: Any) -> Path:
        drawn.append(Drawn(figure, rows, path))
        return save(figure, path, what, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", kept)
        patch.setattr(figures, "DPI", 50)
        __main__.main(["plot", "--folder", str(folder)])
    return drawn


def lab(linear: Any) -> Any:
    """CIE L*a*b* of linear sRGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ linear / np.array([0.9505, 1, 1.0888]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_the_palette_holds_every_contender() -> None:
    from bench import calls, contenders, gpu, multi_label, palette, results, words

    problem = contenders.Problem.make((4, 5), torch.float32, torch.device("cpu"))
    offered = [*contenders.of_loss("plain", problem), *calls.others(problem), contenders.copy(problem)]
    rows = [{"contender": x.name, "gradient": x.gradient} for x in offered]
    rows += [{"contender": name, "gradient": gradient} for name, _, _, gradient, _ in gpu.PEERS]
    rows.append({"contender": multi_label.NAME, "gradient": ""})
    rows += [row for name in ("cpu", "growth") for row in results.read(RESULTS / f"{name}.csv")]
    assert {palette.contender(row) for row in rows} == {*palette.COLOURS} == {*words.CONTENDERS} == {*words.TERMS}
    assert {*contenders.LOSSES} == {*words.LOSSES}


@pytest.mark.parametrize("sight", [None, *SIGHT])
def test_no_two_colours_look_the_same(sight: str | None) -> None:
    from bench import palette

    seen = np.array(SIGHT[sight]) if sight else np.eye(3)
    colours = {}
    for name, colour in palette.COLOURS.items():
        encoded = np.array(rgb(colour)) / 255
        linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
        colours[name] = lab((seen @ linear).clip(0, 1))
    for (a, one), (b, other) in itertools.combinations(colours.items(), 2):
        assert np.linalg.norm(one - other) > 15, (a, b)


def colours_of(picture: Drawn) -> set[str]:
    """Those of its bars, dots and lines."""
    bars = {to_hex(bar.get_facecolor()) for axis in picture.panels() for bar in axis.patches}
    return bars | {to_hex(line.get_color()) for axis in picture.panels() for line in axis.lines}


def test_a_contender_has_its_colour_in_every_picture(pictures: list[Drawn]) -> None:
    from bench import palette

    for picture in pictures:
        contenders = {palette.contender(row) for row in picture.rows}
        assert colours_of(picture) == {palette.COLOURS[name].lower() for name in contenders}, picture.path.name
        pixels = Image.open(picture.path).convert("RGB").getcolors(2**20)
        assert pixels is not None
        assert {rgb(palette.COLOURS[name]) for name in contenders} <= {colour for _, colour in pixels}


def test_bars_start_at_zero_of_a_linear_axis(pictures: list[Drawn]) -> None:
    barred = [axis for picture in pictures for axis in picture.panels() if axis.patches]
    assert len(barred) == 4, "two of speed, one of calls, one of pages"
    for axis in barred:
        assert (axis.get_xscale(), axis.get_yscale(), axis.get_xlim()[0]) == ("linear", "linear", 0)


def test_every_row_is_drawn(pictures: list[Drawn]) -> None:
    for picture in pictures:
        losses = len({row["loss"] for row in picture.rows if row["loss"]})
        marks = sum(len(axis.patches) + sum(len(line.get_xdata()) for line in axis.lines) for axis in picture.panels())
        of_loss = sum(bool(row["loss"]) for row in picture.rows)
        others = len(picture.rows) - of_loss  # the copy, in the panels of every loss of curves and speed
        shared = bool(picture.figure.legends) or picture.path.stem.endswith("speed")
        assert marks == of_loss + others * (losses if shared else 1), picture.path.name


def test_a_panel_names_its_commits(pictures: list[Drawn]) -> None:
    later = []
    for picture in pictures:
        commits = {row["commit"] for row in picture.rows}
        for axis in picture.panels():
            (line,) = [text.get_text() for text in axis.texts if text.get_text().startswith("commit")]
            assert {*line.split()[1:]} <= commits
            if LATER in line:
                later.append((picture.path.name, axis.get_title("left"), line))
    assert later == [("cpu_time.png", "16384 x 1000, bfloat16", f"commit {LATER}")]


def test_what_was_measured_with_what() -> None:
    from bench import words

    facts = {"device": "cpu", "cpu": "A processor", "threads": "2", "isa": "avx2", "torch": "2.13.0", "backend": ""}
    facts |= {"longtail": "0.1.0", "commit": "a", "date": "2026-11-21T09:00:00+00:00"}
    ours, later = facts | {"backend": "cpu"}, facts | {"commit": "b", "date": "2026-11-22T09:00:00+00:00"}
    said = "Medians; A processor, 2 threads, avx2; torch 2.13.0; longtail 0.1.0, backend cpu; 2026-11-21"
    assert words.machine([facts, ours]) == said
    assert words.machine([facts, ours, later]) == f"{said} to 2026-11-22"
    assert "torch 2.13.0, 2.14.0;" in words.machine([ours, facts | {"torch": "2.14.0"}])
    assert "A processor, 1 to 16 threads," in words.machine([ours | {"threads": "1"}, ours | {"threads": "16"}])
    assert words.machine([ours | {"device": "A GPU"}]).startswith("Medians; A GPU (A processor, 2 threads, avx2);")
    assert words.commits([facts, ours]) == "commit a"
    assert words.commits([facts, later, ours]) == "commits a (2 of 3 rows), b (1 of 3 rows)"


def test_a_caption_explains_every_term(pictures: list[Drawn]) -> None:
    from bench import palette, words

    for picture in pictures:
        caption = " ".join(picture.figure.get_supxlabel().split())
        assert words.machine(picture.rows) in caption
        for row in picture.rows:
            assert words.TERMS[palette.contender(row)] in caption
            if row["loss"] and not picture.path.stem.endswith("speed"):  # whose panels are named by the loss in full
                assert f"{words.loss(row['loss'])}: {words.LOSSES[row['loss']]}" in caption
            if row["section"] == "pages":
                assert f"{words.pages(row)} pages: {words.PAGES[words.pages(row)]}" in caption


def test_shapes_are_those_of_the_logits() -> None:
    from bench import words

    assert words.problem({"section": "cpu", "N": "2048", "C": "32768", "dtype": "float32"}) == "2048 x 32768, float32"
    assert words.shape({"section": "images", "N": str(4 * 512 * 512), "C": "19"}) == "4 x 19 x 512 x 512"
    assert words.shape({"section": "few-images", "N": str(4 * 256 * 256), "C": "3"}) == "4 x 3 x 256 x 256"
    assert words.shape({"section": "images", "N": "40", "C": "3"}) == "3 classes, 40 pixels"


def test_the_picture_of_speed_says_how_much_faster(pictures: list[Drawn]) -> None:
    (speed,) = [picture for picture in pictures if picture.path.name == "cpu_speed.png"]
    times = {(row["loss"], row["contender"], row["gradient"]): float(row["median_ms"]) for row in speed.rows}
    for loss, axis in zip(("plain", "family"), speed.panels(), strict=True):
        said = [text.get_text() for text in axis.texts if " ms" in text.get_text()]
        assert len(said) == 6
        eager, ours = times[loss, "eager", ""], times[loss, "longtail", "backward"]
        assert said[0] == f"{eager:.0f} ms"
        assert said[2] == f"{ours:.1f} ms, {eager / ours:.{0 if eager / ours >= 10 else 1}f} times as fast as eager"
        assert "eager" not in said[-1], "the copy is no loss"


def test_each_backend_has_its_pictures(tmp_path: Path) -> None:
    from bench import plot, results

    rows = [row for row in results.read(RESULTS / "cpu.csv") if row["section"] == "images"]
    other = [row | {"backend": "reference"} for row in rows if row["backend"]]
    path = tmp_path / "cpu.csv"
    results.write_table(path, list(rows[0]), [*rows, *other])
    assert [picture.name for picture in plot.draw(path)] == ["images-cpu_time.png", "images-reference_time.png"]


def test_the_pictures_here_are_those_that_are_drawn(pictures: list[Drawn]) -> None:
    here = [path for path in RESULTS.glob("*.png") if not path.name.startswith("experiment_")]
    assert {path.name for path in here} == {picture.path.name for picture in pictures}
    for path in here:
        assert path.stat().st_size < 150_000, path.name
        assert Image.open(path).width == 1350, "9 inches"


def test_without_rows_there_is_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench import __main__

    with pytest.raises(SystemExit) as stop:
        __main__.main(["plot", "--folder", str(tmp_path)])
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"bench plot: no rows in {tmp_path}\n"
