"""A bag of n-grams on descriptions of diagnoses, in 1,918 categories: ``demo --data icd``, without its output.

Data, model and training are those of the experiment of that name (:mod:`.texts`), with fewer losses, seeds and epochs.
All losses of a seed start from the same weights and read the same texts in the same order.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..class_balance import class_counts
from ..training import LongTailScores
from ..training.scores import scores_of
from . import methods
from .demo_icd_cost import Cost, measure
from .methods import Method
from .output import Tell
from .pool import outcomes_of
from .texts import one_label
from .texts.corpus import FEW, MANY, Corpus, split
from .texts.settings import SETTINGS
from .texts.training import Task, cut, steps_of

NAME = "icd"
JOBS = 2

LOSSES: dict[str, Method] = {
    "cross-entropy": methods.CROSS_ENTROPY,
    "logit-adjustment": methods.LOGIT_ADJUSTMENT,
    "class-balanced-softmax": methods.class_balanced_softmax(0.999),
    "class-balanced-sigmoid-focal": methods.class_balanced_sigmoid_focal(0.999, 1.0),
    "complement-cross-entropy": methods.COMPLEMENT_CROSS_ENTROPY,
    "ldam-drw": methods.LDAM_DRW,
    "hierarchical-cross-entropy": methods.HIERARCHICAL,
}
"""The losses by name on the command line."""


class Plan(NamedTuple):
    """What to run."""

    losses: list[str]
    seeds: int = 2
    epochs: int = 5

    def task(self, seed: int, loss: str) -> Task:
        return Task(NAME, seed, LOSSES[loss], self.epochs)


class Texts(NamedTuple):
    """The texts of all seeds, each cut anew: how many of each class [C] are trained and tested on, seed by seed."""

    corpus: Corpus
    counts: list[Tensor]
    tested: list[Tensor]
    train_target: Tensor  # of the first seed, [N]


class Result(NamedTuple):
    """What one loss achieved: the scores of every seed, and what it costs."""

    loss: str
    scores: list[LongTailScores]
    cost: Cost


def load(plan: Plan) -> Texts:
    corpus = SETTINGS[NAME].load()
    splits = [split(corpus, SETTINGS[NAME].held_out, seed) for seed in range(plan.seeds)]
    count = functools.partial(class_counts, num_classes=len(corpus.classes))
    return Texts(
        corpus,
        [count(corpus.target[each.train]) for each in splits],
        [count(corpus.target[each.test]) for each in splits],
        corpus.target[splits[0].train],
    )


def train(task: Task) -> list[int]:
    """Correctly decided test texts of each class; the decision is the largest raw logit."""
    of_seed = cut(task)
    model = one_label.fit(of_seed, task)
    _, decision = one_label.decisions(of_seed, task.method, model, of_seed.split.test)
    target = of_seed.test_target
    right: list[int] = class_counts(target[decision == target], of_seed.counts.numel()).tolist()
    return right


def steps(plan: Plan, texts: Texts) -> int:
    """Of one training."""
    return steps_of(plan.task(0, plan.losses[0]), texts.train_target.numel())


def run(plan: Plan, texts: Texts, tell: Tell) -> list[Result]:
    """Measures what each loss costs, then trains and tests a model per seed and loss, in processes.

    An interrupt (Ctrl-C) ends it early: the results are then of the seeds that all losses have finished.

    Args:
        tell: a loss that is measured is one unit of work, a training as many as it has epochs.

    Raises:
        KeyboardInterrupt: interrupted before there was such a seed.
        AssertionError: a fused loss differs from the plain one.
    """
    costs = {}
    for done, loss in enumerate(plan.losses):
        tell(done, f"measuring {LOSSES[loss].family}")
        costs[loss] = measure(LOSSES[loss], texts.corpus.paths, texts.counts[0], texts.train_target)
    tell(len(plan.losses), "training")
    by_seed = _train_all(plan, texts, tell)
    return [Result(loss, [scores[loss] for scores in by_seed], costs[loss]) for loss in plan.losses]


def _train_all(plan: Plan, texts: Texts, tell: Tell) -> list[dict[str, LongTailScores]]:
    todo = [(seed, loss) for seed in range(plan.seeds) for loss in plan.losses]
    by_seed: list[dict[str, LongTailScores]] = [{} for _ in range(plan.seeds)]
    try:
        with contextlib.closing(outcomes_of([plan.task(*each) for each in todo], train, JOBS)) as outcomes:
            for number, ((seed, loss), right) in enumerate(zip(todo, outcomes, strict=True), 1):
                found = scores_of(texts.tested[seed], torch.tensor(right), texts.counts[seed], MANY, FEW)
                by_seed[seed][loss] = found
                done = len(plan.losses) + number * plan.epochs
                tell(done, f"training: done with seed {seed}, {LOSSES[loss].family}")
    except KeyboardInterrupt:
        by_seed = [scores for scores in by_seed if len(scores) == len(plan.losses)]
        if not by_seed:
            raise
    return by_seed
