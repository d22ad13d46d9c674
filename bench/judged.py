"""The section ``goals``: rows of the machine that each section was measured on last, whichever runs they are from."""

from __future__ import annotations

import argparse
from pathlib import Path

from longtail.experiments.command_line import Parser

from . import goals, linear, report, results


def of_losses(folder: Path) -> list[results.Row]:
    """Rows of logits and images, of every section."""
    rows = [row for name in ("cpu", "growth", "gpu") for row in results.read(folder / f"{name}.csv")]
    sections = dict.fromkeys(row["section"] for row in rows)
    last = [results.of_last_machine([row for row in rows if row["section"] == section]) for section in sections]
    return [results.row_of(row) for own in last for row in own]


def of_linear(folder: Path) -> list[dict[str, str]]:
    """Rows of the fused linear loss on the CPU, of the shape that its goals are set for."""
    shape = tuple(map(str, linear.SHAPE))
    rows = [row for row in results.read(folder / "linear.csv") if row["device"] == "cpu"]
    rows = [row for row in rows if (row["N"], row["D"], row["C"]) == shape]
    return results.of_last_machine(rows) if rows else []


def add_options(parser: Parser) -> None:
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="where the CSVs are (default: %(default)s)")


def run(arguments: argparse.Namespace, parser: Parser) -> None:
    fused = of_linear(arguments.folder)
    ours = [row for row in fused if row["contender"].startswith("longtail")]
    peaks = (float(row["peak_of_logits"]) if row["peak_of_logits"] else None for row in ours)
    found = [
        *goals.outcomes(of_losses(arguments.folder)),
        *goals.linear_time_outcomes(fused),
        *goals.linear_outcomes(peaks),
    ]
    if not found:
        parser.exit(1, f"{parser.prog}: no rows in {arguments.folder}\n")
    report.print_goals(found)
