"""Vocabulary-parallel cross-entropy against torch's ``loss_parallel`` and an all-gather of the logits.

Gloo ranks on this machine's CPU, one thread each. Every rank holds C / P classes of all N
rows. Forward + backward; results are compared before anything is timed; a round runs all contenders in a new order, and
counts for each the slowest rank. Rows go to bench/results/parallel.csv.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.multiprocessing.spawn import spawn

import longtail
from longtail.experiments.command_line import Parser, positive_int
from longtail.options import SoftmaxOptions
from longtail.parallel.collectives import all_gather
from longtail.softmax import shards

from . import results
from .measure import TOLERANCE, Mismatch
from .wire import WireBytes

SHAPE, WORLD, ROUNDS = (2048, 65536), 2, 7
OUTPUT = results.FOLDER / "parallel.csv"

Step = Callable[[], tuple[Tensor | None, Tensor]]
"""One forward + backward: the loss (None without one) and the gradient of the local logits."""


@dataclass(frozen=True)
class Row:
    """One contender. Times are medians over ``rounds`` of forward + backward, of the slowest rank."""

    section: str
    device: str
    world: int
    dtype: str
    N: int
    C: int
    loss: str
    contender: str
    gradient: str
    rounds: int
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    passes: int | None  # over the local logits
    local_GB_per_s: float | None  # passes * N * (C / world) * itemsize over the median
    wire_bytes_per_row: float  # that a rank sends, with ring collectives
    collectives: int
    speedup_over_loss_parallel: float | None
    speedup_over_all_gather: float | None


KEY = ("section", "device", "cpu", "isa", "world", "dtype", "N", "C", "loss", "contender", "gradient")


@dataclass
class Contender:
    loss: str
    name: str
    gradient: str
    passes: int | None
    step: Step
    seconds: list[float] = field(default_factory=list)
    wire: WireBytes | None = None


def contenders(logits: Tensor, target: Tensor, classes: int) -> list[Contender]:
    """The first of a loss is what the others are compared with. ``logits``: this rank's classes."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    width = logits.shape[1]

    def gathered() -> tuple[Tensor, Tensor]:
        whole = all_gather(logits.detach(), dist.group.WORLD).transpose(0, 1).reshape(len(target), classes)
        whole.requires_grad_()
        loss = F.cross_entropy(whole, target)
        (grad,) = torch.autograd.grad(loss, whole)
        return loss.detach(), grad[:, rank * width : (rank + 1) * width]

    def through_dtensor(compute: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
        x: Any = DTensor.from_local(logits.detach(), mesh, [Shard(1)]).requires_grad_()
        loss = compute(x)
        (grad,) = torch.autograd.grad(loss, x)
        return loss.full_tensor().detach(), grad.to_local()

    def torchs() -> tuple[Tensor, Tensor]:
        with loss_parallel():
            return through_dtensor(lambda x: F.cross_entropy(x, target))

    def ours(gradient: str, **options: Any) -> Step:
        def step() -> tuple[Tensor, Tensor]:
            x = logits.detach().requires_grad_()
            loss = longtail.vocab_parallel_cross_entropy(x, target, num_classes=classes, gradient=gradient, **options)
            (grad,) = torch.autograd.grad(loss, x)
            return loss.detach(), grad

        return step

    def sweeps() -> tuple[None, Tensor]:
        here = shards.local_target(target, rank * width, width, -100)
        stats = shards.accumulate(logits, here, SoftmaxOptions())
        return None, shards.apply(logits, here, stats, SoftmaxOptions(), inplace=False)

    # The paper's -1 moves the result by 1/C, which no check could tell from rounding; the work is the same.
    family: dict[str, Any] = {"focal_gamma": 2.0, "complement_gamma": -(classes - 1) / 100, "label_smoothing": 0.1}
    return [
        Contender("plain", "all-gather of the logits", "", None, gathered),
        Contender("plain", "loss_parallel", "", None, torchs),
        Contender("plain", "longtail", "backward", 3, ours("backward")),
        Contender("plain", "longtail", "forward", 3, ours("forward")),
        Contender("plain", "longtail DTensor", "backward", 3, lambda: through_dtensor(_dtensor_loss(target))),
        Contender("family", "longtail", "backward", 3, ours("backward", **family)),
        Contender("", "local sweeps alone", "", 3, sweeps),
    ]


def _dtensor_loss(target: Tensor) -> Callable[[Any], Any]:
    return lambda x: longtail.cross_entropy(x, target)


def compare(found: list[Contender], dtype: torch.dtype) -> None:
    """Checks loss and local gradient of every contender against the first of its loss; notes what it sends.

    Raises:
        Mismatch: they differ by more than ``measure.TOLERANCE``.
    """
    first: dict[str, tuple[Tensor, Tensor]] = {}
    for contender in found:
        contender.step()  # ranks agree on a configuration once
        with WireBytes(dist.get_world_size()) as contender.wire:
            loss, grad = contender.step()
        if loss is None:
            continue
        want_loss, want_grad = first.setdefault(contender.loss, (loss, grad.clone()))
        errors = {
            "loss": abs(loss.item() - want_loss.item()) / abs(want_loss.item()),
            "gradient": ((grad.double() - want_grad.double()).norm() / want_grad.double().norm()).item(),
        }
        for (what, error), bound in zip(errors.items(), TOLERANCE[dtype], strict=True):
            if not error <= bound:
                raise Mismatch(f"{contender.name} {contender.gradient}: {what} differs by {error:.2g} of it")


def time_all(found: list[Contender], rounds: int) -> None:
    """Fills the contenders' seconds: for each round those of the slowest rank."""
    order = random.Random(0)  # the same on every rank
    for _ in range(rounds):
        for contender in order.sample(found, len(found)):
            dist.barrier()
            start = time.perf_counter()
            result = contender.step()
            seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
            del result
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            contender.seconds.append(seconds.item())


def rows_of(found: list[Contender], shape: tuple[int, int], world: int, dtype: torch.dtype) -> list[Row]:
    quantiles = [results.quantiles(c.seconds) for c in found]
    medians = {(c.loss, c.name): q[1] for c, q in zip(found, quantiles, strict=True)}
    local = shape[0] * shape[1] // world * dtype.itemsize
    rows = []
    for contender, (p20, median, p80) in zip(found, quantiles, strict=True):
        assert contender.wire is not None
        assert median is not None
        plain = contender.loss == "plain"
        rows.append(
            Row(
                section="parallel",
                device="cpu",
                world=world,
                dtype=str(dtype).removeprefix("torch."),
                N=shape[0],
                C=shape[1],
                loss=contender.loss,
                contender=contender.name,
                gradient=contender.gradient,
                rounds=len(contender.seconds),
                median_ms=median,
                p20_ms=p20,
                p80_ms=p80,
                passes=contender.passes,
                local_GB_per_s=None if contender.passes is None else contender.passes * local / median / 1e6,
                wire_bytes_per_row=contender.wire.sent / shape[0],
                collectives=contender.wire.collectives,
                speedup_over_loss_parallel=results.ratio(medians["plain", "loss_parallel"], median) if plain else None,
                speedup_over_all_gather=(
                    results.ratio(medians["plain", "all-gather of the logits"], median) if plain else None
                ),
            )
        )
    return rows


def _rank(
    rank: int, world: int, port: int, shape: tuple[int, int], dtype: torch.dtype, rounds: int, output: Path
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(shape[1], (shape[0],), generator=generator)
    logits = torch.randn(shape[0], shape[1] // world, generator=generator.manual_seed(1 + rank)).to(dtype)
    found = contenders(logits, target, shape[1])
    compare(found, dtype)
    time_all(found, rounds)
    if rank == 0:
        results.write(output, rows_of(found, shape, world, dtype), KEY)
    dist.destroy_process_group()


def measure(shape: tuple[int, int], world: int, dtype: torch.dtype, rounds: int, output: Path) -> None:
    """Starts the ranks, and writes rows.

    Raises:
        ValueError: the ranks can not have equally many classes.
    """
    if shape[1] % world:
        raise ValueError(f"C is {shape[1]}, expected a multiple of the {world} ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    spawn(_rank, (world, port, shape, dtype, rounds, output), nprocs=world)


def add_options(parser: Parser) -> None:
    parser.add_argument("--shape", type=int, nargs=2, default=SHAPE, metavar=("N", "C"))
    parser.add_argument("--world", type=int, default=WORLD, help="ranks (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=ROUNDS, help="default: %(default)s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=results.csv_file, default=OUTPUT, help="the CSV")


def run(chosen: argparse.Namespace, _parser: Parser) -> None:
    measure(tuple(chosen.shape), chosen.world, getattr(torch, chosen.dtype), chosen.rounds, chosen.output)
    print(f"{'':34}{'ms':>9}{'passes':>8}{'wire B/row':>12}{'over loss_parallel':>20}{'over all-gather':>17}")
    for row in results.read(chosen.output):
        same = {"N": chosen.shape[0], "C": chosen.shape[1], "world": chosen.world, "dtype": chosen.dtype}
        if all(row[name] == str(value) for name, value in same.items()):
            name = " ".join(filter(None, (row["loss"], row["contender"], row["gradient"])))
            cells = (
                "median_ms",
                "passes",
                "wire_bytes_per_row",
                "speedup_over_loss_parallel",
                "speedup_over_all_gather",
            )
            widths = (9, 8, 12, 20, 17)
            print(f"{name:34}" + "".join(f"{row[c]:>{w}}" for c, w in zip(cells, widths, strict=True)))
