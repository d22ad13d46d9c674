"""What the package is to reach beside what a user would run otherwise, against the rows of one run; never asserted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from . import gpu
from .results import Row
from .suite import CPU, IMAGES, LARGE, MEMORY, OVERHEAD, SIGMOID, SMALL, Shape

NO_MEMORY = 0.02  # of the logits: room for one number per row, and for the allocator's own pages
LINEAR_MEMORY = 1 / 8  # of the logits


class Outcome(NamedTuple):
    """A goal and what was measured; over several problems, the worst of them."""

    what: str
    measured: float
    bound: str  # ">=" or "<="
    limit: float

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.bound == ">=" else self.measured <= self.limit


class Speed(NamedTuple):
    """How many times as fast as a rival a loss is to be, in the rival's gradient mode; one without has "backward"."""

    section: str
    loss: str
    rival: str
    least: float
    shape: Shape | None = None  # (N, C) of float32 logits; None: every problem of the section


def _of_images(shape: Shape) -> Shape:
    """(N, C) as the rows have it, where N counts pixels."""
    n, c, *pixels = shape
    return n * math.prod(pixels), c


FASTER = (
    Speed(CPU.section, "plain", "eager", 2, LARGE),
    Speed(CPU.section, "family", "eager", 15, LARGE),
    Speed(CPU.section, "family", "compiled", 6, LARGE),
    *(
        Speed(SIGMOID.section, loss, rival, least, SIGMOID.shapes[0])
        for loss in SIGMOID.losses
        for rival, least in (("eager", 8), ("compiled", 2.5))
    ),
    Speed(IMAGES.section, "focal", "eager", 6, _of_images(IMAGES.shapes[-1])),
    Speed(gpu.GPU.section, "plain", "liger", 1.2),
    Speed(gpu.GPU.section, "complement", "compiled", 4),
    Speed(gpu.GPU.section, "complement", "eager", 15),
)


def _worst(what: str, bound: str, limit: float, values: Iterable[float | None]) -> list[Outcome]:
    known = [value for value in values if value is not None]
    return [Outcome(what, (min if bound == ">=" else max)(known), bound, limit)] if known else []


def _problem(row: Row) -> tuple[str, str, Shape]:
    return row.section, row.dtype, (row.N, row.C)


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


def outcomes(rows: Sequence[Row]) -> list[Outcome]:
    """Every goal that the rows allow to be judged."""
    problems = {key: list(group) for key, group in itertools.groupby(sorted(rows, key=_problem), _problem)}
    found = []
    for goal in FASTER:
        name = "F.cross_entropy" if (goal.loss, goal.rival) == ("plain", "eager") else goal.rival
        values = (
            _times(group, goal.loss, goal.rival)
            for (section, dtype, shape), group in problems.items()
            if section == goal.section and (goal.shape is None or (dtype, shape) == ("float32", goal.shape))
        )
        found += _worst(f"{goal.section}, {goal.loss}: faster than {name}", ">=", goal.least, values)
    small = _times(problems.get((OVERHEAD.section, "float32", SMALL), ()), "plain", "eager")
    found += _worst("a call on (128, 10): time of F.cross_entropy", "<=", 4, [1 / small if small else None])
    at = [row for row in rows if row.contender == "longtail" and (row.N, row.C) == LARGE]
    at = [row for row in at if row.section in (CPU.section, MEMORY.section)]
    for where, limit in (("in place", NO_MEMORY), ("out of place", 1 + NO_MEMORY)):
        peaks = (_memory(row) for row in at if (row.gradient == "inplace") == (where == "in place"))
        found += _worst(f"{where}: peak extra memory, in logits", "<=", limit, peaks)
    return found


def linear_outcomes(peaks: Iterable[float | None]) -> list[Outcome]:
    """The goal of the fused linear loss in float32, whose ``peaks`` are in multiples of the logits."""
    return _worst("fused linear loss: peak extra memory, in logits", "<=", LINEAR_MEMORY, peaks)
