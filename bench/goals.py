"""The project's goals, against the rows of one run: shown, never asserted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from . import gpu
from .contenders import GRADIENTS
from .results import Row
from .suite import CPU, IMAGES, LARGE, MEMORY, OVERHEAD, SIGMOID, SMALL, Shape

NO_MEMORY = 0.02  # of the logits: room for one number per row, and for the allocator's own pages


class Outcome(NamedTuple):
    """A goal and what was measured; over several problems, the worst of them."""

    what: str
    measured: float
    bound: str  # ">=" or "<="
    limit: float

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.bound == ">=" else self.measured <= self.limit


class Group:
    """The rows of one (N, C) and dtype of a section, found by loss, contender and gradient mode."""

    def __init__(self, rows: Iterable[Row], section: str, dtype: str, shape: Shape) -> None:
        wanted = (section, dtype, shape)
        self._rows = {(r.loss, r.contender, r.gradient): r for r in rows if (r.section, r.dtype, (r.N, r.C)) == wanted}

    def row(self, loss: str, contender: str, gradient: str = "") -> Row | None:
        return self._rows.get((loss, contender, gradient))

    def ours(self, loss: str, gradient: str = "backward") -> Row | None:
        return self.row(loss, "longtail", gradient)


def _times(over: Row | None, under: Row | None) -> float | None:
    """The first row's time in multiples of the second's."""
    if over is None or under is None or over.median_ms is None or under.median_ms is None:
        return None
    return over.median_ms / under.median_ms


def _memory(row: Row | None) -> float | None:
    """Peak extra memory in multiples of the logits."""
    if row is None or row.peak_extra_MB is None:
        return None
    itemsize = 4 if row.dtype == "float32" else 2
    return row.peak_extra_MB * 1e6 / (row.N * row.C * itemsize)


def _worst(what: str, bound: str, limit: float, values: Iterable[float | None]) -> list[Outcome]:
    known = [value for value in values if value is not None]
    return [Outcome(what, (min if bound == ">=" else max)(known), bound, limit)] if known else []


def _cpu(rows: Sequence[Row]) -> list[Outcome]:
    at, half = (Group(rows, CPU.section, dtype, LARGE) for dtype in ("float32", "bfloat16"))
    small = Group(rows, OVERHEAD.section, "float32", SMALL)
    copy, plain = at.row("", "copy"), at.row("plain", "eager")
    found = [
        *_worst("family: faster than eager", ">=", 15, [_times(at.row("family", "eager"), at.ours("family"))]),
        *_worst("family: faster than compiled", ">=", 6, [_times(at.row("family", "compiled"), at.ours("family"))]),
        *_worst("plain: faster than F.cross_entropy", ">=", 2, [_times(plain, at.ours("plain"))]),
        *_worst("plain, in place: time of a copy", "<=", 2.5, [_times(at.ours("plain", "inplace"), copy)]),
    ]
    for gradient in ("forward", "inplace"):
        slower = _times(at.ours("everything", gradient), at.ours("plain", gradient))
        found += _worst(f"everything, {gradient}: time of plain", "<=", 1.5, [slower])
    for gradient in GRADIENTS:
        faster = _times(at.ours("plain", gradient), half.ours("plain", gradient))
        found += _worst(f"plain, {gradient}: bfloat16 over float32 speed", ">=", 1, [faster])
    for gradient in GRADIENTS:
        calls = _times(small.ours("plain", gradient), small.row("plain", "eager"))
        found += _worst(f"(128, 10), {gradient}: time of F.cross_entropy", "<=", 4, [calls])
    return found


def _sigmoid(rows: Sequence[Row]) -> list[Outcome]:
    at = Group(rows, SIGMOID.section, "float32", SIGMOID.shapes[0])
    found = []
    for loss in SIGMOID.losses:
        for contender, limit in (("eager", 8), ("compiled", 2.5)):
            faster = _times(at.row(loss, contender), at.ours(loss))
            found += _worst(f"{loss}: faster than {contender}", ">=", limit, [faster])
    n, c, *pixels = IMAGES.shapes[-1]
    large = Group(rows, IMAGES.section, "float32", (n * math.prod(pixels), c))
    faster = _times(large.row("focal", "eager"), large.ours("focal"))
    return found + _worst("focal over images, C = 1203: faster than eager", ">=", 6, [faster])


def _peaks(rows: Sequence[Row]) -> list[Outcome]:
    found = []
    for dtype in ("float32", "bfloat16"):
        for gradient in GRADIENTS:
            sections = (Group(rows, section, dtype, LARGE) for section in (CPU.section, MEMORY.section))
            peaks = [_memory(at.ours(loss, gradient)) for at in sections for loss in CPU.losses]
            limit = NO_MEMORY if gradient == "inplace" else 1 + NO_MEMORY
            found += _worst(f"{dtype}, {gradient}: peak extra memory, in logits", "<=", limit, peaks)
    return found


def _gpu(rows: Sequence[Row]) -> list[Outcome]:
    shapes = sorted({(row.dtype, (row.N, row.C)) for row in rows if row.section == gpu.GPU.section})
    at = [Group(rows, gpu.GPU.section, dtype, shape) for dtype, shape in shapes]

    def worst(what: str, bound: str, limit: float, value: Callable[[Group], float | None]) -> list[Outcome]:
        return _worst(what, bound, limit, map(value, at))

    large = [p.ours("plain") for p, (_, (_, classes)) in zip(at, shapes, strict=True) if classes >= 4096]
    shares = [None if row is None else row.share_of_copy for row in large]
    others = [
        row for row in rows if row.section in (gpu.SIGMOID.section, gpu.IMAGES.section) and row.contender == "longtail"
    ]
    return [
        *_worst("sigmoid and images: share of the copy's bandwidth", ">=", 0.85, [r.share_of_copy for r in others]),
        *worst("family: time of plain", "<=", 1.05, lambda p: _times(p.ours("family"), p.ours("plain"))),
        *_worst("plain, C >= 4096: share of the copy's bandwidth", ">=", 0.85, shares),
        *worst(
            "plain: faster than Liger", ">=", 1.2, lambda p: _times(p.row("plain", "liger", "inplace"), p.ours("plain"))
        ),
        *worst(
            "complement: faster than compiled",
            ">=",
            4,
            lambda p: _times(p.row("complement", "compiled"), p.ours("complement")),
        ),
        *worst(
            "complement: faster than eager",
            ">=",
            15,
            lambda p: _times(p.row("complement", "eager"), p.ours("complement")),
        ),
    ]


def outcomes(rows: Sequence[Row]) -> list[Outcome]:
    """Every goal that the rows allow to be judged."""
    return [*_cpu(rows), *_sigmoid(rows), *_peaks(rows), *_gpu(rows)]
