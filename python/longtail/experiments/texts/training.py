"""One model on one split of a corpus, by one method; the data are read once in a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...class_balance import class_counts
from ..output import Row
from .corpus import Corpus, Split, split, thinned
from .features import HashedTexts
from .settings import SETTINGS, Setting

TEST_BATCH = 1024


class Task(NamedTuple):
    """One model to be trained."""

    experiment: str
    seed: int
    method: Any  # of ..methods, or of .label_methods
    epochs: int
    quick: bool = False
    file: Path | None = None  # with the data, of an experiment that reads one

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.experiment]


class Outcome(NamedTuple):
    """Shares in [0, 1]."""

    figures: dict[str, float]
    by_count: dict[int, float]  # the score of the classes with 1, 2 to 3, 4 to 7, ... training samples


class Data(NamedTuple):
    """A corpus and its n-grams."""

    corpus: Corpus
    texts: HashedTexts


@functools.lru_cache(maxsize=1)
def load(experiment: str, quick: bool = False, file: Path | None = None) -> Data:
    setting = SETTINGS[experiment]
    corpus = setting.load(file) if file else setting.load()
    if quick:
        corpus = thinned(corpus, setting.quick)
    return Data(corpus, HashedTexts(corpus.texts, setting.ngrams))


class Cut(NamedTuple):
    """The data of a seed."""

    data: Data
    split: Split
    counts: Tensor  # training texts of each class, [C]

    @property
    def test_target(self) -> Tensor:
        return self.data.corpus.target[self.split.test]


def cut(task: Task) -> Cut:
    """The data of a task's seed.

    Raises:
        ValueError: nothing is left to test on, there is one class, or every training text has some label.
    """
    data = load(task.experiment, task.quick, task.file)
    corpus = data.corpus
    found = split(corpus, task.setting.held_out, task.seed)
    train, test, classes = found.train.numel(), found.test.numel(), len(corpus.classes)
    if not (train and test and classes > 1):
        raise ValueError(
            f"the data have {train} training and {test} test texts of {classes} classes, expected some of both, of "
            "at least 2 classes"
        )
    target = corpus.target[found.train]
    counts = target.sum(0) if corpus.several_labels else class_counts(target, classes)
    if int(counts.max()) == train:
        everywhere = corpus.classes[int(counts.argmax())]
        raise ValueError(f"all {train} training texts have the label {everywhere!r}, expected some without")
    return Cut(data, found, counts)


def facts_of(task: Task, data: Cut, seeds: int) -> Row:
    """Columns that say what was trained on, and how."""
    return {
        "data": data.data.corpus.source,
        "seeds": seeds,
        "epochs": task.epochs,
        "learning_rate": task.setting.learning_rate,
        "batch_size": task.setting.batch_size,
        "width": task.setting.width,
        "train_texts": data.split.train.numel(),
        "test_texts": data.split.test.numel(),
        "classes": data.counts.numel(),
        "largest": int(data.counts.max()),
    }


def steps_of(task: Task, samples: int) -> int:
    return task.epochs * -(-samples // task.setting.batch_size)


def linear_decay(learning_rate: float, steps: int) -> Callable[[int], float]:
    """From the learning rate of the first step to 0 after the last one."""
    return lambda step: learning_rate * max(0.0, 1 - step / steps)


@torch.no_grad()
def in_batches(
    model: Callable[[Any], Tensor], data: Data, rows: Tensor, of_logits: Callable[[Tensor], Any]
) -> list[Any]:
    """What ``of_logits`` makes of each batch's logits."""
    return [of_logits(model(data.texts.bags(batch))) for batch in rows.split(TEST_BATCH)]
