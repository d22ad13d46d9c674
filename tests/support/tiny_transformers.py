"""Models of transformers, randomly initialised and tiny."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

VOCABULARY = 11


def tiny(name: str, **extra: Any) -> Any:
    """A randomly initialised model in float64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "Llama": lambda: transformers.LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes, **extra),
        "EuroBert": lambda: transformers.EuroBertConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes, **extra),
        "Bert": lambda: transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes, **extra
        ),
        "ViT": lambda: transformers.ViTConfig(image_size=4, patch_size=2, **sizes, **extra),
        "T5": lambda: transformers.T5Config(
            vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, **extra
        ),
    }[name.removesuffix("LMHeadModel").split("For")[0]]()
    return getattr(transformers, name)(config).double()
