"""The section ``growth``: time per element of the softmax family from 10^4 to 2^33 logits, and from 2 to 2^22 classes.

Logits repeat a few rows, which are compared with eager PyTorch; the loss and the gradients of all of them are compared
with those of the few. What would take more memory or time than there is is left out and named.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longtail.experiments.command_line import Parser, positive_int
from longtail.experiments.output import print_notes, progress_bar

from . import contenders, losses, measure, plot, report, results, suite
from .contenders import Contender, Problem

LOSS = "family"
CLASSES = (2, 10, 100, 1000, 32768, 2**22)
ELEMENTS = (10**4, 2**16, 2**19, 2**22, 2**25, 2**28, 2**31, 2**33)
REPEATED = 2**20
"""Logits that are made at random, at least a row of them."""

MODES = ("inplace", "backward", "copy")
"""Gradient modes, and the copy: each needs one more tensor as large as the logits than the one before."""

LARGE = 2**30
"""Elements from which on there are two rounds, and no copy."""

ROUNDS = 100
BUDGET = 0.1  # seconds for each contender
RUNS = 4  # of a large contender: compared, warmed up, timed twice
RESTORING = 2e-10  # seconds for an element
ROW_BYTES = 64
"""Of a row's target, loss and statistics, at most."""

SHARE = 0.85
"""Of the free memory, which is filled at most."""


class Size(NamedTuple):
    """``times`` repeats of ``rows`` random rows."""

    rows: int
    times: int
    classes: int

    @classmethod
    def of(cls, elements: int, classes: int) -> Size:
        rows = max(1, min(elements, REPEATED) // classes)
        return cls(rows, elements // classes // rows, classes)

    @property
    def shape(self) -> suite.Shape:
        return self.rows * self.times, self.classes

    def bytes(self, dtype: torch.dtype, copies: int) -> int:
        """With so many tensors as large as the logits."""
        return self.rows * self.times * (self.classes * dtype.itemsize * copies + ROW_BYTES)

    @property
    def elements(self) -> int:
        return self.rows * self.times * self.classes

    def modes(self, dtype: torch.dtype) -> tuple[list[str], list[str]]:
        """Those of ``MODES`` that the free memory holds, and those that it does not."""
        room = SHARE * memory()
        modes = MODES[: 2 if self.elements >= LARGE else 3]
        held = [mode for copies, mode in enumerate(modes, 1) if self.bytes(dtype, copies) <= room]
        return held, list(modes[len(held) :])


class Repeats:
    """Logits that repeat those of a problem, in place of a :class:`measure.Ring`, which would hold them twice."""

    def __init__(self, few: Problem, times: int) -> None:
        rows, classes = few.logits.shape
        self._source = few.logits
        self.logits = torch.empty(rows * times, classes, dtype=few.logits.dtype)
        # Results of an operation: a leaf that requires grad may not be overwritten by its gradient.
        self._view(self.logits).copy_(few.logits.clone().requires_grad_())

    def _view(self, logits: Tensor) -> Tensor:
        return logits.view(-1, *self._source.shape)

    def take(self) -> Tensor:
        return self.logits

    @torch.no_grad()
    def restore(self, logits: Tensor) -> None:
        self._view(logits).copy_(self._source)


def memory() -> int:
    """Bytes that are free."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except OSError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def compare(few: Problem, chosen: list[Contender], repeats: Repeats) -> None:
    """Checks the few rows against eager PyTorch, and the first and the last repeat against the few rows.

    Raises:
        measure.Mismatch: loss or gradient differ by more than ``measure.TOLERANCE``.
    """
    of_few = contenders.of_loss(LOSS, few, compiled=False)
    measure.compare(few, of_few, measure.Ring(few.logits), lambda _: None)
    index = few.target.unsqueeze(1)
    expected = measure.Result.of(of_few[1], measure.Ring(few.logits).take(), index)
    rows, wanted = len(few.target), expected.grad.float()
    times = len(repeats.logits) // rows
    bound_of_loss, bound = measure.TOLERANCE[few.logits.dtype]
    for contender in chosen:
        logits = repeats.take()
        loss = contender.forward(logits)
        assert loss is not None
        (grad,) = torch.autograd.grad(loss, logits)
        errors = [abs(loss.item() - expected.loss) / abs(expected.loss) / bound_of_loss]
        for part in (grad[:rows], grad[-rows:]):
            error = (part.float() * times - wanted).norm() / wanted.norm()
            errors.append(error.item() / bound)
        del grad, loss
        repeats.restore(logits)
        if not max(errors) <= 1:
            raise measure.Mismatch(
                f"{LOSS} {tuple(logits.shape)} {logits.dtype}: loss or gradients of {contender.name} "
                f"{contender.gradient} are not those of the rows that it repeats"
            )


def rows_of(size: Size, modes: list[str], dtype: torch.dtype, rounds: int) -> list[results.Row]:
    """Measures one size in some of ``MODES``."""
    few = Problem.make((size.rows, size.classes), dtype, torch.device("cpu"))
    repeats = Repeats(few, size.times)
    problem = Problem(repeats.logits.detach(), few.target.repeat(size.times), few.counts)
    chosen = [x for x in contenders.of_loss(LOSS, problem, compiled=False) if x.gradient in modes]
    compare(few, chosen, repeats)
    if "copy" in modes:
        chosen.append(contenders.copy(problem))
    timings = measure.take_turns(
        *(chosen, repeats, problem.logits.device), rounds=rounds, budget=BUDGET, tell=lambda *_: None
    )
    return results.rows_of("growth", problem, timings)


def sizes(arguments: argparse.Namespace) -> Iterator[Size]:
    for elements in sorted(arguments.elements):
        for classes in sorted(arguments.classes, reverse=True):  # few classes take longest for an element
            if classes <= elements:
                yield Size.of(elements, classes)


def measured(arguments: argparse.Namespace, left_out: list[str]) -> Iterator[list[results.Row]]:
    """The rows of one size after another; names what it leaves out."""
    dtype: torch.dtype = losses.DTYPES[arguments.dtype]
    start = time.monotonic()
    cost: dict[tuple[int, str], float] = {}  # seconds for an element, of the classes and mode
    every = list(sizes(arguments))
    with progress_bar(len(every)) as advance:
        for size in every:
            held, missing = size.modes(dtype)
            known = [cost.get((size.classes, mode), 0.0) + RESTORING for mode in held]
            late = time.monotonic() - start + RUNS * size.elements * sum(known) > arguments.seconds
            what = " x ".join(map(str, size.shape))
            if late:
                left_out.append(f"{what} (time)")
            elif missing:
                left_out.append(f"{what} {' and '.join(missing)} (memory)")
            if held and not late:
                rounds = min(arguments.rounds, 2) if size.elements >= LARGE else arguments.rounds
                rows = rows_of(size, held, dtype, rounds)
                for row in rows:
                    assert row.median_ms is not None
                    cost[size.classes, row.gradient or "copy"] = row.median_ms / 1e3 / size.elements
                yield rows
            advance(what)


def add_options(parser: Parser) -> None:
    parser.add_argument("--elements", type=positive_int, nargs="+", default=ELEMENTS, metavar="N*C")
    parser.add_argument("--classes", type=positive_int, nargs="+", default=CLASSES, metavar="C")
    parser.add_argument("--dtype", choices=losses.DTYPES, default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=ROUNDS, help="at most; 2 from 2^30 elements on")
    parser.add_argument(
        "--seconds", type=positive_int, default=180, help="what would end later is left out (default: %(default)s)"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write the CSV alone")
    parser.add_argument("--output", type=results.csv_file, default=results.FOLDER / "growth.csv", help="the CSV")


def run(arguments: argparse.Namespace, parser: Parser) -> None:
    found: list[results.Row] = []
    left_out: list[str] = []
    try:
        for rows in measured(arguments, left_out):
            results.write(arguments.output, rows)
            found += rows
    except measure.Mismatch as error:
        parser.exit(1, f"{parser.prog}: nothing written for this problem: {error}\n")
    for written in (arguments.output, *(() if arguments.no_pictures else plot.draw(arguments.output))):
        print(f"wrote {written}")
    report.print_report(found)
    if left_out:
        print_notes([f"Left out: {', '.join(left_out)}"])
