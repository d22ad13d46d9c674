"""The picture for those who look at one: how much faster plain cross-entropy and the family are, on one problem."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import figures, palette, suite, words
from .bars import milliseconds, three_digits
from .palette import TextRow

PROBLEMS = {
    suite.CPU.section: ("float32", *suite.LARGE),
    "gpu": ("bfloat16", 8192, 32768),
}
"""Dtype, N and C by section."""

LOSSES = {
    "plain": "Plain: cross-entropy without options (eager: F.cross_entropy)",
    "family": "Family: cross-entropy with class weights, focal and complement terms",
}
NAMES = words.CONTENDERS | {
    "eager": "PyTorch, eager",
    "compiled": "PyTorch, torch.compile",
    "longtail backward": "longtail",
    "longtail forward": 'longtail, gradient="forward"',
    "longtail inplace": 'longtail, gradient="inplace"',
}


def rows_of(rows: Sequence[TextRow]) -> list[TextRow]:
    """Those of the section's problem, none where it was not measured."""
    wanted = tuple(map(str, PROBLEMS.get(rows[0]["section"], ())))
    losses = ("", *LOSSES)
    return [row for row in rows if (row["dtype"], row["N"], row["C"]) == wanted and row["loss"] in losses]


def draw(rows: Sequence[TextRow], path: Path) -> Path:
    """Draws the rows of :func:`rows_of`: a panel for each loss, on one axis."""
    own = {name: [row for row in rows if row["loss"] in ("", name)] for name in LOSSES}
    lines = [len(panel_rows) + 1 for panel_rows in own.values()]
    figure, axes = figures.panels(len(own), 1, 1.0 + 0.28 * sum(lines), sharex=True, height_ratios=lines)
    for axis, (name, panel_rows) in zip(axes[:, 0], own.items(), strict=True):
        _panel(axis, panel_rows)
        figures.title(axis, LOSSES[name], panel_rows)
    axes[-1, 0].set_xlabel("milliseconds, forward + backward: shorter is better", fontsize=10)
    first = rows[0]
    device = "on the CPU" if first["device"] == "cpu" else f"on {first['device']}"
    title = f"Time of a loss and its gradient: {words.shape(first)} logits, {first['dtype']}, {device}"
    return figures.save(figure, path, title, rows, words.contenders(rows))


def _panel(axis: Any, rows: Sequence[TextRow]) -> None:
    of_name = {palette.contender(row): row for row in rows}
    order = [*palette.in_order(row for row in rows if row["loss"]), "copy"]
    eager = milliseconds(of_name["eager"])
    for i, name in enumerate(order):
        time = milliseconds(of_name[name])
        drawn = axis.barh(-i, time, 0.8, color=palette.COLOURS[name])
        faster = "" if name in ("eager", "copy") else f", {_ratio(eager / time)} times as fast as eager"
        weight = "bold" if name.startswith("longtail") else "normal"
        axis.bar_label(drawn, [f"{three_digits(time)} ms{faster}"], padding=4, fontsize=10, fontweight=weight)
    axis.set_yticks([-i for i in range(len(order))], [NAMES[name] for name in order], fontsize=10)
    axis.tick_params(axis="y", length=0)
    axis.margins(x=0.12)


def _ratio(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"
