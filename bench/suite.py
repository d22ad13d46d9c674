"""The sections of the benchmark: which problems, which contenders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import contenders
from .contenders import Contender, Problem
from .measure import Tell, measure
from .results import Row, rows_of

Shape = tuple[int, ...]
"""N, C, or N, C, H, W."""

SMALL: Shape = (128, 10)
"""Where the time is that of the calls."""

LARGE: Shape = (2048, 32768)
"""Where the goals for the CPU are set."""


def no_peers(_problem: Problem) -> list[Contender]:
    """For the CPU, where no other fused loss is known."""
    return []


@dataclass(frozen=True)
class Plan:
    """One section: every shape with every dtype, and for each all losses interleaved."""

    section: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    losses: tuple[str, ...]  # of contenders.LOSSES; "plain" first where it is one, to which speed-ups refer
    rounds: int  # at most
    device: str = "cpu"
    budget: float = 2.0  # seconds of timing for each contender
    compiled: bool = True  # torch.compile as a contender
    peers: Callable[[Problem], list[Contender]] = no_peers

    def problems(self) -> list[tuple[Shape, torch.dtype]]:
        return [(shape, dtype) for shape in self.shapes for dtype in self.dtypes]


CPU = Plan(
    section="cpu",
    shapes=((16384, 1000), LARGE, (512, 131072)),
    dtypes=(torch.float32, torch.bfloat16),
    losses=("plain", "family", "everything"),
    rounds=25,
)

OVERHEAD = Plan("overhead", (SMALL,), (torch.float32,), ("plain",), rounds=3000, compiled=False)

MEMORY = Plan("memory", (LARGE,), CPU.dtypes, CPU.losses, rounds=0, compiled=False)
"""Peak memory alone; the other sections measure it too."""


SIGMOID = Plan("sigmoid", ((4096, 8192),), CPU.dtypes, ("sigmoid_focal", "dense_focal"), rounds=25)

IMAGES = Plan("images", ((4, 19, 512, 512), (4, 1203, 256, 256)), (torch.float32,), ("focal",), rounds=25)
"""Segmentation; N in the rows counts pixels."""


def run(plan: Plan, tell: Tell) -> Iterator[list[Row]]:
    """Yields the rows of one problem after another.

    Raises:
        measure.Mismatch: two contenders disagree.
    """
    for shape, dtype in plan.problems():
        torch.compiler.reset()  # each problem is compiled for itself, none against the recompilation limit
        problem = Problem.make(shape, dtype, torch.device(plan.device))
        runners = [contenders.copy(problem)]
        for loss in plan.losses:
            runners += contenders.of_loss(loss, problem, plan.compiled)
        runners += plan.peers(problem)
        yield rows_of(
            plan.section, problem, measure(problem, runners, rounds=plan.rounds, budget=plan.budget, tell=tell)
        )
