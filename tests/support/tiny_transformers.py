"""Models of transformers, randomly initialised and tiny; sentences and arguments for its Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

VOCABULARY = 11
LENGTH, BATCH, ACCUMULATION, STEPS = 7, 2, 2, 3
LEARNING_RATE = 0.3
COUNTS = [90, 60, 40, 30, 20, 10, 8, 6, 4, 2, 1]


def tiny(name: str, **extra: Any) -> Any:
    """A randomly initialised model in float64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "Llama": lambda: transformers.LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes, **extra),
        "EuroBert": lambda: transformers.EuroBertConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes, **extra),
        "Granite": lambda: transformers.GraniteConfig(
            vocab_size=VOCABULARY, pad_token_id=0, logits_scaling=0.25, **sizes, **extra
        ),
        "Gemma2": lambda: transformers.Gemma2Config(
            vocab_size=VOCABULARY,
            pad_token_id=0,
            head_dim=4,
            num_key_value_heads=1,
            final_logit_softcapping=0.1,
            **sizes,
            **extra,
        ),
        "HyperCLOVAX": lambda: transformers.HyperCLOVAXConfig(
            vocab_size=VOCABULARY, pad_token_id=0, logits_scaling=3.0, **sizes, **extra
        ),
        "Mixtral": lambda: transformers.MixtralConfig(
            vocab_size=VOCABULARY,
            pad_token_id=0,
            num_local_experts=3,
            num_key_value_heads=1,
            experts_implementation="eager",
            **sizes,
            **extra,
        ),
        "Bert": lambda: transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes, **extra
        ),
        "ViT": lambda: transformers.ViTConfig(image_size=4, patch_size=2, **sizes, **extra),
        "T5": lambda: transformers.T5Config(
            vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, **extra
        ),
    }[name.removesuffix("LMHeadModel").split("For")[0]]()
    return getattr(transformers, name)(config).double()


def examples() -> list[dict[str, Tensor]]:
    """Prompts of different lengths are ignored, so that micro-batches hold different numbers of labels."""
    made = []
    for i in range(STEPS * ACCUMULATION * BATCH):
        ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[: i % 5] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


LOOP = {
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "max_steps": STEPS,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
}
"""Settings of trainers that do what a loop written by hand does."""


def arguments(folder: Path, **changes: Any) -> Any:
    options = {
        "output_dir": str(folder),
        **LOOP,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return transformers.TrainingArguments(**options)
