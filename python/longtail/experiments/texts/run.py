"""Every method on one corpus, over seeds, tested against the control."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ..comparison import add_verdicts, columns_of
from ..output import Advance, Row, with_provenance
from ..pool import train_all
from ..statistics import mean_and_std
from . import one_label, several_labels
from .corpus import FEW, MANY
from .settings import SETTINGS
from .training import Outcome, Task, cut, facts_of, load

KINDS: dict[str, ModuleType] = {"icd": one_label, "debtags": several_labels, "places": one_label}


class Plan(NamedTuple):
    """What to run."""

    experiment: str
    methods: list[Any]
    seeds: int
    epochs: int
    jobs: int
    quick: bool = False
    file: Path | None = None

    def task(self, seed: int, method: Any) -> Task:
        return Task(self.experiment, seed, method, self.epochs, self.quick, self.file)

    def tasks(self) -> list[Task]:
        return [self.task(seed, method) for seed in range(self.seeds) for method in self.methods]


def make_plan(
    experiment: str,
    seeds: int | None = None,
    epochs: int | None = None,
    jobs: int = 2,
    quick: bool = False,
    file: Path | None = None,
) -> Plan:
    """Of the options that were given.

    Raises:
        ValueError: the data are too few: see :func:`.training.cut`.
        OSError: they cannot be read.
    """
    corpus = load(experiment, quick, file).corpus
    epochs = epochs or (1 if quick else SETTINGS[experiment].epochs)
    methods = KINDS[experiment].methods(corpus)
    plan = Plan(experiment, methods, seeds or (2 if quick else 5), epochs, jobs, quick, file)
    for seed in range(plan.seeds):
        cut(plan.task(seed, methods[0]))
    return plan


def run(plan: Plan, advance: Advance) -> dict[Task, Outcome]:
    """Trains everything; errors as :func:`..pool.train_all`."""

    def tell(task: Task) -> None:
        advance(f"seed {task.seed}, {task.method.name}")

    return train_all(plan.tasks(), KINDS[plan.experiment].train, plan.jobs, tell, _row_of)


def _row_of(task: Task, outcome: Outcome) -> Row:
    """One model of a run that was not finished."""
    row: Row = {"experiment": task.experiment, "seed": task.seed, "method": task.method.name, "epochs": task.epochs}
    return with_provenance(row | outcome.figures, threads=1)


def summarize(plan: Plan, outcomes: dict[Task, Outcome]) -> list[Row]:
    """A row for each method: means and spreads over the seeds, and paired tests against the control, by Holm's rule."""
    kind, facts = KINDS[plan.experiment], _facts(plan)
    control = [outcomes[plan.task(seed, kind.CONTROL)].figures for seed in range(plan.seeds)]
    rows = []
    for method in plan.methods:
        by_seed = [outcomes[plan.task(seed, method)] for seed in range(plan.seeds)]
        row: Row = {"experiment": plan.experiment, "method": method.name, **facts}
        against = None if method == kind.CONTROL else control
        row |= columns_of([outcome.figures for outcome in by_seed], against, kind.TESTED)
        rows.append(row | _curve(by_seed))
    add_verdicts(rows, kind.TESTED, kind.CONTROL.name)
    return [with_provenance(row, threads=1) for row in rows]


def _facts(plan: Plan) -> Row:
    """Of the data and the training, as seed 0 has them."""
    task = plan.task(0, plan.methods[0])
    first = cut(task)
    many, few = int((first.counts > MANY).sum()), int((first.counts < FEW).sum())
    return {**facts_of(task, first, plan.seeds), "many_classes": many, "few_classes": few}


def _curve(by_seed: list[Outcome]) -> Row:
    """The score by training samples: lower ends of the octaves that every seed has, means, deviations."""
    shared = [count for count in by_seed[0].by_count if all(count in outcome.by_count for outcome in by_seed)]
    figures = [mean_and_std([outcome.by_count[count] for outcome in by_seed]) for count in shared]
    return {
        "octaves": " ".join(map(str, shared)),
        "octave_means": " ".join(f"{mean:.4f}" for mean, _ in figures),
        "octave_stds": " ".join(f"{std:.4f}" for _, std in figures if not math.isnan(std)),
    }
