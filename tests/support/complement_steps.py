"""A small network, batches and optimizers for Complement Objective Training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from tolerances import assert_close, assert_same

CLASSES, FEATURES, ROWS, STEPS = 5, 6, 16, 4


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)
    ).to(dtype)  # fmt: skip


def batches(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(STEPS):
        input = torch.randn(ROWS, FEATURES, generator=generator, dtype=dtype) * 3
        target = torch.randint(CLASSES, (ROWS,), generator=generator)
        target[3] = -100
        made.append((input, target))
    return made


def complement(logits: Tensor, target: Tensor, balanced: bool = True) -> Tensor:
    """Minus the mean complement entropy, by the definition."""
    logits, target = logits.double()[target != -100], target[target != -100]
    others = logits[~F.one_hot(target, CLASSES).bool()].view(-1, CLASSES - 1)
    negative_entropy = (others.softmax(1) * others.log_softmax(1)).sum(1).mean()
    return negative_entropy / (CLASSES - 1) if balanced else negative_entropy


def optimizers(model: nn.Module) -> tuple[SGD, SGD]:
    return (
        SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
        SGD(model.parameters(), lr=0.03, momentum=0.8),
    )


def assert_equal_models(model: nn.Module, expected: nn.Module, factor: float = 10.0) -> None:
    """Parameters, and the running statistics of the batch normalisation."""
    for (name, got), (_, want) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        if got.is_floating_point():
            assert_close(got, want.double(), what=name, factor=factor)
        else:
            assert_same(got, want, name)


def run(training: Any) -> list[Tensor]:
    return [loss for input, target in batches() for loss in training.step(input, target)]
