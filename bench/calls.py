"""Functions and modules whose calls are timed on few logits, beside what one would call of torch."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

import longtail
from longtail.ops import dispatch

from . import eager
from .contenders import SIGMOID, Contender, Problem

BETA = 0.999


def others(problem: Problem) -> list[Contender]:
    """Modules, and the losses that the CSV names "balanced" and "dense_sigmoid", in the default gradient mode."""
    target, counts = problem.target, problem.counts
    dense = eager.one_hot(target, problem.logits)
    weight = longtail.effective_number_weight(counts, BETA).float()
    backend = dispatch.selected(problem.logits.device)
    weighted = nn.CrossEntropyLoss(weight, reduction="sum")

    def balanced(logits: Tensor) -> Tensor:
        made = (1 - BETA) / (1 - BETA ** counts.double())
        made = (made * (len(made) / made.sum())).float()
        return F.cross_entropy(logits, target, made, reduction="sum") / len(target)

    def torchs(loss: str, forward: Callable[[Tensor], Tensor], module: str = "") -> Contender:
        return Contender(loss, f"eager{module}", forward)

    def ours(loss: str, forward: Callable[[Tensor], Tensor], module: str = "") -> Contender:
        return Contender(loss, f"longtail{module}", forward, "backward", backend=backend)

    def with_target(module: nn.Module, target: Tensor = target) -> tuple[Callable[[Tensor], Tensor], str]:
        return lambda logits: module(logits, target), " module"

    return [
        torchs("plain", *with_target(nn.CrossEntropyLoss())),
        ours("plain", *with_target(longtail.CrossEntropyLoss())),
        ours("focal", *with_target(longtail.FocalLoss(gamma=2.0))),
        ours("sigmoid_focal", *with_target(longtail.SigmoidFocalLoss(reduction="mean", **SIGMOID["sigmoid_focal"]))),
        torchs("balanced", balanced),
        torchs("balanced", lambda logits: weighted(logits, target) / len(target), " module"),
        ours("balanced", lambda logits: longtail.class_balanced_loss(logits, target, counts, BETA)),
        ours("balanced", *with_target(longtail.ClassBalancedLoss(counts, BETA))),
        torchs("dense_sigmoid", lambda logits: F.binary_cross_entropy_with_logits(logits, dense)),
        torchs("dense_sigmoid", *with_target(nn.BCEWithLogitsLoss(), dense)),
        ours("dense_sigmoid", lambda logits: longtail.sigmoid_cross_entropy(logits, dense)),
        ours("dense_sigmoid", *with_target(longtail.SigmoidCrossEntropyLoss(), dense)),
    ]
