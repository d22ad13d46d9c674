"""The fused linear loss beside its three bare GEMMs and ``F.linear_cross_entropy``.

Forward + backward, gradients of input and weight. Results are compared before anything is timed; contenders are timed
in one process, in a new order every round; medians. Memory is the peak above the inputs and the gradients.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import longtail
from longtail.experiments.command_line import Parser, positive_int
from longtail.experiments.output import print_table
from longtail.experiments.peak_memory import PeakMemory, return_freed_memory

from . import eager, goals, report, results
from .measure import FEWEST_ROUNDS, TOLERANCE, CpuClock, CudaClock, Mismatch
from .peers import usable

SHAPE = (2048, 512, 32768)
PART = 1024
"""Rows at a time of what is compared with where all at once is out of memory."""
FEW_FEATURES = 128
"""Up to here chunks of classes may not pay: what the cost model takes is shown beside chunks of rows."""
SLOW = 3  # times the GEMMs: such a contender has FEWEST_ROUNDS, which leaves the machine to the others

# name, module, function, options
PEERS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("liger", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", {}),
    # Without its filter, which drops small gradients.
    ("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy", {"impl": "cce_exact"}),
    ("quack", "quack.linear_cross_entropy", "chunked_linear_cross_entropy", {}),
)

Gradients = tuple[Tensor, Tensor]
Run = Callable[[Tensor, Tensor], tuple[Tensor | None, Gradients]]


@dataclass
class Timing:
    """One contender: its loss ("" for none), how it runs, seconds of each round, peak bytes; why it has none.

    ``in_parts`` gives the results where ``run`` is out of memory.
    """

    name: str
    loss: str
    run: Run
    in_parts: Run | None = None
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Row:
    """One contender of :func:`measure`. Times are of forward + backward; MB are decimal."""

    section: str
    device: str
    dtype: str
    N: int
    D: int
    C: int
    loss: str
    contender: str
    rounds: int
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    time_of_gemms: float | None  # median over that of the three bare GEMMs of the same run
    peak_extra_MB: float | None  # beyond the inputs and the gradients
    peak_of_logits: float | None
    note: str = ""


def rows_of(timings: Sequence[Timing], shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Row]:
    n, d, c = shape
    rows = []
    for timing in timings:
        p20, median, p80 = results.quantiles(timing.seconds)
        rows.append(
            Row(
                *("linear", device, str(dtype).removeprefix("torch."), n, d, c, timing.loss, timing.name),
                *(len(timing.seconds), median, p20, p80),
                time_of_gemms=timing.median / timings[0].median if timing.seconds else None,
                peak_extra_MB=None if timing.peak is None else timing.peak / 1e6,
                peak_of_logits=None if timing.peak is None else timing.peak / (n * c * dtype.itemsize),
                note=timing.note,
            )
        )
    return rows


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


def _in_parts(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor], target: Tensor) -> Run:
    """The mean of ``loss_of`` (input, weight, target) and its gradients, ``PART`` rows at a time."""

    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, Gradients]:
        loss, grads = x.new_zeros((), dtype=torch.float32), []
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part, y in zip(x.split(PART), target.split(PART), strict=True):

            def share(x: Tensor, w: Tensor, y: Tensor = y) -> Tensor:
                return loss_of(x, w, y) * (len(y) / len(target))

            value, (grad, of_weight) = _trains(share)(part, weight)
            assert value is not None
            loss, grad_weight = loss + value, grad_weight.add_(of_weight)
            grads.append(grad)
        return loss, (torch.cat(grads), grad_weight.to(weight.dtype))

    return run


def peers(x: Tensor, weight: Tensor, target: Tensor) -> list[Timing]:
    """Fused losses of other projects on a GPU, where they are installed and run."""
    found = []
    for name, module, function, options in PEERS if x.is_cuda else ():

        def run_of(peer: Callable[..., Any], target: Tensor, options: dict[str, Any] = options) -> Run:
            return _trains(lambda x, w: peer(x, w, target, **options))

        peer = usable(name, module, function, lambda f, run_of=run_of: run_of(f, target[:128])(x[:128], weight))  # type: ignore[misc]
        if peer is not None:
            found.append(Timing(name, "plain", run_of(peer, target)))
    return found


def contenders(x: Tensor, weight: Tensor, target: Tensor) -> list[Timing]:
    """Of each loss the first is the plain PyTorch that the others are compared with."""
    # The paper's -1 moves the result by 1/C, which no check could tell from rounding; the work is the same.
    family: dict[str, Any] = {"focal_gamma": 2.0, "complement_gamma": -(weight.shape[0] - 1) / 20}

    def in_eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return eager.softmax_loss(x @ weight.T, target, **family)

    def ours(**options: Any) -> Run:
        return _trains(lambda x, w: longtail.linear_cross_entropy(x, w, target, **options))

    def of_statistics(x: Tensor, weight: Tensor) -> Tensor:
        return -longtail.linear_row_statistics(x, weight, target).log_prob.mean()

    found = [Timing("three GEMMs", "", gemms)]
    few = x.shape[1] <= FEW_FEATURES and not x.is_cuda
    torchs = getattr(F, "linear_cross_entropy", None)
    if torchs is not None:
        found.append(Timing("F.linear_cross_entropy", "plain", _trains(lambda x, w: torchs(x, w, target))))
        if not few:  # its loss is a quarter off there, in bfloat16
            chunked = torch.nn.LinearCrossEntropyOptions()
            found.append(
                Timing(
                    "F.linear_cross_entropy chunked",
                    "plain",
                    _trains(lambda x, w: torchs(x, w, target, options=chunked)),
                )
            )
    else:
        found.append(Timing("F.cross_entropy", "plain", _trains(lambda x, w: F.cross_entropy(x @ w.T, target))))
    size = max(1, x.shape[0] // 4)
    by_rows = Timing(f"longtail chunk_size={size}", "plain", ours(chunk_size=size))
    return [
        *found,
        *peers(x, weight, target),
        Timing("longtail", "plain", ours()),
        *([by_rows] if few else []),
        Timing('longtail reduction="none"', "plain", ours(reduction="none")),
        Timing("longtail linear_row_statistics", "plain", _trains(of_statistics)),
        Timing("eager", "family", _trains(lambda x, w: in_eager(x, w, target)), _in_parts(in_eager, target)),
        Timing("longtail complement + focal", "family", ours(**family)),
    ]


def _results(timing: Timing, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Gradients | None]:
    """Of one run; of its parts, or none, where that is out of memory."""
    try:
        return timing.run(x, weight)
    except torch.OutOfMemoryError:
        timing.note = "out of memory"
    if x.is_cuda:
        torch.cuda.empty_cache()
    return (None, None) if timing.in_parts is None else timing.in_parts(x, weight)


def compare(timings: list[Timing], x: Tensor, weight: Tensor) -> None:
    """Checks loss and gradients of every contender against the first of its loss; notes who is out of memory.

    Raises:
        Mismatch: they differ by more than ``measure.TOLERANCE``.
    """
    bounds = dict(zip(("loss", "input", "weight"), (TOLERANCE[x.dtype][0], *TOLERANCE[x.dtype][1:] * 2), strict=True))
    first: dict[str, tuple[Tensor, ...]] = {}
    for timing in timings:
        loss, grads = _results(timing, x, weight)
        if loss is None:
            continue
        assert grads is not None
        result = (loss, *grads)
        expected = first.setdefault(timing.loss, result)
        for (what, bound), got, want in zip(bounds.items(), result, expected, strict=True):
            error = ((got.double() - want.double()).norm() / want.double().norm()).item()
            if not error <= bound:
                raise Mismatch(f"{timing.name}: {what} differs by {error:.2g} of it, allowed {bound:.2g}")


def measure(shape: tuple[int, int, int], rounds: int, dtype: torch.dtype, device: torch.device) -> list[Timing]:
    """Compares (which warms up), times, then measures memory."""
    n, features, classes = shape
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, features, generator=generator, device=device).to(dtype)
    weight = (torch.randn(classes, features, generator=generator, device=device) / features**0.5).to(dtype)
    target = torch.randint(classes, (n,), generator=generator, device=device)
    clock: Any = CudaClock() if device.type == "cuda" else CpuClock()
    timings = contenders(x, weight, target)
    compare(timings, x, weight)
    timings = [t for t in timings if t.name != "eager" or t.note]
    timed = [t for t in timings if not t.note]
    order = random.Random(0)
    for _ in range(rounds):
        for timing in order.sample(timed, len(timed)):
            if len(timing.seconds) >= FEWEST_ROUNDS and timing.median > SLOW * timings[0].median:
                continue
            start = clock.start()
            result = timing.run(x, weight)
            timing.seconds.append(clock.seconds(start, clock.mark()))
            del result
    return_freed_memory()
    for timing in timed:
        with PeakMemory(x.device) as peak:
            _, grads = timing.run(x, weight)
        if peak.extra is not None:
            timing.peak = max(0, peak.extra - sum(g.nbytes for g in grads))
        del grads
    return timings


def _show(rows: Sequence[Row]) -> None:
    first = rows[0]
    headings = (("contender",), ("ms", "20 %", "80 %", "of the GEMMs"), ("extra MB", "of the logits"))
    lines = []
    for row in rows:
        times = [f"{ms:.0f}" if ms is not None else "" for ms in (row.median_ms, row.p20_ms, row.p80_ms)]
        peak = "" if row.peak_extra_MB is None else f"{row.peak_extra_MB:.1f}"
        share = "" if row.peak_of_logits is None else f"{row.peak_of_logits:.3f}"
        of_gemms = "" if row.time_of_gemms is None else f"{row.time_of_gemms:.2f}"
        lines.append((f"{row.contender}, {row.note}" if row.note else row.contender, *times, of_gemms, peak, share))
    print_table(f"N, D, C = {first.N}, {first.D}, {first.C}, {first.dtype} on {first.device}", headings, lines)


def add_options(parser: Parser) -> None:
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar=("N", "D", "C"))
    parser.add_argument("--rounds", type=positive_int, default=7, help="slow contenders have 3 (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=results.csv_file, default=results.FOLDER / "linear.csv", help="the CSV")


def run(arguments: argparse.Namespace, parser: Parser) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: no CUDA device\n")
    shape, dtype = tuple(arguments.shape), getattr(torch, arguments.dtype)
    device = torch.device(arguments.device)
    timings = measure(shape, arguments.rounds, dtype, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    rows = rows_of(timings, shape, dtype, name)
    results.write(arguments.output, rows)
    _show(rows)
    if (shape, dtype) == (SHAPE, torch.float32):
        peaks = (row.peak_of_logits for row in rows if row.contender.startswith("longtail"))
        report.print_goals(goals.linear_outcomes(peaks))
    print(f"wrote {arguments.output}")
