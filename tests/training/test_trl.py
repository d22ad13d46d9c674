"""TRL's trainers with our losses and row statistics: equal to TRL's own, and to the loop written by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_transformers import BATCH, LEARNING_RATE, STEPS, VOCABULARY, examples, tiny, transformers

trl = pytest.importorskip("trl")
pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

import datasets  # isort: skip

import longtail  # isort: skip
from longtail.integrations.trl import SFTLossMixin, add_fused_lm_head  # isort: skip
from tolerances import assert_close

COUNTS = [90, 60, 40, 30, 20, 10, 8, 6, 4, 2, 1]
OFFLINE = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)


def tokenizer() -> Any:
    """One word a token."""
    words = {str(i): i for i in range(VOCABULARY)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="1"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="2", unk_token="1")


class InOrder(trl.SFTTrainer):
    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Ours(SFTLossMixin, InOrder):
    pass


def lists(rows: list[dict[str, Tensor]]) -> Any:
    return datasets.Dataset.from_list([{name: ids.tolist() for name, ids in row.items()} for row in rows])


def sft(kind: Any, model: Any, folder: Path, **extra: Any) -> Any:
    settings = trl.SFTConfig(**{
        **OFFLINE, "output_dir": str(folder), "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 2,
        "max_steps": STEPS, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "optim": "sgd",
        "max_grad_norm": 0.0, "logging_steps": 1, "gradient_checkpointing": False, **extra.pop("settings", {}),
    })  # fmt: skip
    data = lists(examples())
    return kind(model, settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer(), **extra)


def test_sft_step(tmp_path: Path) -> None:
    model = tiny("LlamaForCausalLM")
    theirs = copy.deepcopy(model)
    a = sft(InOrder, theirs, tmp_path)
    a.train()
    b = sft(Ours, model, tmp_path, loss=longtail.CrossEntropyLoss())
    b.train()
    for x, y in zip(a.state.log_history, b.state.log_history, strict=True):
        print(x)
        print(y)
    print(a.evaluate(), b.evaluate())
    for (name, p), q in zip(model.named_parameters(), theirs.parameters()):
        print(name, (p - q).abs().max())
