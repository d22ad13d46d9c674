"""The fused linear loss against its three bare GEMMs and ``F.linear_cross_entropy``: ``python -m bench.linear``.

Forward + backward, gradients of input and weight. Results are compared before anything is timed; contenders are timed
in one process, in a new order every round; medians. Memory is the peak above the inputs and the gradients.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import longtail

from . import eager
from .measure import FEWEST_ROUNDS, TOLERANCE, CpuClock, CudaClock, Mismatch
from .memory import PeakMemory

SHAPE = (2048, 512, 32768)
SLOW = 3  # times the GEMMs: such a contender has FEWEST_ROUNDS, which leaves the machine to the others

Gradients = tuple[Tensor, Tensor]
Run = Callable[[Tensor, Tensor], tuple[Tensor | None, Gradients]]


@dataclass
class Timing:
    """One contender: its loss ("" for none), how it runs, seconds of each round, and peak bytes."""

    name: str
    loss: str
    run: Run
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def gemms(x: Tensor, weight: Tensor) -> tuple[None, Gradients]:
    """Logits, gradient of the input, gradient of the weight; nothing in between."""
    logits = x @ weight.T
    return None, (logits @ weight, logits.T @ x)


def _trains(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Run:
    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, Gradients]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = loss_of(x, weight)
        upstream = torch.full_like(loss, 1 / x.shape[0]) if loss.dim() else None
        grads: Any = torch.autograd.grad(loss, (x, weight), upstream)
        return (loss.mean() if loss.dim() else loss).detach(), grads

    return run


def cut_cross_entropy(target: Tensor) -> list[Timing]:
    """Apple's fused loss where it is installed and there is a GPU; without its filter, which drops small gradients."""
    if not target.is_cuda:
        return []
    try:
        function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    except ImportError as error:
        print(f"cut-cross-entropy is left out: {error}", file=sys.stderr)
        return []
    run = _trains(lambda x, w: function(x, w, target, impl="cce_exact"))
    return [Timing("cut-cross-entropy", "plain", run)]


def contenders(target: Tensor, classes: int) -> list[Timing]:
    """Of each loss the first is the plain PyTorch that the others are compared with."""
    # The paper's -1 moves the result by 1/C, which no check could tell from rounding; the work is the same.
    family: dict[str, Any] = {"focal_gamma": 2.0, "complement_gamma": -(classes - 1) / 20}

    def ours(**options: Any) -> Run:
        return _trains(lambda x, w: longtail.linear_cross_entropy(x, w, target, **options))

    found = [Timing("three GEMMs", "", gemms)]
    torchs = getattr(F, "linear_cross_entropy", None)
    if torchs is not None:
        chunked = torch.nn.LinearCrossEntropyOptions()
        found.append(Timing("F.linear_cross_entropy", "plain", _trains(lambda x, w: torchs(x, w, target))))
        found.append(
            Timing(
                "F.linear_cross_entropy chunked", "plain", _trains(lambda x, w: torchs(x, w, target, options=chunked))
            )
        )
    else:
        found.append(Timing("F.cross_entropy", "plain", _trains(lambda x, w: F.cross_entropy(x @ w.T, target))))
    return [
        *found,
        *cut_cross_entropy(target),
        Timing("longtail", "plain", ours()),
        Timing('longtail reduction="none"', "plain", ours(reduction="none")),
        Timing("eager", "family", _trains(lambda x, w: eager.softmax_loss(x @ w.T, target, **family))),
        Timing("longtail complement + focal", "family", ours(**family)),
    ]


def compare(timings: list[Timing], x: Tensor, weight: Tensor) -> None:
    """Checks loss and gradients of every contender against the first of its loss.

    Raises:
        Mismatch: they differ by more than ``measure.TOLERANCE``.
    """
    bounds = dict(zip(("loss", "input", "weight"), (TOLERANCE[x.dtype][0], *TOLERANCE[x.dtype][1:] * 2), strict=True))
    first: dict[str, tuple[Tensor, ...]] = {}
    for timing in timings:
        loss, grads = timing.run(x, weight)
        if loss is None:
            continue
        result = (loss, *grads)
        expected = first.setdefault(timing.loss, result)
        for (what, bound), got, want in zip(bounds.items(), result, expected, strict=True):
            error = ((got.double() - want.double()).norm() / want.double().norm()).item()
            if not error <= bound:
                raise Mismatch(f"{timing.name}: {what} differs by {error:.2g} of it, allowed {bound:.2g}")


def measure(
    shape: tuple[int, int, int] = SHAPE, rounds: int = 7, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Timing]:
    """Compares (which warms up), times, then measures memory."""
    rows, features, classes = shape
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, features, generator=generator, device=device).to(dtype)
    weight = (torch.randn(classes, features, generator=generator, device=device) / features**0.5).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator, device=device)
    timings = contenders(target, classes)
    compare(timings, x, weight)
    timings = [t for t in timings if t.name != "eager"]
    clock: Any = CudaClock() if x.is_cuda else CpuClock()
    order = random.Random(0)
    for _ in range(rounds):
        for timing in order.sample(timings, len(timings)):
            if len(timing.seconds) >= FEWEST_ROUNDS and timing.median > SLOW * timings[0].median:
                continue
            start = clock.start()
            result = timing.run(x, weight)
            timing.seconds.append(clock.seconds(start, clock.mark()))
            del result
    _return_freed_memory()
    for timing in timings:
        with PeakMemory(x.device) as peak:
            _, grads = timing.run(x, weight)
        if peak.extra is not None:
            timing.peak = max(0, peak.extra - sum(g.nbytes for g in grads))
        del grads
    return timings


def _return_freed_memory() -> None:
    """From here on freed blocks go back at once, so that a peak is what is held, not what malloc keeps."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.linear", description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar=("N", "D", "C"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "bench.linear: no CUDA device\n")
    shape = tuple(arguments.shape)
    timings = measure(shape, arguments.rounds, getattr(torch, arguments.dtype), arguments.device)
    logits = shape[0] * shape[2] * getattr(torch, arguments.dtype).itemsize
    bare = timings[0].median
    where = f"{arguments.device}, {torch.get_num_threads()} threads"
    print(f"N, D, C = {shape}, {arguments.dtype}, {where}, medians of {arguments.rounds}")
    print(f"{'':32}{'ms':>8}{'x GEMMs':>9}{'fastest ms':>12}{'peak MB':>9}{'of logits':>11}")
    for timing in timings:
        peak = "" if timing.peak is None else f"{timing.peak / 1e6:9.1f}{timing.peak / logits:11.3f}"
        times = f"{1e3 * timing.median:8.0f}{timing.median / bare:9.2f}{1e3 * min(timing.seconds):12.0f}"
        print(f"{timing.name:32}{times}{peak}")


if __name__ == "__main__":
    main()
