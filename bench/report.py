"""Progress while it runs, and the tables at the end."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence

from longtail.experiments.output import print_notes, print_table, progress

from . import suite
from .goals import Outcome, outcomes
from .results import Row, problem_of

REFRESH_SECONDS = 0.5
NAMES = {
    ("plain", "eager"): "F.cross_entropy",
    ("plain", "compiled"): "F.cross_entropy, compiled",
    ("plain", "eager module"): "nn.CrossEntropyLoss",
    ("soft", "eager"): "F.cross_entropy",
    ("soft", "compiled"): "F.cross_entropy, compiled",
    ("dense_sigmoid", "eager"): "F.binary_cross_entropy_with_logits",
    ("dense_sigmoid", "eager module"): "nn.BCEWithLogitsLoss",
}
"""Contenders that are one function or module of torch."""


def label(loss: str, contender: str, gradient: str) -> str:
    """A contender's name for people."""
    name = NAMES.get((loss, contender), contender)
    return f"{name}, {gradient}" if gradient else name


def rows_with_progress(plan: suite.Plan) -> Iterator[list[Row]]:
    """``suite.run`` under a progress bar on stderr."""
    problems = plan.problems()
    with progress(len(problems)) as show:
        done, refreshed = 0, 0.0

        def tell(share: float, text: str) -> None:
            nonlocal refreshed
            now = time.monotonic()
            if now - refreshed > REFRESH_SECONDS:
                shape, dtype, layout, _ = problems[done]
                size = " x ".join(map(str, shape))
                name = f"{plan.section} {size} {str(dtype).removeprefix('torch.')} {layout}: {text}"
                show(done + share, name)
                refreshed = now

        for rows in suite.run(plan, tell):
            done += 1
            show(done, f"{plan.section}: done")
            yield rows


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _milliseconds(value: float | None) -> str:
    """Four digits that count, none dropped before the point."""
    return _number(value, max(0, 3 - math.floor(math.log10(value)))) if value else ""


HEADINGS = ("ms", "20 %", "80 %", "passes", "GB/s", "of copy", "over eager", "over F.cross_entropy", "extra MB")


def _cells(row: Row) -> list[str]:
    """What stands under ``HEADINGS``."""
    return [
        *(_milliseconds(value) for value in (row.median_ms, row.p20_ms, row.p80_ms)),
        "" if row.passes is None else str(row.passes),
        *(_number(value) for value in (row.GB_per_s, row.share_of_copy, row.speedup_over_eager)),
        _number(row.speedup_over_cross_entropy),
        _number(row.peak_extra_MB, 1),
    ]


def _print_problem(rows: Sequence[Row]) -> None:
    """A table of the rows of one problem; columns without any value are left out."""
    first, cells = rows[0], [_cells(row) for row in rows]
    used = [i for i in range(len(HEADINGS)) if any(line[i] for line in cells)]
    names = [label(row.loss, row.contender, row.gradient) for row in rows]
    print_table(
        f"{first.section}: {first.N} x {first.C} {first.dtype}, {first.layout}, on {first.device}, "
        f"{first.threads} thread{'' if first.threads == 1 else 's'}",
        (("loss: contender",), *((HEADINGS[i],) for i in used)),
        [
            (f"{row.loss}: {name}" if row.loss else name, *(line[i] for i in used))
            for row, name, line in zip(rows, names, cells, strict=True)
        ],
        sections=[i for i, row in enumerate(rows) if row.contender in ("copy", "eager") and i],
    )


LEGEND = (
    "ms: forward + backward, median; of copy: share of the bandwidth of out.copy_(logits), 2 passes; over: how many "
    "times as fast as eager PyTorch's same loss, and as F.cross_entropy; MB: peak beyond the logits."
)


def print_report(rows: Iterable[Row]) -> None:
    """One table per problem, then the goals."""
    rows = list(rows)
    for _, group in itertools.groupby(rows, key=problem_of):
        _print_problem(list(group))
        print()
    if rows:
        print_notes([LEGEND])
    print_goals(outcomes(rows))


def print_goals(found: Sequence[Outcome]) -> None:
    """A table of the goals, if there are any."""
    if not found:
        return
    print_table(
        "Goals (worst case, where several count)",
        (("goal",), ("measured", "wanted", "met")),
        [(x.what, f"{x.measured:.2f}", f"{x.bound} {x.limit:g}", "yes" if x.met else "no") for x in found],
    )
