"""The sections of the benchmark: which problems, which contenders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import calls, contenders, multi_label
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


class Case(NamedTuple):
    """One problem of a plan."""

    shape: Shape
    dtype: torch.dtype
    layout: str
    threads: int


def thread_counts(most: int) -> list[int]:
    """1, 2, 4 and so on, and all."""
    return [*(1 << i for i in range((most - 1).bit_length())), most]


@dataclass(frozen=True)
class Plan:
    """One section: every shape with every dtype and layout, and for each all losses interleaved."""

    section: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    losses: tuple[str, ...]  # of contenders.LOSSES; "plain" first where it is one, to which speed-ups refer
    rounds: int  # at most
    device: str = "cpu"
    budget: float = 2.0  # seconds of timing for each contender
    compiled: bool = True  # torch.compile as a contender
    peers: Callable[[Problem], list[Contender]] = no_peers
    layouts: tuple[str, ...] = ("contiguous",)  # of contenders.LAYOUTS
    times_eager: bool = True  # else eager PyTorch is only compared with
    scales: bool = False  # from one thread to all
    labels: bool = False  # several of each row

    def problems(self) -> list[Case]:
        available = torch.get_num_threads()
        return [
            Case(shape, dtype, layout, threads)
            for threads in (thread_counts(available) if self.scales else (available,))
            for shape in self.shapes
            for layout in self.layouts
            for dtype in self.dtypes
        ]

    def problem(self, case: Case) -> Problem:
        """The data of one of :meth:`problems`."""
        device = torch.device(self.device)
        if self.labels:
            return Problem.of_labels(case.shape, case.dtype, device)
        return Problem.make(case.shape, case.dtype, device, case.layout)

    def contenders(self, problem: Problem) -> list[Contender]:
        found = [contenders.copy(problem)]
        for loss in self.losses:
            found += contenders.of_loss(loss, problem, self.compiled)
        found += self.peers(problem)
        return [dataclasses.replace(x, timed=False) if x.name == "eager" and not self.times_eager else x for x in found]


CPU = Plan(
    section="cpu",
    shapes=((16384, 1000), LARGE, (512, 131072)),
    dtypes=(torch.float32, torch.bfloat16),
    losses=("plain", "family", "everything"),
    rounds=25,
)

OVERHEAD = Plan(
    section="overhead",
    shapes=(SMALL,),
    dtypes=(torch.float32,),
    losses=("plain", "focal", "sigmoid_focal"),
    rounds=3000,
    compiled=False,
    peers=calls.others,
)

MEMORY = Plan("memory", (LARGE,), CPU.dtypes, CPU.losses, rounds=0, compiled=False)
"""Peak memory alone; the other sections measure it too."""


SIGMOID = Plan("sigmoid", ((4096, 8192),), CPU.dtypes, ("sigmoid_focal", "dense_focal"), rounds=25)

MULTI_LABEL = Plan(
    section="multi_label",
    shapes=((4096, 8192),),
    dtypes=CPU.dtypes,
    losses=("multi_label_focal", "asymmetric", "distribution_balanced", "zlpr", "two_way"),
    rounds=25,
    peers=multi_label.peers,
    labels=True,
)
"""Several labels a row; sigmoid focal loss is what the others are measured by."""

SOFT = Plan("soft", ((4096, 8192), (16384, 1000), (4096, 10)), CPU.dtypes, ("soft",), rounds=25)
"""Class probabilities."""

STATISTICS = Plan("statistics", (LARGE,), CPU.dtypes, ("plain", "statistics"), rounds=25)
"""What any loss of a row costs, beside our own cross-entropy."""

TAIL = Plan(
    section="tail",
    shapes=(LARGE,),
    dtypes=CPU.dtypes,
    losses=("plain", "vector_scaling", "immax", "seesaw", "hierarchical", "hierarchical_shuffled"),
    rounds=25,
)
"""The losses for long tails and trees, beside our own cross-entropy."""

IMAGES = Plan("images", ((4, 19, 512, 512), (4, 1203, 256, 256)), (torch.float32,), ("focal",), rounds=25)
"""Segmentation; N in the rows counts pixels."""

FEW_IMAGES = Plan(
    section="few-images",
    shapes=tuple((4, classes, 256, 256) for classes in (2, 3, 4, 8, 12, 19, 21)),
    dtypes=CPU.dtypes,
    losses=("plain", "focal"),
    rounds=25,
    budget=0.2,
    compiled=False,
    layouts=tuple(contenders.LAYOUTS),
)

FEW_ROWS = dataclasses.replace(
    FEW_IMAGES,
    section="few-rows",
    shapes=tuple((3 * 2**20 // classes, classes) for classes in (2, 3, 4, 8, 12, 19, 32, 64)),
    layouts=("contiguous",),
)

THREADS = Plan(
    section="threads",
    shapes=(LARGE, (1, 2**22), (2, 2**22)),
    dtypes=(torch.float32,),
    losses=("family",),
    rounds=25,
    budget=1.0,
    compiled=False,
    times_eager=False,
    scales=True,
)
"""Many rows, and fewer rows than threads."""

PAGES = Plan("pages", (LARGE,), (torch.float32,), ("family",), rounds=25, compiled=False, times_eager=False)
"""Run several times over by pages.py, in processes whose gradients get their memory in different ways."""


def run(plan: Plan, tell: Tell) -> Iterator[list[Row]]:
    """Yields the rows of one problem after another.

    Raises:
        measure.Mismatch: two contenders disagree.
    """
    available = torch.get_num_threads()
    try:
        for case in plan.problems():
            torch.compiler.reset()  # each problem is compiled for itself, none against the recompilation limit
            torch.set_num_threads(case.threads)
            problem = plan.problem(case)
            timings = measure(problem, plan.contenders(problem), rounds=plan.rounds, budget=plan.budget, tell=tell)
            yield rows_of(plan.section, problem, timings)
    finally:
        torch.set_num_threads(available)
