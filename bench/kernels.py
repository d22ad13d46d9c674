"""The CUDA operators alone, without autograd: their times, or one launch of each under a profiler.

With ``--old LIBRARY`` another build's operators of the same arguments run beside them in one process, in a new order
every round; results are compared first.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtail.experiments.command_line import Parser, positive_int
from longtail.experiments.output import print_table
from longtail.ops import cuda, operators
from longtail.options import SigmoidOptions, SoftmaxOptions

from .measure import TOLERANCE, CpuClock, CudaClock, Mismatch
from .suite import Shape

NAMESPACE, OLD = "longtail_cuda", "longtail_past"  # of one length: gpu_prepare renames a library's in its bytes

PROBLEMS: tuple[tuple[str, Shape, torch.dtype], ...] = (
    ("softmax", (32768, 1000), torch.bfloat16),  # a row by a warp
    ("softmax", (8192, 32768), torch.bfloat16),  # by a block, in place by a cluster
    ("softmax", (4096, 128256), torch.bfloat16),
    ("softmax", (4096, 128256), torch.float32),
    ("sigmoid", (4096, 8192), torch.bfloat16),
)
"""Family, N and C, dtype."""


class Call(NamedTuple):
    """An operator on one problem; ``run`` returns its results."""

    name: str
    run: Callable[[], tuple[Tensor, ...]]


def calls(family: str, shape: Shape, dtype: torch.dtype, device: str, namespace: Any) -> Iterator[Call]:
    """Loss, backward, and both in place, where every call writes gradients over the last one's."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape, generator=generator, device=device).to(dtype)
    target = torch.randint(shape[1], shape[:1], generator=generator, device=device)
    up, written = torch.randn(shape[0], generator=generator, device=device), logits.clone()
    tail: tuple[Any, ...]
    if family == "softmax":
        tail = tuple(SoftmaxOptions(complement_coefficient=-1 / shape[1]).checked(torch.float32))
        loss, backward, inplace = (getattr(namespace, f"softmax_loss{end}") for end in ("", "_backward", "_and_grad_"))
        stats = loss(logits, target, *tail)[1]
        yield Call("loss", lambda: loss(logits, target, *tail)[:1])
        yield Call("backward", lambda: (backward(up, logits, target, stats, *tail),))
        yield Call("in place", lambda: (inplace(up, written, target, *tail)[0], written))
    else:
        tail = tuple(SigmoidOptions(ignore_index=-100, alpha=0.25, gamma=2.0).checked(torch.float32))
        loss, backward, inplace = (getattr(namespace, f"sigmoid_loss{end}") for end in ("", "_backward", "_and_grad_"))
        yield Call("loss", lambda: (loss(logits, target, *tail, False),))
        yield Call("backward", lambda: (backward(up, logits, target, *tail),))
        yield Call("in place", lambda: (inplace(up, written, target, *tail, False), written))


def load_old(path: Path) -> Any:
    """The operators of another build, whose library was given the namespace ``OLD``."""
    schemas = torch.library.Library(OLD, "DEF")
    for name, schema in operators.SCHEMAS.items():
        schemas.define(name + schema)
    torch.ops.load_library(str(path.resolve()))
    found = getattr(torch.ops, OLD)
    found.library = schemas  # which forgets them when it is freed
    return found


def compare(name: str, results: list[tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    """Raises Mismatch where the second results are not the first."""
    for one, other in zip(*results, strict=True):
        error = ((other.double() - one.double()).norm() / one.double().norm()).item()
        if not error <= TOLERANCE[dtype][1]:
            raise Mismatch(f"{name}: the old and the new differ by {error:.2g} of the result")


def times(pairs: list[list[Call]], rounds: int, clock: Any) -> list[list[float]]:
    """Median milliseconds of each call of each pair; both of a pair run in every round."""
    seconds: list[list[list[float]]] = [[[] for _ in pair] for pair in pairs]
    order = random.Random(0)
    for _ in range(rounds):
        for pair, found in zip(pairs, seconds, strict=True):
            for i in order.sample(range(len(pair)), len(pair)):
                start = clock.start()
                results = pair[i].run()
                found[i].append(clock.seconds(start, clock.mark()))
                del results
    return [[1e3 * statistics.median(found) for found in of_pair] for of_pair in seconds]


def lines(
    problem: tuple[str, Shape, torch.dtype], device: str, namespaces: list[Any], rounds: int
) -> Iterator[tuple[str, ...]]:
    """What is printed of a problem; the copy of its logits comes first."""
    family, shape, dtype = problem
    builds = [list(calls(family, shape, dtype, device, namespace)) for namespace in namespaces]
    pairs = [list(pair) for pair in zip(*builds, strict=True)]
    for pair in pairs:
        results = [call.run() for call in pair]
        if len(pair) == 2:
            compare(f"{family} {shape} {pair[0].name}", results, dtype)
        del results
    source = torch.randn(shape, device=device).to(dtype)
    out = torch.empty_like(source)
    copy = Call("copy", lambda: (out.copy_(source),))
    measured = times([[copy], *pairs], rounds, CudaClock() if device == "cuda" else CpuClock())
    for name, found in zip(("copy", *(pair[0].name for pair in pairs)), measured, strict=True):
        old = (f"{found[1]:.4f}", f"{found[1] / found[0]:.3f}") if len(found) == 2 else ("", "")
        what = f"{family}, {'x'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}, {name}"
        yield what, f"{found[0]:.4f}", *old


def add_options(parser: Parser) -> None:
    parser.add_argument("--once", action="store_true", help="one launch of each, without times")
    parser.add_argument("--old", type=Path, metavar="LIBRARY", help="another build, renamed by gpu-session --prepare")
    parser.add_argument("--rounds", type=positive_int, default=50)


def run(arguments: argparse.Namespace, parser: Parser) -> None:
    reason = cuda.missing()
    if reason is not None:
        parser.exit(1, f"{parser.prog}: {reason}\n")
    namespaces = [torch.ops.longtail_cuda]
    if arguments.once:
        for problem in PROBLEMS:
            for call in calls(*problem, "cuda", namespaces[0]):
                call.run()
            torch.cuda.synchronize()
        print("one launch of each")
        return
    if arguments.old is not None:
        namespaces.append(load_old(arguments.old))
    found: list[tuple[str, ...]] = []
    for problem in PROBLEMS:
        found += lines(problem, "cuda", namespaces, arguments.rounds)
    print_table("operators", (("problem",), ("ms", "old, ms", "old / new")), found)
