"""Promise: a picture says which commits its rows are from, and the README shows every objective of the tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _bench_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def row(commit: str, **changes: str) -> dict[str, str]:
    facts = {"device": "cpu", "cpu": "A processor", "threads": "2", "isa": "avx2", "torch": "2.13.0"}
    return facts | {"longtail": "0.1.0", "commit": commit, "date": "2026-11-21T09:00:00+00:00"} | changes


def test_a_caption_names_every_source() -> None:
    plot = pytest.importorskip("bench.plot")
    machine = "cpu (A processor, 2 threads, avx2)"
    one = "torch 2.13.0, longtail 0.1.0, commit {}, 2026-11-21"
    assert plot.caption([row("a"), row("a")]) == f"{machine}\n{one.format('a')}"
    assert plot.caption([row("a", threads="16"), row("a", threads="1")]).startswith("cpu (A processor, 1 to 16 threads")
    later = row("b", date="2026-11-22T09:00:00+00:00")
    lines = plot.caption([later, row("a"), row("a"), row("a", torch="2.14.0")]).splitlines()
    assert lines[:2] == [machine, f"{one.format('a')}: 2 of 4 rows"]
    assert set(lines[2:]) == {
        "torch 2.13.0, longtail 0.1.0, commit b, 2026-11-22: 1 of 4 rows",
        "torch 2.14.0, longtail 0.1.0, commit a, 2026-11-21: 1 of 4 rows",
    }


def test_every_picture_has_that_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot = pytest.importorskip("bench.plot")
    from bench import results

    rows = results.read(results.FOLDER / "cpu.csv")
    captions: list[str] = []
    caption = plot.caption
    monkeypatch.setattr(plot, "caption", lambda rows: captions.append(caption(rows)) or captions[-1])
    copied = tmp_path / "cpu.csv"
    copied.write_bytes((results.FOLDER / "cpu.csv").read_bytes())
    pictures = plot.draw(copied)
    assert len(captions) == len(pictures) > 5
    for picture, said in zip(pictures, captions, strict=True):
        section = picture.name.split("_")[0]
        assert all(r["commit"] in said for r in rows if r["section"] == section), picture.name


def test_the_readme_shows_every_objective_of_the_tokens() -> None:
    results = pytest.importorskip("bench.results")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme[readme.index("| objective | overall |") :].split("\n\n")[0]
    stated = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    rows = results.read(results.FOLDER / "experiment_tokens.csv")
    shown = [r for i, r in enumerate(rows) if not i or r["objective"] != "cross-entropy"]
    assert len(stated) == len(shown)
    for cells, measured in zip(stated, shown, strict=True):
        assert cells[0] == measured["objective"] or "log-priors" in cells[0] + measured["evaluated"]
        for cell, group in zip(cells[1:], ("overall", "head", "mid", "tail"), strict=True):
            assert float(cell.replace(",", "")) == pytest.approx(float(measured[f"perplexity_{group}"]), rel=5e-3), (
                group
            )
