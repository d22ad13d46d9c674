"""Pictures drawn from the CSV: time per contender, and share of the copy's bandwidth; lines where a size grows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from . import curves, results
from .report import label

TextRow = dict[str, str]


TIMES_ALONE = ("overhead", "pages")
"""Sections whose share of the copy's bandwidth says nothing."""


def draw(csv_path: Path) -> list[Path]:
    """Draws each section of a CSV beside it, for the machine measured last; returns the PNG files."""
    rows = [row for row in results.read(csv_path) if row["median_ms"]]
    paths = []
    for section in dict.fromkeys(row["section"] for row in rows):
        own = results.of_last_machine([row for row in rows if row["section"] == section])
        path = csv_path.with_name(f"{section}_time.png")
        if section in curves.CURVES:
            paths.append(curves.draw(own, path, caption(own)))
            continue
        paths.append(_grid(own, path, "ms, forward + backward", _time, log=True))
        counted = [row for row in own if row["passes"] and row["contender"] != "copy"]
        if section not in TIMES_ALONE:
            name = csv_path.with_name(f"{section}_share_of_copy.png")
            paths.append(_grid(counted, name, "share of the copy's bandwidth", _share, log=False))
    return paths


def _time(row: TextRow) -> float:
    return float(row["median_ms"])


def _share(row: TextRow) -> float:
    return float(row["share_of_copy"])


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def _bar(row: TextRow) -> tuple[str, str]:
    return row["loss"], label(row["loss"], row["contender"], row["gradient"])


def _grid(rows: Sequence[TextRow], path: Path, quantity: str, value: Callable[[TextRow], float], *, log: bool) -> Path:
    """One panel per dtype and shape; a bar per contender, coloured by contender, grouped by loss."""
    shapes = list(dict.fromkeys((row["N"], row["C"]) for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    bars = sorted(dict.fromkeys(map(_bar, rows)), key=lambda bar: [*dict.fromkeys(map(_loss, rows))].index(bar[0]))
    size = (4 + 3.5 * len(shapes), 1.2 + len(dtypes) * (0.8 + 0.22 * len(bars)))
    figure, axes = plt.subplots(
        *(len(dtypes), len(shapes)), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for i, dtype in enumerate(dtypes):
        for j, shape in enumerate(shapes):
            panel = [row for row in rows if row["dtype"] == dtype and (row["N"], row["C"]) == shape]
            _panel(axes[i][j], panel, bars, value, log)
            axes[i][j].set_title(f"{shape[0]} x {shape[1]}, {dtype}")
    for axis in axes[-1]:
        axis.set_xlabel(quantity)
    figure.suptitle(caption(rows), fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def caption(rows: Sequence[TextRow]) -> str:
    """The machine of the rows, which is one, and what they were measured with and when, which need not be."""
    device, cpu, isa = (rows[0][name] for name in ("device", "cpu", "isa"))
    threads = " to ".join(map(str, sorted({int(row["threads"]) for row in rows})))
    sources = Counter(
        f"torch {row['torch']}, longtail {row['longtail']}, commit {row['commit']}, {row['date'][:10]}" for row in rows
    )
    lines = [
        f"{source}: {count} of {len(rows)} rows" if len(sources) > 1 else source
        for source, count in sources.most_common()
    ]
    return "\n".join((f"{device} ({cpu}, {threads} threads, {isa})", *lines))


def _loss(row: TextRow) -> str:
    return row["loss"]


def _panel(
    axis: Any, rows: Sequence[TextRow], bars: Sequence[tuple[str, str]], value: Callable[[TextRow], float], log: bool
) -> None:
    losses = list(dict.fromkeys(loss for loss, _ in bars))
    names = list(dict.fromkeys(name for _, name in bars))
    height = {bar: -i - losses.index(bar[0]) * 0.6 for i, bar in enumerate(bars)}  # a gap between losses
    colours = plt.get_cmap("tab10")
    for row in rows:
        bar = _bar(row)
        drawn = axis.barh(height[bar], value(row), 0.85, color=colours(names.index(bar[1]) % 10))
        axis.bar_label(drawn, fmt=_three_digits, fontsize=7, padding=2)
    axis.set_yticks([*height.values()], [f"{loss}: {name}" if loss else name for loss, name in bars], fontsize=7)
    axis.margins(x=0.15)
    if log:
        axis.set_xscale("log")
    else:
        axis.axvline(1.0, color="grey", linewidth=0.8)
