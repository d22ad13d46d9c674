"""The section ``plot``: the pictures of the rows in bench/results, without measuring.

Sections that measure draw theirs themselves. Of each section the machine that was measured last is shown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from longtail.experiments.command_line import Parser

from . import bars, curves, results, speed, words
from .bars import Bars
from .curves import Curve

CSV_NAMES = ("cpu.csv", "growth.csv", "gpu.csv")
"""Those whose rows are drawn."""

NANOSECONDS = "ns per element (log scale)"


def _loss(row: dict[str, str]) -> str:
    return row["loss"]


def _times(what: str) -> Bars:
    return Bars(f"{what}: forward + backward", "ms (log scale)", bars.milliseconds, _loss, log=True)


BARS = {
    "cpu": _times("Softmax losses"),
    "statistics": _times("Any loss of a row"),
    "tail": _times("Losses for long tails and trees"),
    "sigmoid": _times("Sigmoid focal losses"),
    "multi_label": _times("Losses of several labels a row"),
    "soft": _times("Cross-entropy with class probabilities"),
    "images": _times("Softmax focal loss over images"),
    "overhead": Bars(
        title="Calls on few logits: forward + backward",
        quantity="microseconds",
        value=lambda row: 1e3 * bars.milliseconds(row),
        group=_loss,
    ),
    "pages": Bars(
        title="The pages that a gradient is written to: the family, forward + backward",
        quantity="ms",
        value=bars.milliseconds,
        group=lambda row: f"{words.pages(row)} pages",
    ),
    "gpu": _times("Softmax losses"),
    "gpu-statistics": _times("Any loss of a row"),
    "gpu-tail": _times("Losses for long tails and trees"),
    "gpu-sigmoid": _times("Sigmoid losses"),
    "gpu-multi-label": _times("Losses of several labels a row"),
    "gpu-soft": _times("Cross-entropy with class probabilities"),
    "gpu-images": _times("Losses over images"),
}
"""By section: pictures of bars or dots."""

CURVES = {
    "few-rows": Curve(
        title="Few classes, (N, C) logits: forward + backward, per element",
        x=curves.classes,
        x_label="classes (log scale)",
        y=curves.nanoseconds,
        y_label=NANOSECONDS,
        panel=lambda row: row["dtype"],
        columns=2,
        log_x=True,
        log_y=True,
    ),
    "few-images": Curve(
        title="Few classes, (N, C, H, W) logits: forward + backward, per element",
        x=curves.classes,
        x_label="classes",
        y=curves.nanoseconds,
        y_label=NANOSECONDS,
        panel=lambda row: f"{row['layout'].replace('_', '-')}, {row['dtype']}",
        columns=2,
        log_y=True,
    ),
    "growth": Curve(
        title="From few to many logits: forward + backward, per element",
        x=curves.elements,
        x_label="elements, N x C (log scale)",
        y=curves.nanoseconds,
        y_label=NANOSECONDS,
        panel=lambda row: f"{row['C']} classes, {row['dtype']}",
        columns=3,
        log_x=True,
        log_y=True,
    ),
    "threads": Curve(
        title="Speed-up by threads: forward + backward",
        x=curves.threads,
        x_label="threads",
        y=curves.speed_up,
        y_label="times as fast as one",
        panel=words.problem,
        columns=3,
        what="speedup",
    ),
}
"""By section: pictures of lines."""


def draw(csv_path: Path) -> list[Path]:
    """Draws each section of a CSV beside it, for the machine measured last; returns the PNG files.

    Where longtail was measured by several backends, each has pictures, named after it.
    """
    rows = [row for row in results.read(csv_path) if row["median_ms"]]
    paths = []
    for section in dict.fromkeys(row["section"] for row in rows):
        own = results.of_last_machine([row for row in rows if row["section"] == section])
        backends = list(dict.fromkeys(row["backend"] for row in own if row["backend"]))
        for backend in backends:
            name = f"{section}-{backend}" if len(backends) > 1 else section
            paths += _draw(section, [row for row in own if row["backend"] in ("", backend)], csv_path.with_name(name))
    return paths


def _draw(section: str, rows: list[dict[str, str]], stem: Path) -> list[Path]:
    """The pictures of the rows of one section, machine and backend."""
    paths = []
    if section in CURVES:
        curve = CURVES[section]
        paths.append(curves.draw(rows, stem.with_name(f"{stem.name}_{curve.what}.png"), curve))
    elif section in BARS:
        paths.append(bars.draw(rows, stem.with_name(f"{stem.name}_time.png"), BARS[section]))
    if shown := speed.rows_of(rows):
        paths.append(speed.draw(shown, stem.with_name(f"{stem.name}_speed.png")))
    return paths


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "--folder",
        type=Path,
        default=results.FOLDER,
        help="where the CSVs are and the pictures go (default: %(default)s)",
    )


def run(arguments: argparse.Namespace, parser: Parser) -> None:
    drawn = [picture for name in CSV_NAMES for picture in draw(arguments.folder / name)]
    if not drawn:
        parser.exit(1, f"{parser.prog}: no rows in {arguments.folder}\n")
    for picture in drawn:
        print(f"wrote {picture}")
