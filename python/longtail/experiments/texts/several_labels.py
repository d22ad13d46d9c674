"""Trains and tests a model of several labels a text."""

from __future__ import annotations

import torch
from torch import Tensor

from ...training import init_sigmoid_bias_
from ...training.average_precision import average_precision
from ...training.scores import means_by_frequency
from ..methods import Classifier
from .corpus import FEW, MANY, Corpus
from .label_methods import BINARY, LabelMethod, label_methods
from .model import adam_of, make_model
from .scores import by_octave, calibration_error
from .training import Cut, Outcome, Task, cut, in_batches, linear_decay, steps_of

CONTROL = BINARY
TESTED = ("mean_average_precision", "few")
WEIGHT_DECAY = 0.01  # of the linear layer


def methods(_: Corpus) -> list[LabelMethod]:
    return label_methods()


def train(task: Task) -> Outcome:
    """Every method of a seed starts from the same weights and reads the same texts in the same order."""
    of_seed, setting = cut(task), task.setting
    corpus, rows = of_seed.data.corpus, of_seed.split.train
    model = make_model(of_seed.data.texts.buckets, setting.width, len(corpus.classes), task.seed)
    if task.method.start:
        init_sigmoid_bias_(model.head)
    optimizer = adam_of(model)([{"params": [*model.parameters()], "weight_decay": WEIGHT_DECAY}])
    rate = linear_decay(setting.learning_rate, steps_of(task, rows.numel()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    loss = task.method.make_loss(of_seed.counts, rows.numel())
    generator = torch.Generator().manual_seed(task.seed)
    for _ in range(task.epochs):
        for batch in rows[torch.randperm(rows.numel(), generator=generator)].split(setting.batch_size):
            optimizer.zero_grad()
            loss(model(of_seed.data.texts.bags(batch)), corpus.target[batch].float()).backward()
            optimizer.step()
            schedule.step()
    return test(of_seed, task.method, model)


def test(of_seed: Cut, method: LabelMethod, model: Classifier) -> Outcome:
    """Labels are ranked by their raw logits; those above 0 are predicted."""
    logits = torch.cat(in_batches(model, of_seed.data, of_seed.split.test, torch.Tensor.clone))
    target = of_seed.test_target
    precisions = average_precision(logits.T.contiguous(), target.T.to(torch.int8).contiguous())
    figures = {
        "mean_average_precision": precisions.nanmean().item(),
        **means_by_frequency(precisions, of_seed.counts, MANY, FEW),
        **f1_scores(logits > 0, target),
        "calibration_error": float("nan"),
    }
    if method.sigmoid:
        predicted = logits.sigmoid().flatten()
        figures["calibration_error"] = calibration_error(predicted, target.flatten())
    return Outcome(figures, by_octave(precisions, of_seed.counts))


def f1_scores(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """F1 of all decisions together, and its mean over the labels that the test has; bool [N, C] both."""
    hits, all_predicted, all_true = ((x.sum(0).double()) for x in (predicted & target, predicted, target))
    of_labels = 2 * hits / (all_predicted + all_true)
    return {
        "f1": (2 * hits.sum() / (all_predicted.sum() + all_true.sum())).item(),
        "macro_f1": of_labels[all_true > 0].mean().item(),
    }
