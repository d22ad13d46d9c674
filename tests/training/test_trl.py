"""TRL's trainers with our losses and row statistics: equal to TRL's own, and to the loop written by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_transformers import VOCABULARY, examples, tiny  # first: it skips where a package is missing
from tiny_trl import InOrder, grpo, sft

import longtail  # isort: skip
from longtail.integrations.transformers import set_loss_function  # isort: skip
from longtail.integrations.trl import SFTLossMixin, add_fused_lm_head  # isort: skip
from trainer_loops import assert_equal_models, plain_loop, reference_options


class Ours(SFTLossMixin, InOrder):
    pass


def assert_equal_to_theirs(model: Any, theirs: Any) -> None:
    """Theirs sums in float32."""
    for (name, got), want in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def numbers(log: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in log.items() if not name.endswith(("runtime", "per_second", "step_time"))}


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_plain_cross_entropy_trains_logs_and_evaluates_as_theirs(name: str, tmp_path: Path) -> None:
    """With gradient accumulation; of a mixture of experts the routers' loss is added."""
    model = tiny(name)
    theirs = copy.deepcopy(model)
    runs = [
        sft(InOrder, theirs, tmp_path, examples()),
        sft(Ours, model, tmp_path, examples(), loss=longtail.CrossEntropyLoss()),
    ]
    logs = []
    for run in runs:
        run.train()
        logs.append([*run.state.log_history, run.evaluate()])
    assert {"loss", "entropy", "mean_token_accuracy", "num_tokens"} <= logs[1][0].keys()
    assert ("aux_loss" in logs[1][0]) == (name == "MixtralForCausalLM")
    for want, got in zip(*logs, strict=True):
        assert numbers(got) == pytest.approx(numbers(want), rel=1e-5)
    assert (model.lm_head.weight - tiny(name).lm_head.weight).abs().max() > 0.01, "it has trained"
    assert_equal_to_theirs(model, theirs)


def test_every_option_of_the_family_trains_as_the_plain_loop(tmp_path: Path) -> None:
    model = tiny("LlamaForCausalLM")
    expected = copy.deepcopy(model)
    sft(Ours, model, tmp_path, examples(), loss=longtail.CrossEntropyLoss(**reference_options())).train()
    plain_loop(expected, reference_options())
    assert_equal_models(model, expected)


def test_compiled_and_copied(tmp_path: Path) -> None:
    """Compiled training equals the other, by the loss that is given; a copy of its model has weights of its own."""
    models = [tiny("LlamaForCausalLM"), tiny("LlamaForCausalLM")]
    torch._dynamo.utils.counters.clear()
    for model, settings in zip(models, ({}, {"torch_compile": True, "torch_compile_backend": "eager"}), strict=True):
        loss = longtail.CrossEntropyLoss(**reference_options())
        sft(Ours, model, tmp_path, examples(), {"max_steps": 1, **settings}, loss=loss).train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_equal_models(*models)
    copied = copy.deepcopy(models[0])
    torch.nn.init.zeros_(copied.lm_head.weight)
    assert (copied(input_ids=examples()[0]["input_ids"][None]).logits == 0).all()


@pytest.mark.parametrize("own", [False, True], ids=["plain", "its own"])
def test_evaluation(own: bool, tmp_path: Path) -> None:
    """Plain cross-entropy, of batches of one size each, unless another loss is given; the logits are the model's."""
    model, rows = tiny("LlamaForCausalLM"), [examples()[0], examples()[5]]
    loss = longtail.CrossEntropyLoss(focal_gamma=2.0)
    run = sft(Ours, model, tmp_path, rows, loss=loss, **({"evaluation_loss": loss} if own else {}))
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    logits = model(input_ids=ids).logits
    want = longtail.reference.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), focal_gamma=2.0 if own else 0.0
    )
    assert run.evaluate()["eval_loss"] == pytest.approx(want.item(), rel=1e-6)
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), pytest.warns(FutureWarning, match="return_outputs"):
        found, outputs = run.compute_loss(model, inputs, return_outputs=True)
    torch.testing.assert_close(outputs.logits, logits)
    assert found.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"loss_type": "dft"}, "loss_type is 'dft', expected 'nll': the loss is that of the argument loss"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, expected 0"),
    ],
    ids=["dft", "smoothing"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_another_loss_beside_ours(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        sft(Ours, tiny("LlamaForCausalLM"), tmp_path, examples(), settings, loss=longtail.CrossEntropyLoss())


def test_a_loss_set_on_the_model_is_told_what_to_use_instead(tmp_path: Path) -> None:
    model = tiny("LlamaForCausalLM")
    run = sft(InOrder, model, tmp_path, examples())
    text = (
        "InOrder computes a loss of its own, not that of the model: make it of longtail.integrations.trl.SFTLossMixin"
    )
    with set_loss_function(model, longtail.FocalLoss()), pytest.raises(ValueError, match=text):
        run.train()


def test_a_trainer_that_computes_another_loss_is_told(tmp_path: Path) -> None:
    class OwnLoss(InOrder):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
            return model(**inputs).loss

    class Both(SFTLossMixin, OwnLoss):
        pass

    run = sft(Both, tiny("LlamaForCausalLM"), tmp_path, examples(), loss=longtail.CrossEntropyLoss())
    with pytest.raises(RuntimeError, match="Both did not call its model with fused_lm_head=True"):
        run.train()


def test_grpo_numbers_equal_theirs(tmp_path: Path) -> None:
    """Log-probabilities and entropies of completions, of prompts and completions of several lengths, and gradients."""
    torch.manual_seed(1)
    run = grpo(tiny("LlamaForCausalLM"), tmp_path)
    ids = torch.randint(3, VOCABULARY, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, :2], mask[2, 7:], mask[3, 5:] = 0, 0, 0
    upstream = torch.randn(2, 4, 4, dtype=torch.float64)
    found = []
    for ours in (False, True):
        if ours:
            add_fused_lm_head(run.model, run.temperature)
        run.model.zero_grad()
        numbers = run._get_per_token_logps_and_entropies(run.model, ids, mask, 4, batch_size=3, compute_entropy=True)
        sum((x * y).sum() for x, y in zip(numbers, upstream, strict=False)).backward()
        found.append([*numbers[:2], *(p.grad for p in run.model.parameters())])
        assert numbers[2] is None
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-5)


def test_a_step_of_grpo_equals_theirs(tmp_path: Path) -> None:
    """With an entropy that is logged; completions are sampled by the model as it was."""
    models = []
    for ours in (False, True):
        models.append(tiny("LlamaForCausalLM"))
        run = grpo(models[-1], tmp_path, max_steps=1, learning_rate=0.1, optim="sgd", beta=0.0, seed=3)
        if ours:
            add_fused_lm_head(run.model, run.temperature)
        run.train()
    assert (models[1].lm_head.weight - tiny("LlamaForCausalLM").lm_head.weight).abs().max() > 1e-4, "it has trained"
    assert_equal_to_theirs(models[1], models[0])
