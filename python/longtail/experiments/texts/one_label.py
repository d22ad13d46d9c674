"""Trains and tests a model of one label a text."""

from __future__ import annotations

import torch
from torch import Tensor

from ...class_balance import logit_adjustment
from ...hierarchical import Hierarchy
from ...training.scores import scores_of_samples
from ..methods import CROSS_ENTROPY, HIERARCHICAL, LDAM_SCALE, Classifier, Method, MethodTraining, selection
from .corpus import FEW, MANY, Corpus
from .model import adam_of, make_model
from .scores import by_octave, calibration_error
from .training import Cut, Outcome, Task, cut, in_batches, linear_decay, steps_of

CONTROL = CROSS_ENTROPY
TESTED = ("balanced", "few")

TRAIN_TEXTS = 20_000
"""So many training texts, evenly spaced, tell how well the model fits them."""


def methods(corpus: Corpus) -> list[Method]:
    return [*selection(), *([HIERARCHICAL] if corpus.paths else [])]


def train(task: Task) -> Outcome:
    of_seed = cut(task)
    return test(of_seed, task.method, fit(of_seed, task))


def fit(of_seed: Cut, task: Task) -> Classifier:
    """Every method of a seed starts from the same weights and reads the same texts in the same order."""
    setting, corpus, rows = task.setting, of_seed.data.corpus, of_seed.split.train
    model = make_model(of_seed.data.texts.buckets, setting.width, len(corpus.classes), task.seed)
    training = MethodTraining(
        *(task.method, model, of_seed.counts, task.epochs),
        *(linear_decay(setting.learning_rate, steps_of(task, rows.numel())), 0.0),
        adam_of(model),
        None if corpus.paths is None else Hierarchy.from_paths(corpus.paths),
    )
    generator = torch.Generator().manual_seed(task.seed)
    for epoch in range(task.epochs):
        training.start_epoch(epoch)
        for batch in rows[torch.randperm(rows.numel(), generator=generator)].split(setting.batch_size):
            training.step(of_seed.data.texts.bags(batch), corpus.target[batch])
            training.next_learning_rate()
    return model


def decisions(of_seed: Cut, method: Method, model: Classifier, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and class of each text: the largest raw logit, less log-priors where the method adjusts afterwards."""
    adjustment = logit_adjustment(of_seed.counts, method.post_hoc_tau) if method.post_hoc_tau else None

    def decide(logits: Tensor) -> tuple[Tensor, Tensor]:
        if adjustment is not None:
            logits = logits - adjustment
        if method.margin:
            logits = LDAM_SCALE * logits  # cosines
        largest, decision = (logits.sigmoid() if method.sigmoid else logits.softmax(1)).max(1)
        return largest, decision

    confidence, decision = map(torch.cat, zip(*in_batches(model, of_seed.data, rows, decide), strict=True))
    return confidence, decision


def test(of_seed: Cut, method: Method, model: Classifier) -> Outcome:
    corpus = of_seed.data.corpus
    confidence, decision = decisions(of_seed, method, model, of_seed.split.test)
    target = of_seed.test_target
    correct = decision == target
    scores = scores_of_samples(correct, target, of_seed.counts, MANY, FEW)
    trained = of_seed.split.train[:: -(-of_seed.split.train.numel() // TRAIN_TEXTS)]
    _, train_decisions = decisions(of_seed, method, model, trained)
    figures = {name: getattr(scores, name) for name in ("balanced", "few", "medium", "many", "overall")}
    figures["calibration_error"] = calibration_error(confidence, correct)
    figures["train"] = (train_decisions == corpus.target[trained]).double().mean().item()
    if corpus.paths is not None:
        figures["mistake_height"] = mistake_height(corpus.paths, decision[~correct], target[~correct])
    return Outcome(figures, by_octave(scores.per_class, of_seed.counts))


def mistake_height(paths: list[tuple[str, ...]], decision: Tensor, target: Tensor) -> float:
    """Of wrong decisions: mean height of the lowest node that has both classes below it (Bertinetto et al. 2020)."""
    heights = [
        sum(a != b for a, b in zip(paths[d], paths[t], strict=True))
        for d, t in zip(decision.tolist(), target.tolist(), strict=True)
    ]
    return sum(heights) / len(heights) if heights else float("nan")
