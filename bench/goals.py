"""What the package is to reach beside what a user would run otherwise, against measured rows; never asserted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from . import results
from .aims import CALLS, COSTS, EAGER, FASTER, LINEAR, LINEAR_MEMORY, NO_MEMORY
from .results import Row, problem_of
from .suite import CPU, FEW_IMAGES, FEW_ROWS, LARGE, MEMORY, MULTI_LABEL, OVERHEAD, SMALL, THREADS


class Outcome(NamedTuple):
    """A goal and what was measured; over several problems, the worst of them."""

    what: str
    measured: float
    bound: str  # ">=" or "<="
    limit: float

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.bound == ">=" else self.measured <= self.limit


def _worst(what: str, bound: str, limit: float, values: Iterable[float | None]) -> list[Outcome]:
    known = [value for value in values if value is not None]
    return [Outcome(what, (min if bound == ">=" else max)(known), bound, limit)] if known else []


def _times(rows: Iterable[Row], loss: str, rival: str) -> float | None:
    """How many times as fast as a rival we are, of one problem's rows, in place where the rival is."""
    found = {(row.contender, row.gradient): row.median_ms for row in rows if row.loss == loss}
    mode, theirs = next(((mode, time) for (name, mode), time in found.items() if name == rival), ("", None))
    ours = found.get(("longtail", mode or "backward"))
    return None if theirs is None or ours is None else theirs / ours


def _memory(row: Row) -> float | None:
    """Peak extra memory in multiples of the logits."""
    if row.peak_extra_MB is None:
        return None
    itemsize = 4 if row.dtype == "float32" else 2
    return row.peak_extra_MB * 1e6 / (row.N * row.C * itemsize)


Problems = Sequence[Sequence[Row]]


def _find(rows: Iterable[Row], loss: str, contender: str, gradient: str, of: str = "median_ms") -> float | None:
    key = (loss, contender, gradient)
    return next((vars(row)[of] for row in rows if (row.loss, row.contender, row.gradient) == key), None)


def _speeds(problems: Problems) -> Iterator[Outcome]:
    for goal in FASTER:
        name = "F.cross_entropy" if (goal.loss, goal.rival) == ("plain", "eager") else goal.rival
        own = [rows for rows in problems if rows[0].section == goal.section]
        if goal.shape is not None:
            own = [rows for rows in own if (rows[0].dtype, rows[0].N, rows[0].C) == ("float32", *goal.shape)]
        values = (_times(rows, goal.loss, goal.rival) for rows in own)
        yield from _worst(f"{goal.section}, {goal.loss}: faster than {name}", ">=", goal.least, values)
    for plan in (FEW_ROWS, FEW_IMAGES):
        ours = [row for rows in problems for row in rows if (row.section, row.contender) == (plan.section, "longtail")]
        what = f"{plan.section}: faster than F.cross_entropy"
        yield from _worst(what, ">=", 1, (row.speedup_over_cross_entropy for row in ours))


def _costs(problems: Problems) -> Iterator[Outcome]:
    for goal in COSTS:
        where = (goal.section, goal.dtype, *goal.shape)
        values = []
        for rows in problems:
            if (rows[0].section, rows[0].dtype, rows[0].N, rows[0].C) == where:
                theirs = _find(rows, *goal.rival, goal.rival_gradient if goal.rival[1].startswith("longtail") else "")
                for loss in goal.losses:
                    values.append(results.ratio(_find(rows, loss, goal.ours, goal.gradient, goal.of), theirs))
        yield from _worst(f"{goal.section}, {goal.what}", "<=", goal.most, values)


def _half(problems: Problems) -> Iterator[Outcome]:
    times: dict[tuple[str, str], float | None] = {}
    for rows in problems:
        if (rows[0].section, rows[0].N, rows[0].C) == (CPU.section, *LARGE):
            for loss in ("plain", "family"):
                times[rows[0].dtype, loss] = _find(rows, loss, "longtail", "backward")
    pairs = [(times.get(("bfloat16", loss)), times.get(("float32", loss))) for loss in ("plain", "family")]
    values = itertools.starmap(results.ratio, pairs)
    yield from _worst(f"{CPU.section}, default mode: time of bfloat16 in that of float32", "<=", 0.85, values)


def _calls(problems: Problems) -> Iterator[Outcome]:
    for rows in problems:
        if (rows[0].section, rows[0].dtype, rows[0].N, rows[0].C) == (OVERHEAD.section, "float32", *SMALL):
            for loss, rival in CALLS.items():
                for kind, module in (("function", ""), ("module", " module")):
                    ours, theirs = (
                        _find(rows, *key)
                        for key in ((loss, f"longtail{module}", "backward"), (rival, f"eager{module}", ""))
                    )
                    what = f"a call on (128, 10), {loss}, {kind}: time of torch's {EAGER[rival]}"
                    yield from _worst(what, "<=", 1.7, [results.ratio(ours, theirs)])


def _scaling(problems: Problems) -> Iterator[Outcome]:
    """Time in that of an equal share of one thread's, or where that is longer, of as many passes of the copy."""
    own = [row for rows in problems for row in rows if row.section == THREADS.section]
    alone = {(row.N, row.C, row.contender, row.gradient): row.median_ms for row in own if row.threads == 1}
    values: list[float | None] = []
    for row in own:
        one = alone.get((row.N, row.C, row.contender, row.gradient))
        if row.contender == "longtail" and row.threads > 1 and one and row.passes and row.copy_ms:
            values.append(results.ratio(row.median_ms, max(one / row.threads, row.passes / 2 * row.copy_ms)))
    yield from _worst(
        f"{THREADS.section}: time in that of linear scaling, or of the copy's bandwidth", "<=", 1.1, values
    )


def _growth(problems: Problems) -> Iterator[Outcome]:
    """Time for an element over the least of the same classes, in place, past what calls and caches make of it."""
    costs: dict[tuple[int, str], list[float]] = {}
    for row in (row for rows in problems for row in rows):
        if (row.section, row.gradient) == ("growth", "inplace") and row.N * row.C >= 2**25 and row.median_ms:
            costs.setdefault((row.C, row.dtype), []).append(row.median_ms / (row.N * row.C))
    values = (max(found) / min(found) for found in costs.values())
    yield from _worst("growth, in place, from 2^25 elements on: most over least time for an element", "<=", 1.5, values)


def _memories(rows: Sequence[Row]) -> list[Outcome]:
    found = []
    for name, sections, shape in (
        ("", (CPU.section, MEMORY.section), LARGE),
        (f"{MULTI_LABEL.section}, ", (MULTI_LABEL.section,), MULTI_LABEL.shapes[0]),
    ):
        at = [row for row in rows if row.section in sections and shape == (row.N, row.C)]
        at = [row for row in at if row.contender == "longtail"]
        for where, limit in (("in place", NO_MEMORY), ("out of place", 1 + NO_MEMORY)):
            peaks = (_memory(row) for row in at if (row.gradient == "inplace") == (where == "in place"))
            found += _worst(f"{name}{where}: peak extra memory, in logits", "<=", limit, peaks)
    return found


def outcomes(rows: Sequence[Row]) -> list[Outcome]:
    """Every goal that the rows allow to be judged."""
    problems = [list(group) for _, group in itertools.groupby(sorted(rows, key=problem_of), problem_of)]
    judges = (_speeds, _costs, _half, _calls, _scaling, _growth)
    found = [outcome for judge in judges for outcome in judge(problems)]
    return found + _memories(rows)


def linear_outcomes(peaks: Iterable[float | None]) -> list[Outcome]:
    """The goal of the fused linear loss's memory, whose ``peaks`` are in multiples of the logits."""
    return _worst("fused linear loss: peak extra memory, in logits", "<=", LINEAR_MEMORY, peaks)


def linear_time_outcomes(rows: Iterable[dict[str, str]]) -> list[Outcome]:
    """The goals of the fused linear loss's times, from rows of the CSV."""
    values: dict[tuple[str, str], list[float | None]] = {}
    for row in rows:
        if row["contender"].startswith("longtail") and row["time_of_gemms"]:
            kind = next((word for word in ("statistics", "none") if word in row["contender"]), "mean")
            values.setdefault((kind, row["dtype"]), []).append(float(row["time_of_gemms"]))
    found = []
    for (kind, dtype), limit in LINEAR.items():
        what = f"fused linear loss, {kind}, {dtype}: time of three GEMMs"
        found += _worst(what, "<=", limit, values.get((kind, dtype), ()))
    return found
