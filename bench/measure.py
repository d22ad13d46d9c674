"""Compares results, then times contenders in turn, in one process.

No time is taken before loss and gradient agree with those of the loss's first contender. Every round runs the
contenders in a new order; a slow one sits out some rounds, spread evenly, so that drift hits all alike.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longtail.experiments.peak_memory import SMALLEST, PeakMemory

from .contenders import Contender, Problem

FEWEST_ROUNDS = 3

# Relative: of the loss, and of the gradient's norm. bfloat16 leaves room for F.cross_entropy, which rounds
# log-probabilities to it before it takes their exponential, and its losses before it sums them.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2.0**-7, 2.0**-5)}

Tell = Callable[[float, str], None]
"""Takes the share of a problem that is done, and what is being done."""


class Mismatch(AssertionError):
    """A contender's result is not that of the first."""


@dataclass
class Timing:
    """Seconds of each round, and the bytes that one step needs beyond its logits."""

    contender: Contender
    total: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    peak: int | None = None


class Ring:
    """Buffers of the same logits, handed out in turn and written anew after each use.

    On the CPU one buffer: a loss finds logits just written, as after the model. On CUDA more than the L2 cache holds.
    """

    def __init__(self, source: Tensor) -> None:
        self._source = source
        count = 1
        if source.is_cuda:
            cache = torch.cuda.get_device_properties(source.device).L2_cache_size
            count = max(2, math.ceil(3 * cache / source.nbytes))
        # Results of an operation, as a model's: a leaf that requires grad may not be overwritten by its gradient.
        zero = torch.zeros((), device=source.device, requires_grad=True)
        self._buffers = itertools.cycle([source.clone().add_(zero) for _ in range(count)])

    def take(self) -> Tensor:
        return next(self._buffers)

    @torch.no_grad()
    def restore(self, buffer: Tensor) -> None:
        buffer.copy_(self._source)


class CpuClock:
    """Wall time."""

    def start(self) -> float:
        return time.perf_counter()

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, last: float) -> float:
        return last - first


class CudaClock:
    """Time on the device, by events."""

    def start(self) -> torch.cuda.Event:
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)  # about 1 ms: the queue fills meanwhile, so that Python is not what is timed
        return self.mark()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        last.synchronize()
        return first.elapsed_time(last) / 1e3


def step(contender: Contender, logits: Tensor, clock: Any) -> tuple[float, float]:
    """Seconds of forward, and of forward + backward. The results are freed after the last mark."""
    start = clock.start()
    loss = contender.forward(logits)
    middle = clock.mark()
    # Not loss.backward(): a leaf would clone a gradient that shares its memory.
    grad = None if loss is None else torch.autograd.grad(loss, logits)
    end = clock.mark()
    seconds = clock.seconds(start, middle), clock.seconds(start, end)
    del grad
    return seconds


@dataclass(frozen=True)
class Result:
    """Loss and gradient; the target's entries apart, which would drown all others in one norm."""

    loss: float
    grad: Tensor  # of the logits' shape
    at_target: Tensor  # the target of each row, or its labels, float32

    @classmethod
    def of(cls, contender: Contender, logits: Tensor, index: Tensor) -> Result:
        loss = contender.forward(logits)
        assert loss is not None
        (grad,) = torch.autograd.grad(loss, logits)
        return cls(loss.item(), grad, grad.gather(1, index).float())


def _norm_of_others(grad: Tensor, index: Tensor) -> float:
    return torch.linalg.vector_norm(grad.float().scatter(1, index, 0.0)).item()


def compare(problem: Problem, contenders: Sequence[Contender], ring: Ring, tell: Callable[[str], None]) -> None:
    """Checks every contender of one loss against the first.

    Norms, not elements: the gradient of a mean over many classes is smaller than any useful absolute bound.

    Raises:
        Mismatch: loss or gradient differ by more than ``TOLERANCE``.
    """
    index = problem.index
    first = None
    for contender in contenders:
        tell(f"comparing {contender.loss} {contender.name} {contender.gradient}")
        logits = ring.take()
        result = Result.of(contender, logits, index)
        if first is None:
            first = result
            size = _norm_of_others(first.grad, index)
        else:
            errors = {
                "loss": abs(result.loss - first.loss) / abs(first.loss),
                "gradient at the target": ((result.at_target - first.at_target).norm() / first.at_target.norm()).item(),
                "gradient elsewhere": _norm_of_others(result.grad.float() - first.grad, index) / size,
            }
            for (what, error), bound in zip(errors.items(), _bounds(problem.logits.dtype, contender), strict=True):
                if not error <= bound:
                    raise Mismatch(
                        f"{contender.loss} {tuple(problem.logits.shape)} {problem.logits.dtype}: {what} of "
                        f"{contender.name} {contender.gradient} is not that of {contenders[0].name}: relative error "
                        f"{error:.2g}, allowed {bound:.2g}"
                    )
        ring.restore(logits)


def _bounds(dtype: torch.dtype, contender: Contender) -> tuple[float, float, float]:
    loss, grad = TOLERANCE[dtype]
    return grad if contender.name == "eager" else loss, grad, grad


def warm_up(timing: Timing, ring: Ring, clock: Any, device: torch.device) -> float:
    """One step, its peak memory noted; returns its seconds."""
    logits = ring.take()
    with PeakMemory(device) as peak:
        _, seconds = step(timing.contender, logits, clock)
    timing.peak = peak.extra if logits.nbytes >= SMALLEST else None
    ring.restore(logits)
    return seconds


def measure(
    problem: Problem, contenders: Sequence[Contender], *, rounds: int, budget: float, tell: Tell
) -> list[Timing]:
    """Compares, warms up (which measures peak memory), then times in up to ``rounds`` rounds.

    ``budget``: seconds for each contender, which has at least ``FEWEST_ROUNDS`` if there are as many. 0 rounds: no
    times.

    Raises:
        Mismatch: before anything is timed.
    """
    ring = Ring(problem.logits)
    for loss in dict.fromkeys(c.loss for c in contenders if c.loss):
        compare(problem, [c for c in contenders if c.loss == loss], ring, lambda text: tell(0.0, text))
    timed = [contender for contender in contenders if contender.timed]
    return take_turns(timed, ring, problem.logits.device, rounds=rounds, budget=budget, tell=tell)


def take_turns(
    contenders: Sequence[Contender], ring: Any, device: torch.device, *, rounds: int, budget: float, tell: Tell
) -> list[Timing]:
    """Warms up, then times, as :func:`measure`, what has been compared; ``ring`` hands out logits as :class:`Ring`."""
    clock = CudaClock() if device.type == "cuda" else CpuClock()
    gc.collect()
    timings = [Timing(contender) for contender in contenders]
    turns = []
    for i, timing in enumerate(timings):
        tell(0.3 + 0.1 * i / len(timings), "warming up")
        affordable = math.ceil(budget / warm_up(timing, ring, clock, device))
        turns.append(min(max(affordable, FEWEST_ROUNDS), rounds))
    order = random.Random(0)
    gc.disable()
    try:
        for i in range(rounds):
            present = [t for t, n in zip(timings, turns, strict=True) if (i + 1) * n // rounds > i * n // rounds]
            order.shuffle(present)
            for timing in present:
                tell(0.4 + 0.6 * i / rounds, f"round {i + 1} of {rounds}")
                logits = ring.take()
                forward, total = step(timing.contender, logits, clock)
                timing.forward.append(forward)
                timing.total.append(total)
                ring.restore(logits)
    finally:
        gc.enable()
    return timings
