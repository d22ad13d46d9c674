"""Figures of many methods over seeds, each tested against one of them, the control."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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


def columns_of(
    by_seed: Sequence[Mapping[str, float]], control: Sequence[Mapping[str, float]] | None, tested: Sequence[str]
) -> Row:
    """Columns of one method: of each metric the mean and the standard deviation over the seeds, and the paired tests.

    Args:
        by_seed: its metrics in each seed.
        control: those of what it is tested against; None of the control itself, whose tests are empty.
        tested: metrics with a paired test, seed by seed. Corrected p and verdict come by :func:`add_verdicts`.
    """
    columns: Row = {}
    for metric in by_seed[0]:
        mean, std = mean_and_std([metrics[metric] for metrics in by_seed])
        columns |= {f"{metric}_mean": mean, f"{metric}_std": std}
    for metric in tested:
        values = [metrics[metric] for metrics in by_seed]
        found = None if control is None else paired_comparison(values, [metrics[metric] for metrics in control])
        columns |= {f"{metric}_{name}": getattr(found, name, None) for name in ("difference", "half_width", "p")}
        columns |= {f"{metric}_p_holm": None, f"{metric}_verdict": ""}
        columns[f"{metric}_by_seed"] = " ".join(f"{value:.4f}" for value in values if not math.isnan(value))
    return columns


def cells_of(row: Row, metric: str) -> list[str]:
    """Mean, difference, p and verdict of a tested metric, in percent, for a table; "-" where there is no such class."""
    mean, std, difference = (100 * number_of(row, f"{metric}_{name}") for name in ("mean", "std", "difference"))
    p, said = number_of(row, f"{metric}_p_holm"), str(row[f"{metric}_verdict"] or "")
    return [
        "-" if mean != mean else f"{mean:.1f}" if std != std else f"{mean:.1f} ± {std:.1f}",
        "" if difference != difference else f"{difference:+.1f}",
        "" if p != p else f"{p:.2g}",
        "-" if said == "no difference shown" else said,
    ]


def add_verdicts(rows: Sequence[Row], metrics: Sequence[str], control: str) -> None:
    """Holm's correction takes all comparisons of a metric, of all these rows, as one family."""
    others = [row for row in rows if row["method"] != control]
    for metric in metrics:
        for row, p in zip(others, holm([number_of(row, f"{metric}_p") for row in others]), strict=True):
            row[f"{metric}_p_holm"] = p
            row[f"{metric}_verdict"] = verdict(number_of(row, f"{metric}_difference"), p)
