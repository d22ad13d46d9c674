"""Training steps written by hand, that those of Hugging Face's trainers are compared with."""

from __future__ import annotations

from typing import Any

import torch

from tiny_transformers import ACCUMULATION, BATCH, COUNTS, LEARNING_RATE, STEPS, examples  # first: it may skip

import longtail  # isort: skip
from tolerances import assert_close


def reference_options() -> dict[str, Any]:
    return {
        "weight": longtail.effective_number_weight(COUNTS, 0.9, dtype=torch.float64),
        "class_bias": longtail.logit_adjustment(COUNTS, dtype=torch.float64),
        "complement_gamma": -1.0,
    }


def plain_loop(model: Any, options: dict[str, Any]) -> None:
    """Each step on its micro-batches at once: the sum of the rows' losses over the number of labels that count."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    step = BATCH * ACCUMULATION
    for start in range(0, STEPS * step, step):
        together = examples()[start : start + step]
        ids = torch.stack([example["input_ids"] for example in together])
        target = torch.stack([example["labels"] for example in together])[:, 1:].flatten()
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        rows = longtail.reference.cross_entropy(logits, target, reduction="none", **options)
        optimizer.zero_grad()
        (rows.sum() / (target != -100).sum()).backward()
        optimizer.step()


def assert_equal_models(model: Any, expected: Any) -> None:
    for (name, got), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_close(got, want, what=name, factor=1000)  # parts of the models compute in float32
