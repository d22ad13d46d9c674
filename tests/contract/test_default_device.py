"""Promise: what is made from counts and targets on the CPU stays there, whatever torch's default device is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import longtail
from accuracies import without_torchmetrics
from longtail.training import (
    ClassBalancedSampler,
    DeferredReweighting,
    MultiLabelSampler,
    StreamingClassFrequency,
    long_tailed_indices,
)
from tolerances import assert_same

COUNTS = [9, 5, 2]
TARGET = torch.tensor([0, 2, 1, 1, 0, 0])


def sampled(mode: Any, **options: Any) -> list[int]:
    return list(ClassBalancedSampler(TARGET, mode, **options))


def accuracy() -> torch.Tensor:
    with without_torchmetrics() as made:  # which takes seconds to import
        metric = made(COUNTS)
    metric.update(TARGET == 1, TARGET)
    return metric.compute().per_class


def frequency() -> torch.Tensor:
    stats = StreamingClassFrequency(3, device="cpu")
    stats.update(TARGET)
    return stats.logit_adjustment()


MADE: dict[str, Callable[[], Any]] = {
    "weights": lambda: longtail.effective_number_weight(COUNTS, 0.9),
    "module": lambda: longtail.ClassBalancedLoss(COUNTS, 0.9).weight,
    "schedule": lambda: DeferredReweighting(COUNTS, 0.9, epoch=1)(2),
    "counts of a list": lambda: longtail.class_counts(TARGET.tolist(), 3),
    "counts of an array": lambda: longtail.class_counts(TARGET.numpy(), 3),
    "counts of batches": lambda: longtail.class_counts(iter([TARGET]), 3),
    "counts of lists of labels": lambda: longtail.class_counts([[0], [2, 1], []], 3),
    "positive weights": lambda: longtail.positive_weight(COUNTS, 20, empty="clamp"),
    "rows with several labels": lambda: list(MultiLabelSampler([[0], [2, 1], []])),
    "several labels with replacement": lambda: list(
        MultiLabelSampler([[0], [2, 1], []], "square_root", replacement=True)
    ),
    "over-sampling": lambda: sampled("oversample"),
    "sampling with replacement": lambda: sampled("square_root", replacement=True),
    "subset": lambda: long_tailed_indices([0, 0, 1, 1], 2, generator=torch.Generator("cpu").manual_seed(0)),
    "accuracy": accuracy,
    "frequency": frequency,
}


@pytest.mark.parametrize("name", MADE)
def test_default_device(name: str) -> None:
    expected = MADE[name]()
    with torch.device("meta"):
        got = MADE[name]()
    if isinstance(expected, torch.Tensor):
        assert_same(got, expected)
    else:
        assert got == expected


def test_a_model_made_without_memory_has_its_class_weights() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"head": nn.Linear(4, 3), "loss": longtail.ClassBalancedLoss(COUNTS, 0.9)})
    assert model["head"].weight.is_meta
    assert_same(model["loss"].weight, longtail.effective_number_weight(COUNTS, 0.9))
