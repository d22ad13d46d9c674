"""TRL's trainers on tiny models, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_transformers import LOOP, VOCABULARY, transformers

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

SETTINGS = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
GRPO = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4, "temperature": 0.7}


def tokenizer() -> Any:
    """A token is a number."""
    words = {str(i): i for i in range(VOCABULARY)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="1"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="2", unk_token="1")


class InOrder(trl.SFTTrainer):
    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def sft(kind: Any, model: Any, folder: Path, rows: list[dict[str, Tensor]], settings: Any = (), **extra: Any) -> Any:
    """An SFTTrainer over rows with "input_ids" and "labels"."""
    data = datasets.Dataset.from_list([{name: ids.tolist() for name, ids in row.items()} for row in rows])
    options = {
        **SETTINGS,
        **LOOP,
        "logging_steps": 1,
        **dict(settings),
    }
    arguments = trl.SFTConfig(str(folder), **options)
    return kind(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer(), **extra)


def grpo(model: Any, folder: Path, **settings: Any) -> Any:
    """A GRPOTrainer that rewards different tokens."""
    data = datasets.Dataset.from_list([{"prompt": "3 4 5"}, {"prompt": "6 7"}])
    options = {**SETTINGS, **GRPO, **settings}
    return trl.GRPOTrainer(
        model,
        lambda completions, **_: [float(len(set(text))) for text in completions],
        args=trl.GRPOConfig(str(folder), **options),
        train_dataset=data,
        processing_class=tokenizer(),
    )
