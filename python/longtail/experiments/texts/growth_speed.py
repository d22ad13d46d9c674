"""Training steps by number of classes: places to ever smaller regions, in fresh processes (:mod:`.growth_step`)."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ...class_balance import class_counts
from ..output import Advance, Row, with_provenance
from ..pool import in_processes
from .growth_step import SEED, THREADS, Measured, Work, contenders, measure, peaks
from .settings import SETTINGS
from .training import load

EXPERIMENT = "places"
CLASSES, QUICK_CLASSES = (100, 1000, 10_000, 100_000), (100, 1000)
BATCH = 1024
PROCESSES, QUICK_PROCESSES = 3, 1
"""That measure times, of each kind."""
LEAST_STEPS, MOST_STEPS, LOGITS_COLUMNS = 6, 32, 200_000
"""Steps of each contender: ``LOGITS_COLUMNS`` over the classes, within these; the first is not timed."""
QUICK_STEPS = 3
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
"""Under these glibc's malloc keeps what is freed, and hands it out again."""

Found = TypeVar("Found")


def units(classes: Sequence[int], quick: bool) -> int:
    """Of work, for a progress bar."""
    return (2 * _processes(quick) + 1) * len(classes)


def _processes(quick: bool) -> int:
    return QUICK_PROCESSES if quick else PROCESSES


def merged_or_split(region: Tensor, classes: int) -> Tensor:
    """The class of each place, [N]: a contiguous range of regions, or of places sorted by region where regions are few.

    Raises:
        ValueError: there are fewer places than classes.
    """
    places, regions = region.numel(), int(region.max()) + 1
    if classes > places:
        raise ValueError(f"{places} places cannot be {classes} classes")
    if classes <= regions:
        return region * classes // regions
    target = torch.empty_like(region)
    target[region.argsort(stable=True)] = torch.arange(places) * classes // places
    return target


def work_of(classes: int, quick: bool) -> Work:
    """Errors as :func:`merged_or_split`."""
    corpus, texts = load(EXPERIMENT, quick)
    target = merged_or_split(corpus.target, classes)
    steps = QUICK_STEPS if quick else max(LEAST_STEPS, min(MOST_STEPS, LOGITS_COLUMNS // classes))
    chosen = torch.randint(target.numel(), (steps, BATCH), generator=torch.Generator().manual_seed(SEED))
    batches = [(texts.bags(rows), target[rows]) for rows in chosen]
    setting = SETTINGS[EXPERIMENT]
    return Work(texts.buckets, setting.width, setting.learning_rate, class_counts(target, classes), batches)


def run(classes: Sequence[int], quick: bool, advance: Advance) -> list[Row]:
    """A row for each number of classes, loss and implementation.

    Raises:
        UnequalLosses: loss or gradients of a fused loss are not those of plain PyTorch.
        ValueError: there are fewer places than classes.
        ChildProcessError: the system has ended a process.
    """
    works = [work_of(number, quick) for number in classes]
    usual: list[list[list[Measured]]] = []
    kept: list[list[list[Measured]]] = []
    for number in range(1, _processes(quick) + 1):
        for found, environment, memory in ((usual, {}, ""), (kept, KEPT, ", freed memory kept")):
            status = f"step times, process {number}{memory}"
            found.append(_in_a_process(works, measure, environment, status, advance))
    of_peaks = _in_a_process(works, peaks, {}, "memory", advance)
    corpus = load(EXPERIMENT, quick).corpus
    facts: Row = {"data": corpus.source, "regions": len(corpus.classes)}
    return [
        with_provenance({"experiment": "growth", "part": "speed", **row, **facts}, threads=THREADS)
        for work, in_usual, in_kept, found in zip(
            works, zip(*usual, strict=True), zip(*kept, strict=True), of_peaks, strict=True
        )
        for row in _rows(work, in_usual, in_kept, found)
    ]


def _in_a_process(
    works: Sequence[Work], function: Callable[[Work], Found], environment: dict[str, str], status: str, advance: Advance
) -> list[Found]:
    """What a function says of each, in one process with an environment of its own."""
    outcomes = []
    with _environment(environment), contextlib.closing(in_processes(works, function, 1)) as found:
        for work, outcome in zip(works, found, strict=True):
            outcomes.append(outcome)
            advance(f"{work.counts.numel()} classes: {status}")
    return outcomes


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """For processes that are started inside."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name)
        os.environ.update(before)


def _rows(
    work: Work,
    usual: Sequence[list[Measured]],
    kept: Sequence[list[Measured]],
    of_peaks: list[int | None],
) -> Iterator[Row]:
    """Of every contender: the medians of the processes, and the lowest and highest of them."""
    rivals = [contender for of_loss in contenders(work.counts) for contender in of_loss]
    for contender, in_usual, in_kept, peak in zip(
        rivals, zip(*usual, strict=True), zip(*kept, strict=True), of_peaks, strict=True
    ):
        differences = [found.difference for found in (*in_usual, *in_kept)]
        yield {
            "classes": work.counts.numel(),
            "loss": contender.loss,
            "implementation": contender.implementation,
            **_times("step_ms", in_usual),
            **_times("kept_step_ms", in_kept),
            "optimizer_ms": statistics.median(found.optimizer_ms for found in in_usual),
            "peak_extra_MB": None if peak is None else peak / 1e6,
            "loss_difference": max(difference.loss for difference in differences),
            "gradient_difference": max(difference.gradient for difference in differences),
            "processes": len(usual),
            "steps": len(work.batches) - 1,
            "batch_size": BATCH,
            "width": work.width,
            "largest": int(work.counts.max()),
            "rarest": int(work.counts.min()),
        }


def _times(name: str, found: Sequence[Measured]) -> Row:
    times = [measured.step_ms for measured in found]
    return {name: statistics.median(times), f"{name}_lowest": min(times), f"{name}_highest": max(times)}
