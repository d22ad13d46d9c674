"""Lines of dots: how a time goes with the classes, the elements or the threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.ticker import LogLocator

from . import figures, palette, words
from .bars import milliseconds
from .palette import TextRow


class Curve(NamedTuple):
    """What a section's picture shows: a panel for each ``panel`` of its rows, there a line for each contender.

    The copy, which is of no loss, is in the panels of every loss.
    """

    title: str
    x: Callable[[TextRow], int]
    x_label: str
    y: Callable[[TextRow, Sequence[TextRow]], float]  # of a row and all of its line
    y_label: str
    panel: Callable[[TextRow], str]  # its name, without the loss
    columns: int
    log_x: bool = False
    log_y: bool = False
    what: str = "time"


def elements(row: TextRow) -> int:
    return int(row["N"]) * int(row["C"])


def classes(row: TextRow) -> int:
    return int(row["C"])


def threads(row: TextRow) -> int:
    return int(row["threads"])


def nanoseconds(row: TextRow, _line: Sequence[TextRow]) -> float:
    """Of an element."""
    return 1e6 * milliseconds(row) / elements(row)


def speed_up(row: TextRow, line: Sequence[TextRow]) -> float:
    """Over the fewest threads of a line, to which so much speed-up counts as they are."""
    first = min(line, key=threads)
    return threads(first) * milliseconds(first) / milliseconds(row)


def draw(rows: Sequence[TextRow], path: Path, curve: Curve) -> Path:
    """Draws the rows of one section of one machine."""
    losses = list(dict.fromkeys(row["loss"] for row in rows if row["loss"]))
    panels: dict[str, list[TextRow]] = {}
    for loss in losses:
        for row in (row for row in sorted(rows, key=classes) if row["loss"] in ("", loss)):
            panels.setdefault(f"{words.loss(loss)}, {curve.panel(row)}", []).append(row)
    columns = min(curve.columns, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = figures.panels(lines, columns, 2.0 * lines + 1.0, sharex=True, sharey=True)
    for axis, (name, own) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, own, curve)
        figures.title(axis, name, own)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes.flat[len(panels) - columns : len(panels)]:  # the lowest of each column
        axis.set_xlabel(curve.x_label, fontsize=9)
        axis.tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set_ylabel(curve.y_label, fontsize=9)
    if not curve.log_y:
        axes[0, 0].set_ylim(bottom=0)
    legend = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    terms = [*words.losses(rows), *words.contenders(rows)]
    return figures.save(figure, path, curve.title, rows, terms, legend)


def _panel(axis: Any, rows: Sequence[TextRow], curve: Curve) -> None:
    for name in palette.in_order(rows):
        line = [row for row in rows if palette.contender(row) == name]
        points = sorted((curve.x(row), curve.y(row, line)) for row in line)
        style = {"marker": "o", "markersize": 4, "color": palette.COLOURS[name], "label": words.CONTENDERS[name]}
        axis.plot(*zip(*points, strict=True), **style)
    values = sorted(set(map(curve.x, rows)))
    if curve.log_x:
        axis.set_xscale("log")
    if values[-1] < 1000:  # few enough to be named
        axis.set_xticks(values, map(str, values))
        axis.set_xticks([], minor=True)
    if curve.log_y:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    axis.grid(linewidth=0.4)
