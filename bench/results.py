"""Rows of the CSV: what was measured, on what, with what."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch

from longtail.experiments.output import text_of
from longtail.experiments.provenance import provenance
from longtail.files import check_writable, write_table

from .contenders import Problem
from .measure import Timing

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One contender on one problem. Times are medians over ``rounds`` of forward + backward; MB and GB are decimal."""

    section: str
    device: str
    dtype: str
    N: int  # rows; of images, their pixels
    C: int
    loss: str
    contender: str
    gradient: str
    backend: str  # of longtail
    rounds: int
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    forward_ms: float | None
    backward_ms: float | None
    passes: int | None  # over the logits
    bytes: int | None  # passes * N * C * itemsize
    GB_per_s: float | None
    share_of_copy: float | None  # of the bandwidth of out.copy_(logits), 2 passes, in the same run
    copy_ms: float | None
    speedup_over_eager: float | None  # of the same loss
    speedup_over_cross_entropy: float | None  # F.cross_entropy alone, eager
    peak_extra_MB: float | None
    layout: str  # of the logits, and of both sides of their copy
    threads: int


def columns_of(row: Any) -> list[str]:
    """The columns of a CSV of such rows, instances or their dataclass: their own, and where they come from."""
    own = [column.name for column in fields(row)]
    return [*own, *(name for name in provenance() if name not in own)]


# What a later row has to share with an earlier one to replace it; of rows of another kind, what they have of it.
KEY = (
    *("section", "device", "cpu", "threads", "isa", "dtype", "N", "D", "C", "layout"),
    *("loss", "contender", "gradient", "backend"),
)


def quantiles(seconds: Sequence[float]) -> list[float | None]:
    """20 %, median, 80 % in ms."""
    if not seconds:
        return [None] * 3
    values = torch.tensor(seconds, dtype=torch.float64)
    points: list[float | None] = (1e3 * values.quantile(values.new_tensor([0.2, 0.5, 0.8]))).tolist()
    return points


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def rows_of(section: str, problem: Problem, timings: Iterable[Timing]) -> list[Row]:
    """The rows of one problem; ratios are between medians of this run."""
    timings = list(timings)
    logits = problem.logits
    totals = [quantiles(t.total) for t in timings]
    medians = {(t.contender.loss, t.contender.name): middle for t, (_, middle, _) in zip(timings, totals, strict=True)}
    copy_ms = medians.get(("", "copy"))
    rows = []
    for timing, (p20, median, p80) in zip(timings, totals, strict=True):
        contender = timing.contender
        traffic = None if contender.passes is None else contender.passes * logits.nbytes
        rate = ratio(traffic, median)
        backward = [total - forward for total, forward in zip(timing.total, timing.forward, strict=True)]
        rows.append(
            Row(
                section=section,
                device=torch.cuda.get_device_name() if logits.is_cuda else "cpu",
                dtype=str(logits.dtype).removeprefix("torch."),
                N=problem.target.numel(),
                C=logits.shape[1],
                loss=contender.loss,
                contender=contender.name,
                gradient=contender.gradient,
                backend=contender.backend,
                rounds=len(timing.total),
                median_ms=median,
                p20_ms=p20,
                p80_ms=p80,
                forward_ms=quantiles(timing.forward)[1] if contender.loss else None,
                backward_ms=quantiles(backward)[1] if contender.loss else None,
                passes=contender.passes,
                bytes=traffic,
                GB_per_s=None if rate is None else rate / 1e6,
                share_of_copy=ratio(rate, ratio(2 * logits.nbytes, copy_ms)),
                copy_ms=copy_ms,
                speedup_over_eager=ratio(medians.get((contender.loss, "eager")), median),
                speedup_over_cross_entropy=ratio(medians.get(("plain", "eager")), median) if contender.loss else None,
                peak_extra_MB=None if timing.peak is None else timing.peak / 1e6,
                layout=problem.layout,
                threads=torch.get_num_threads(),
            )
        )
    return rows


def csv_file(text: str) -> Path:
    """Where rows are to be written, looked at before they are measured."""
    path = Path(text)
    if path.suffix != ".csv":
        raise argparse.ArgumentTypeError(f"{text!r} is not a .csv file")
    try:
        if path.parent.exists():  # else it is made
            check_writable(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV as text, by column; none if there is no such file. A :class:`Row` always has its layout."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # There was no such column while all logits were contiguous.
    return [{"layout": "contiguous"} | row if "share_of_copy" in row else row for row in rows]


def row_of(text: dict[str, str]) -> Row:
    """A row of :func:`read`, with its numbers."""
    numbers = {int: int, int | None: int, float | None: float}
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(Row).items():
        values[name] = text[name] if kind is str else numbers[kind](text[name]) if text[name] else None
    return Row(**values)


def problem_of(row: Row) -> tuple[Any, ...]:
    """What rows of one problem share."""
    return row.section, row.dtype, row.N, row.C, row.layout, row.threads


def of_last_machine(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Those of the machine, with its instruction set and threads, that was measured last; of a scaling any threads."""

    def machine(row: dict[str, str]) -> tuple[str, ...]:
        names = ("device", "cpu", "isa", *(() if row["section"] == "threads" else ("threads",)))
        return tuple(row[name] for name in names)

    last = machine(max(rows, key=lambda row: row["date"]))
    return [row for row in rows if machine(row) == last]


def write(path: Path, rows: Sequence[Any], key_columns: Sequence[str] = KEY) -> None:
    """Adds rows, of one dataclass, to a CSV, with their provenance; they replace old ones of equal ``key_columns``."""
    columns = columns_of(rows[0])

    def key(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in key_columns if name in columns)

    merged = {key(row): row for row in read(path)}
    for row in rows:
        text = {name: text_of(value, 5) for name, value in (provenance() | vars(row)).items()}
        merged[key(text)] = text
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, columns, merged.values())
