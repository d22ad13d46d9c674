"""How the benefit grows: quality by imbalance (experiment icd, cut), speed and memory by classes (growth_speed)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ...training import long_tailed_counts
from ...training.scores import scores_of_samples
from ..comparison import add_verdicts, columns_of
from ..methods import (
    COMPLEMENT_CROSS_ENTROPY,
    CROSS_ENTROPY,
    LDAM_DRW,
    LOGIT_ADJUSTMENT,
    SEESAW,
    Method,
    class_balanced_sigmoid_focal,
    class_balanced_softmax,
)
from ..output import Advance, Interrupted, Row, Value, with_provenance
from ..pool import train_all
from . import growth_speed, one_label
from .corpus import FEW, MANY, Split
from .settings import GROWTH_EPOCHS
from .training import Cut, Data, Task, cut, facts_of

EXPERIMENT = "icd"
LEAST = 20
"""Training texts that a class needs to be kept."""
FACTORS, QUICK_FACTORS = (1.0, 3.0, 10.0, 30.0, 100.0), (10.0,)
METHODS = (
    *(CROSS_ENTROPY, LOGIT_ADJUSTMENT, class_balanced_softmax(0.999), class_balanced_sigmoid_focal(0.999, 1.0)),
    *(COMPLEMENT_CROSS_ENTROPY, LDAM_DRW, SEESAW),
)
TESTED = ("balanced", "rarest_third")

Figures = dict[str, float]


class Job(NamedTuple):
    """One model to be trained."""

    task: Task
    factor: float | None  # None: as it is


class Plan(NamedTuple):
    """What to run."""

    seeds: int = 5
    epochs: int = GROWTH_EPOCHS
    jobs: int = 2
    factors: tuple[float | None, ...] = (*FACTORS, None)
    classes: tuple[int, ...] = growth_speed.CLASSES
    quick: bool = False

    def job(self, factor: float | None, seed: int, method: Method) -> Job:
        return Job(Task(EXPERIMENT, seed, method, self.epochs, self.quick), factor)

    def trainings(self) -> list[Job]:
        """A seed after the other, so that an interrupt leaves whole comparisons."""
        return [self.job(r, seed, m) for seed in range(self.seeds) for r in self.factors for m in METHODS]

    def units(self) -> int:
        """Of work, for a progress bar."""
        return len(self.trainings()) + growth_speed.units(self.classes, self.quick)


def make_plan(seeds: int | None = None, epochs: int | None = None, jobs: int = 2, quick: bool = False) -> Plan:
    """Of the options that were given."""
    plan = Plan(jobs=jobs)
    if quick:
        plan = plan._replace(
            seeds=2, epochs=1, factors=(*QUICK_FACTORS, None), classes=growth_speed.QUICK_CLASSES, quick=True
        )
    return plan._replace(seeds=seeds or plan.seeds, epochs=epochs or plan.epochs)


def profile(available: list[int], factor: float) -> list[int]:
    """Texts of each class, the most frequent first: exponential, in total as near as can be to factor 1's.

    Factor 1 takes as many of each class as the rarest has. That way factors differ in imbalance, hardly in the number
    of texts and of steps.

    Raises:
        ValueError: no such profile fits into the classes.
    """
    most, classes = max(available, default=0), len(available)
    profiles = (long_tailed_counts(n, classes, factor) for n in range(math.ceil(factor), most + 1))
    fitting = [p for p in profiles if all(want <= have for want, have in zip(p, available, strict=True))]
    if not fitting:
        raise ValueError(f"no profile of imbalance factor {factor:g} fits into {classes} classes of up to {most} texts")
    return min(fitting, key=lambda counts: abs(sum(counts) - classes * min(available)))


def imbalanced(of_seed: Cut, factor: float | None, seed: int) -> Cut:
    """The classes of at least ``LEAST`` training texts, the most frequent first, cut to a profile.

    Classes, their order and the test texts are the same for every factor; fewer texts of a class are some of more.
    """
    order = of_seed.counts.argsort(descending=True, stable=True)
    order = order[of_seed.counts[order] >= LEAST]
    available = of_seed.counts[order].tolist()
    wanted = available if factor is None else profile(available, factor)
    rank = torch.full_like(of_seed.counts, -1)
    rank[order] = torch.arange(order.numel())
    corpus, split = of_seed.data.corpus, of_seed.split
    target = rank[corpus.target]
    generator = torch.Generator().manual_seed(seed)
    shuffled = split.train[torch.randperm(split.train.numel(), generator=generator)]
    chosen = [shuffled[target[shuffled] == c][:count] for c, count in enumerate(wanted)]
    classes = [corpus.classes[i] for i in order.tolist()]
    return Cut(
        Data(corpus._replace(target=target, classes=classes, paths=None), of_seed.data.texts),
        Split(torch.cat(chosen).sort().values, split.test[target[split.test] >= 0]),
        torch.tensor(wanted),
    )


def check_profiles(plan: Plan) -> None:
    """Every cut that will be trained on.

    Raises:
        ValueError: a profile does not fit into the classes of a seed.
    """
    for seed in range(plan.seeds):
        of_seed = cut(plan.job(None, seed, CROSS_ENTROPY).task)
        for factor in plan.factors:
            imbalanced(of_seed, factor, seed)


def train(job: Job) -> Figures:
    """Shares in [0, 1]: balanced accuracy, that of the rarest third of the classes, accuracy on the training texts."""
    of_seed, method = imbalanced(cut(job.task), job.factor, job.task.seed), job.task.method
    model = one_label.fit(of_seed, job.task)
    correct = {}
    for name, rows in of_seed.split._asdict().items():
        _, decision = one_label.decisions(of_seed, method, model, rows)
        correct[name] = decision == of_seed.data.corpus.target[rows]
    scores = scores_of_samples(correct["test"], of_seed.test_target, of_seed.counts, MANY, FEW)
    return {
        "balanced": scores.balanced,
        "rarest_third": scores.per_class[2 * len(scores.per_class) // 3 :].nanmean().item(),
        "train": correct["train"].double().mean().item(),
    }


def run(plan: Plan, advance: Advance) -> list[Row]:
    """Both parts, first the one that may fail; a row for each factor and method, then one for each way of a step.

    Raises:
        UnequalLosses: two ways of computing a loss disagree.
        ValueError: a profile or a number of classes does not fit the data.
        Interrupted: by Ctrl-C, with a row for each model that was trained by then, and those of the speed.
    """
    check_profiles(plan)
    speed = growth_speed.run(plan.classes, plan.quick, advance)
    try:
        outcomes = train_all(plan.trainings(), train, plan.jobs, lambda job: advance(_name_of(job)), _row_of)
    except Interrupted as stop:
        raise Interrupted(_of_one_shape([*stop.rows, *speed]), stop.done) from None
    return _of_one_shape([*summarize(plan, outcomes), *speed])


def _name_of(job: Job) -> str:
    return f"seed {job.task.seed}, imbalance {_shown(job.factor)}, {job.task.method.name}"


def _shown(factor: float | None) -> Value:
    """As in the rows."""
    return "as it is" if factor is None else factor


def _row_of(job: Job, figures: Figures) -> Row:
    """One model of a run that was not finished."""
    task = job.task
    row: Row = {"experiment": "growth", "part": "quality", "method": task.method.name, "seed": task.seed}
    return with_provenance(row | {"imbalance_factor": _shown(job.factor), **figures}, threads=1)


def _of_one_shape(rows: list[Row]) -> list[Row]:
    """Rows of both parts with the columns of all: nothing where a column is not of a row's part."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return [columns | row for row in rows]


def summarize(plan: Plan, outcomes: dict[Job, Figures]) -> list[Row]:
    """A row for each factor and method, tested against cross-entropy; Holm's rule takes all rows as one family."""
    rows = []
    for factor in plan.factors:
        facts = _facts(plan, factor)
        control = [outcomes[plan.job(factor, seed, CROSS_ENTROPY)] for seed in range(plan.seeds)]
        for method in METHODS:
            by_seed = [outcomes[plan.job(factor, seed, method)] for seed in range(plan.seeds)]
            row: Row = {"experiment": "growth", "part": "quality", "method": method.name, **facts}
            rows.append(row | columns_of(by_seed, None if method == CROSS_ENTROPY else control, TESTED))
    add_verdicts(rows, TESTED, CROSS_ENTROPY.name)
    return [with_provenance(row, threads=1) for row in rows]


def _facts(plan: Plan, factor: float | None) -> Row:
    """Of the data and the training, as seed 0 has them."""
    task = plan.job(factor, 0, CROSS_ENTROPY).task
    first = imbalanced(cut(task), factor, task.seed)
    rarest = int(first.counts.min())
    return {"imbalance_factor": _shown(factor), **facts_of(task, first, plan.seeds), "rarest": rarest}
