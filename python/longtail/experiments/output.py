"""What every experiment prints and writes: a progress bar, CSV rows with their provenance, notes, a picture."""

from __future__ import annotations

import csv
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..provenance import provenance

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = {"matplotlib": "matplotlib", "rich": "rich", "scipy": "scipy", "sklearn": "scikit-learn"}
"""Modules of the extra ``experiments``, and what they are installed as."""

Value: TypeAlias = "str | int | float | None"
Row: TypeAlias = "dict[str, Value]"
Advance: TypeAlias = "Callable[[str], None]"
"""Told after each unit of work what was done."""


def missing_packages() -> list[str]:
    """The packages of the extra ``experiments`` that are not installed."""
    return [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]


@contextmanager
def progress_bar(total: int) -> Iterator[Advance]:
    """A progress bar on stderr, moved on by one unit of ``total`` at every call of what it yields."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    # No refreshing thread of its own: it would run while steps are timed.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("starting", total=total)
        yield lambda status: progress.update(task, advance=1, description=status, refresh=True)


def with_provenance(row: Mapping[str, Value], **changes: Value) -> Row:
    """A row with versions, processor, commit and date after it; ``changes`` replaces some of those."""
    return {**row, **provenance(), **changes}


def text_of(value: Value) -> str:
    """As in the CSV: six digits that count; nothing for None and NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return "" if value is None else str(value)


def write_csv(path: Path, rows: Sequence[Mapping[str, Value]]) -> None:
    """Writes the rows; their columns are those of the first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: text_of(value) for name, value in row.items()} for row in rows)


def print_table(title: str, headings: Sequence[str], lines: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> None:
    """A table, its first column left-aligned, and notes under it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 150
    table: Table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1) if console.width >= 100 else 0)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def plotting() -> Any:
    """``matplotlib.pyplot`` that draws into files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def origin(row: Mapping[str, Value]) -> str:
    """One line under a picture: where the figures come from."""
    return (
        f"longtail {row['longtail']} ({row['commit']}), torch {row['torch']}, python {row['python']}, {row['cpu']}, "
        f"{str(row['date'])[:10]}"
    )
