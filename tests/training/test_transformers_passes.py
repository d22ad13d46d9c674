"""Deferred re-weighting in the Trainer counts passes over the data, whatever the Trainer knows of their length."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_transformers import (  # first: it skips where the package is missing
    BATCH,
    VOCABULARY,
    arguments,
    examples,
    tiny,
    transformers,
)

import longtail  # isort: skip
from longtail.integrations.transformers import ComputeLoss, DeferredReweightingCallback  # isort: skip

BATCHES = 2  # of a pass


class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Data without a length."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(examples()[: BATCHES * BATCH])


def epochs(folder: Path, resume: str | None = None, callbacks: Any = (), data: Any = None, **changes: Any) -> list[int]:
    """The epoch whose weights each step of a run of 9 steps had."""

    def schedule(epoch: float) -> Tensor:
        return torch.full((VOCABULARY,), 1.0 + epoch)

    loss = longtail.CrossEntropyLoss(weight=schedule(0))
    used: list[int] = []
    loss.register_forward_hook(lambda module, *_: used.append(int(module.weight[0]) - 1))
    options = {"max_steps": 9, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 4, **changes}
    run = transformers.Trainer(
        model=tiny("LlamaForCausalLM"),
        args=arguments(folder, **options),
        train_dataset=Stream() if data is None else data,
        compute_loss_func=ComputeLoss(loss, shift_labels=True),
        callbacks=[DeferredReweightingCallback(schedule, loss), *callbacks],
    )
    run.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
    return used


def test_data_without_a_length(tmp_path: Path) -> None:
    """Also where training resumes, and resumes again; the Trainer counts its own epochs from 0 each time."""
    assert epochs(tmp_path) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert epochs(tmp_path, "checkpoint-4") == [2, 2, 3, 3, 4]
    assert epochs(tmp_path, "checkpoint-8") == [4]


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_data_of_a_length_resume_as_the_trainer_counts(strategy: str, tmp_path: Path) -> None:
    data = examples()[: BATCHES * BATCH]
    assert epochs(tmp_path, data=data, save_strategy=strategy) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert epochs(tmp_path, "checkpoint-4", data=data) == [2, 2, 3, 3, 4]


def test_a_pass_that_is_cut_short(tmp_path: Path) -> None:
    class Short(transformers.TrainerCallback):
        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            control.should_epoch_stop = state.global_step in (1, 4)

    data = examples()[: BATCHES * BATCH]
    options = {"max_steps": -1, "num_train_epochs": 4, "save_strategy": "no"}
    assert epochs(tmp_path, callbacks=[Short()], data=data, **options) == [0, 1, 1, 2, 3, 3]
