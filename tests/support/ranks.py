"""Real ranks: processes that join one gloo process group once and then run many cases.

A case is a function ``f(group, ...)`` of a module that the workers can import. Smaller worlds are the first ranks.
"""

from __future__ import annotations

import importlib
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LARGEST = 4
SECONDS = 180  # for one case, at a busy machine too: a hang becomes a failure
GRACE = 5  # for the others, once one has failed


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def join(rank: int, world: int, port: int, timeout: float = SECONDS) -> None:
    """Makes this process one rank of a new default group."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=timeout))


def _work(rank: int, world: int, port: int, pipes: list[Any]) -> None:
    join(rank, world, port)
    groups = {n: dist.group.WORLD if n == world else dist.new_group(range(n)) for n in range(1, world + 1)}
    pipe = pipes[rank]
    while (message := pipe.recv()) is not None:
        size, module, name, args, named = message
        try:
            torch.manual_seed(0)
            pipe.send((True, getattr(importlib.import_module(module), name)(groups[size], *args, **named)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Worker processes, started at the first use."""

    def __init__(self) -> None:
        self._pipes: list[Any] = []
        self._processes: Any = None

    def _start(self) -> None:
        pairs = [mp.get_context("spawn").Pipe() for _ in range(LARGEST)]
        self._pipes = [ours for ours, _ in pairs]
        args = (LARGEST, free_port(), [theirs for _, theirs in pairs])
        self._processes = mp.spawn(_work, args, nprocs=LARGEST, join=False)

    def run(self, world: int, case: Callable[..., Any], *args: Any, **named: Any) -> list[Any]:
        """What ``case(group, ...)`` returns on each of the first ``world`` ranks.

        Raises:
            AssertionError: with the tracebacks of the ranks that raised, or the number of one that hangs.
        """
        if not self._pipes:
            self._start()
        for pipe in self._pipes[:world]:
            pipe.send((world, case.__module__, case.__name__, args, named))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + SECONDS
        while len(answers) < world and (left := deadline - time.monotonic()) > 0:
            waiting = {id(pipe): rank for rank, pipe in enumerate(self._pipes[:world]) if rank not in answers}
            for pipe in wait([self._pipes[rank] for rank in waiting.values()], left):
                answers[waiting[id(pipe)]] = answer = pipe.recv()  # type: ignore[union-attr]
                if not answer[0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        faults = [f"rank {rank}:\n{result}" for rank, (fine, result) in sorted(answers.items()) if not fine]
        faults += [f"rank {rank} of {world} does not answer" for rank in range(world) if rank not in answers]
        if faults:
            self.stop(force=True)  # the others' state is unknown
            raise AssertionError("\n".join(faults))
        return [answers[rank][1] for rank in range(world)]

    def stop(self, force: bool = False) -> None:
        for pipe in self._pipes:
            if not force:
                pipe.send(None)
        if self._processes is not None:
            for process in self._processes.processes:
                if force:
                    process.kill()
                process.join(30)
        self._pipes, self._processes = [], None
