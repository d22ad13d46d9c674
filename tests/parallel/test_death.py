"""Promise: a rank that dies surfaces on the others as torch.distributed's own error, by the group's timeout."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import longtail
from ranks import free_port, join

TIMEOUT = 30.0  # of the group, in seconds; torch's default is minutes
BUSY = 60.0  # what a loaded machine may add


def _step(rank: int, port: int, results: Any, barrier: Any) -> None:
    join(rank, 2, port, TIMEOUT)
    logits, target = torch.randn(8, 5), torch.arange(8)
    longtail.vocab_parallel_cross_entropy(logits, target, num_classes=10)
    barrier.wait()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        while True:  # the first collective may have been sent before the connection breaks
            longtail.vocab_parallel_cross_entropy(logits, target, num_classes=10)
    except RuntimeError as error:  # DistBackendError and DistNetworkError are RuntimeErrors
        results.send((type(error).__module__, str(error), time.monotonic() - start))
    os._exit(0)  # without waiting for the dead


def test_a_killed_rank() -> None:
    context = mp.get_context("spawn")
    (ours, theirs), barrier = context.Pipe(), context.Barrier(2)
    port = free_port()
    processes = [context.Process(target=_step, args=(rank, port, theirs, barrier)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        assert ours.poll(TIMEOUT + 2 * BUSY), "the surviving rank hangs"
        module, text, seconds = ours.recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert "longtail" not in text, "the error is torch.distributed's own"
    assert module.startswith(("torch", "builtins"))
    assert text
    assert seconds < TIMEOUT + BUSY
    assert processes[1].exitcode == -signal.SIGKILL
    assert not dist.is_initialized()
