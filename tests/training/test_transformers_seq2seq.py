"""An encoder-decoder model trains with our loss in the way that the error of ``set_loss_function`` names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny_transformers import (  # first: it skips where the package is missing
    VOCABULARY,
    arguments,
    tiny,
    transformers,
)

import longtail  # isort: skip
from longtail.integrations.transformers import ComputeLoss  # isort: skip

tokenizers = pytest.importorskip("tokenizers")


def test_an_encoder_decoder_model_trains_and_evaluates_as_with_its_own_loss(tmp_path: Path) -> None:
    words = tokenizers.models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="1")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), pad_token="0")
    rows = torch.randint(1, VOCABULARY, (6, 2, 5), generator=torch.Generator().manual_seed(0)).tolist()
    data = [{"input_ids": ids, "labels": labels[: 2 + i % 4]} for i, (ids, labels) in enumerate(rows)]
    before, trained = tiny("T5ForConditionalGeneration", decoder_start_token_id=0), []
    for compute in (None, ComputeLoss(longtail.CrossEntropyLoss(), shift_labels=False)):
        model = tiny("T5ForConditionalGeneration", decoder_start_token_id=0)
        run = transformers.Trainer(
            model=model,
            args=arguments(tmp_path, gradient_accumulation_steps=1),
            train_dataset=data,
            eval_dataset=data[:2],
            compute_loss_func=compute,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
        )
        run.train()
        trained.append((run.evaluate()["eval_loss"], list(model.parameters())))
    (own_loss, own), (our_loss, ours) = trained
    assert our_loss == pytest.approx(own_loss, rel=1e-6)
    assert (ours[0] - next(before.parameters())).abs().max() > 1e-3, "it has trained"
    for got, want in zip(ours, own, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # parts of the model compute in float32
