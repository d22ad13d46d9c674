"""Times side by side: bars on a linear axis, dots on a logarithmic one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import figures, palette, words
from .palette import TextRow

LINE_INCHES = 0.185
PANEL_INCHES = 0.75
"""Of a panel's title and axis."""

MOST_COLUMNS = 3


class Bars(NamedTuple):
    """What a section's picture shows: a panel for each problem, there a bar or dot for each contender, by group."""

    title: str
    quantity: str
    value: Callable[[TextRow], float]
    group: Callable[[TextRow], str]
    log: bool = False


class Line(NamedTuple):
    """A line of a panel: the heading of a group, or a contender."""

    group: str
    name: str  # empty: a heading


def milliseconds(row: TextRow) -> float:
    return float(row["median_ms"])


def three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def lines_of(rows: Iterable[TextRow], bars: Bars) -> list[Line]:
    """Group after group, headed by its name if it has one."""
    groups: dict[str, dict[str, None]] = {}
    for row in rows:
        groups.setdefault(bars.group(row), {})[words.name(row)] = None
    return [Line(group, name) for group, names in groups.items() for name in (*([""] if group else []), *names)]


def draw(rows: Sequence[TextRow], path: Path, bars: Bars) -> Path:
    """Draws the rows of one section of one machine."""
    problems: dict[str, list[TextRow]] = {}
    for row in sorted(rows, key=lambda row: row["dtype"], reverse=True):  # float32 above bfloat16
        problems.setdefault(words.problem(row), []).append(row)
    shapes = len({words.shape(row) for row in rows})
    side_by_side = len(problems) if shapes == 1 else shapes
    columns = next(n for n in range(MOST_COLUMNS, 0, -1) if side_by_side % n == 0)
    lines = lines_of(rows, bars)
    height = len(problems) // columns * (PANEL_INCHES + LINE_INCHES * len(lines)) + 0.4
    figure, axes = figures.panels(len(problems) // columns, columns, height, sharex=True, sharey=True)
    for axis, (problem, own) in zip(axes.flat, problems.items(), strict=True):
        panel(axis, own, bars, lines)
        figures.title(axis, problem, own)
    for axis in axes[-1]:
        axis.set_xlabel(bars.quantity, fontsize=9)
    return figures.save(figure, path, bars.title, rows, [*words.losses(rows), *words.contenders(rows)])


def panel(axis: Any, rows: Sequence[TextRow], bars: Bars, lines: Sequence[Line]) -> None:
    height = {line: -i for i, line in enumerate(lines)}
    for row in rows:
        y, value = height[Line(bars.group(row), words.name(row))], bars.value(row)
        if bars.log:
            axis.plot(value, y, "o", color=palette.colour(row), markersize=6)
        else:
            axis.barh(y, value, 0.8, color=palette.colour(row))
        axis.annotate(three_digits(value), (value, y), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
    axis.set_yticks([*height.values()], [line.name or words.loss(line.group) for line in lines])
    for text, line in zip(axis.get_yticklabels(), lines, strict=False):  # none beside the inner panels
        text.set_fontweight("normal" if line.name else "bold")
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(-len(lines) + 0.4, 0.6)
    if bars.log:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        named = [y for line, y in height.items() if line.name]
        axis.hlines(named, 0, 1, transform=axis.get_yaxis_transform(), color="#dddddd", linewidth=0.6, zorder=0)
    axis.margins(x=0.2)
