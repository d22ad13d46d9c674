"""Figures of many methods over seeds, each tested against one of them, the control."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .output import Row, number_of
from .statistics import holm, mean_and_std, paired_comparison

LEVEL = 0.05
"""Of the tests, after the correction."""


def verdict(difference: float, p_holm: float) -> str:
    """What the test says of a method against the control; nothing without a test."""
    if math.isnan(p_holm):
        return ""
    if p_holm >= LEVEL:
        return "no difference shown"
    return "better" if difference > 0 else "worse"


def means_and_spreads(metric: str, values: Sequence[float]) -> Row:
    """Columns of a metric: its mean and its standard deviation over the seeds."""
    mean, std = mean_and_std(values)
    return {f"{metric}_mean": mean, f"{metric}_std": std}


def compared(metric: str, values: Sequence[float], control: Sequence[float] | None) -> Row:
    """Columns of a tested metric: the paired test, seed by seed; empty without a control. See :func:`add_verdicts`."""
    found = None if control is None else paired_comparison(values, control)
    columns: Row = {f"{metric}_{name}": getattr(found, name, None) for name in ("difference", "half_width", "p")}
    columns |= {f"{metric}_p_holm": None, f"{metric}_verdict": ""}
    columns[f"{metric}_by_seed"] = " ".join(f"{value:.4f}" for value in values if not math.isnan(value))
    return columns


def add_verdicts(rows: Sequence[Row], metrics: Sequence[str], control: str) -> None:
    """Holm's correction takes all comparisons of a metric, of all these rows, as one family."""
    others = [row for row in rows if row["method"] != control]
    for metric in metrics:
        for row, p in zip(others, holm([number_of(row, f"{metric}_p") for row in others]), strict=True):
            row[f"{metric}_p_holm"] = p
            row[f"{metric}_verdict"] = verdict(number_of(row, f"{metric}_difference"), p)
