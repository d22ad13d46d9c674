"""Lines drawn from the CSV: how a time goes with the classes, the elements or the threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .report import label

TextRow = dict[str, str]


class Curve(NamedTuple):
    """What a section's picture shows: a panel for each ``panel`` of its rows, there a line for each ``line``."""

    x: Callable[[TextRow], int]
    x_label: str
    y: Callable[[TextRow], float]
    y_label: str
    panel: Callable[[TextRow], str]
    line: Callable[[TextRow], str]


def _milliseconds(row: TextRow) -> float:
    return float(row["median_ms"])


def _elements(row: TextRow) -> int:
    return int(row["N"]) * int(row["C"])


def _classes(row: TextRow) -> int:
    return int(row["C"])


def _nanoseconds(row: TextRow) -> float:
    return 1e6 * _milliseconds(row) / _elements(row)


def _contender(row: TextRow) -> str:
    return label(row["loss"], row["contender"], row["gradient"])


def _named(row: TextRow) -> str:
    return f"{row['loss']}: {_contender(row)}" if row["loss"] else _contender(row)


PER_ELEMENT = "ns per element, forward + backward"
FEW = Curve(
    *(_classes, "classes", _nanoseconds, PER_ELEMENT),
    panel=lambda row: f"{row['dtype']}, {row['layout']}",
    line=_named,
)
CURVES = {
    "few-rows": FEW,
    "few-images": FEW,
    "growth": Curve(
        *(_elements, "elements, N x C", _nanoseconds, PER_ELEMENT),
        panel=lambda row: f"{_named(row)}, {row['dtype']}",
        line=lambda row: f"C = {row['C']}",
    ),
    "threads": Curve(
        *(lambda row: int(row["threads"]), "threads", _milliseconds, "ms, forward + backward"),
        panel=lambda row: f"{row['N']} x {row['C']}, {row['dtype']}",
        line=_named,
    ),
}
"""By section."""


def draw(rows: Sequence[TextRow], path: Path, caption: str) -> Path:
    """Draws the rows of one section of one machine."""
    curve = CURVES[rows[0]["section"]]
    panels = list(dict.fromkeys(map(curve.panel, rows)))
    lines = list(dict.fromkeys(map(curve.line, sorted(rows, key=_classes))))
    size = (4.8 * len(panels) + 2.5, 5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        own = [row for row in rows if curve.panel(row) == panel]
        _panel(axis, own, curve, lines)
        axis.set_title(panel)
        axis.set_xlabel(curve.x_label)
    axes[0][0].set_ylabel(curve.y_label)
    handles = {text: line for axis in axes[0] for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(caption, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panel(axis: Any, rows: Sequence[TextRow], curve: Curve, lines: Sequence[str]) -> None:
    colours = plt.get_cmap("tab20")
    for i, line in enumerate(lines):
        points = sorted((curve.x(row), curve.y(row)) for row in rows if curve.line(row) == line)
        if points:
            axis.plot(*zip(*points, strict=True), marker=".", color=colours(i % 20), label=line)
    axis.set_xscale("log")
    axis.set_yscale("log")
    values = sorted(set(map(curve.x, rows)))
    if values[-1] < 1000:  # few enough to be named
        axis.set_xticks(values, map(str, values), fontsize=8)
        axis.set_xticks([], minor=True)
    axis.grid(which="both", linewidth=0.3)
