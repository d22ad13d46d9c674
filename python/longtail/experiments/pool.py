"""Many small trainings in processes of one thread each, in a fixed order, interruptible."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from .output import Interrupted, Row

Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


def train_all(
    tasks: Sequence[Task],
    train: Callable[[Task], Outcome],
    jobs: int,
    advance: Callable[[Task], None],
    row_of: Callable[[Task, Outcome], Row],
) -> dict[Task, Outcome]:
    """Trains everything, in ``jobs`` processes of one thread each; the outcomes do not depend on their number.

    Args:
        tasks: hashable, and fit to be pickled, as ``train``, a function of a module, is.
        advance: told each task that is done, in order.
        row_of: makes what an interrupt leaves of each.

    Raises:
        Interrupted: by Ctrl-C, with a row for each network that was trained and tested by then.
        ChildProcessError: the system has ended one of the processes.
    """
    outcomes: dict[Any, Outcome] = {}
    try:
        with contextlib.closing(outcomes_of(tasks, train, jobs)) as finished:
            for task, outcome in zip(tasks, finished, strict=True):
                outcomes[task] = outcome
                advance(task)
    except KeyboardInterrupt:
        done = f"{len(outcomes)} of {len(tasks)} networks"
        raise Interrupted([row_of(*each) for each in outcomes.items()], done) from None
    return outcomes


def outcomes_of(tasks: Sequence[Task], train: Callable[[Task], Outcome], jobs: int) -> Generator[Outcome]:
    """As :func:`train_all`, one after the other, each as soon as it and those before it are there; to be closed."""
    if jobs == 1:
        with prepared_process():
            yield from map(train, tasks)
    else:
        yield from in_processes(tasks, train, jobs)


def in_processes(tasks: Sequence[Task], function: Callable[[Task], Outcome], processes: int) -> Generator[Outcome]:
    """As :func:`outcomes_of`, but never in this process."""
    context = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare_process)
    try:
        with _interrupts_ignored():
            futures = [pool.submit(function, task) for task in tasks]
        for future in futures:
            yield future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "the system has ended a process, most often for want of memory; nothing is kept"
        ) from None
    except BaseException:
        # Nobody waits for the rest, which would take as long as a training. (Futures that are cancelled first, too,
        # make the pool's thread fail in some Pythons.)
        for process in set(multiprocessing.active_children()).difference(others):
            process.terminate()
        raise
    finally:
        pool.shutdown()


def _prepare_process() -> None:
    """One thread: networks this small gain nothing from more, and sums come out the same in every process.

    Subnormal numbers become 0: confident rows have gradients that small, which slow the convolutions down tenfold.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@contextlib.contextmanager
def prepared_process() -> Iterator[None]:
    """This process as one that trains; afterwards as it was."""
    threads = torch.get_num_threads()
    _prepare_process()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all: it is for the one that waits."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
