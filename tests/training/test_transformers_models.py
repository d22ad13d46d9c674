"""Our losses on one model of transformers: where its own loss stood, and on no other model."""

from __future__ import annotations

import gc
import itertools
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_transformers import tiny  # first: it skips where the package is missing

import longtail  # isort: skip
from longtail.integrations.transformers import set_loss_function  # isort: skip
from tolerances import assert_close, assert_same

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
MODELS = {
    "LlamaForCausalLM": IDS,
    "BertLMHeadModel": IDS,
    "EuroBertForMaskedLM": IDS,
    "LlamaForSequenceClassification": torch.tensor([2, 0]),
    "LlamaForTokenClassification": IDS % 3,
    "ViTForImageClassification": torch.tensor([2, 0]),
}


def model_and_inputs(name: str) -> tuple[Any, dict[str, Tensor]]:
    extra = {"is_decoder": True} if name == "BertLMHeadModel" else {}
    if "Classification" in name:
        extra["num_labels"] = 3
    if name.startswith("ViT"):
        inputs = {"pixel_values": torch.randn(2, 3, 4, 4, dtype=torch.float64)}
    else:
        inputs = {"input_ids": IDS}
    return tiny(name, **extra), inputs


@pytest.mark.parametrize("name", MODELS)
def test_models_own_loss(name: str) -> None:
    """Where ours is asked for plain cross-entropy, value and gradients are the model's own, labels shifted alike."""
    model, inputs = model_and_inputs(name)
    model.eval()  # no dropout
    labels = MODELS[name].clone()
    if labels.dim() > 1:
        labels[0, :2] = -100

    def outcome() -> list[Tensor]:
        loss = model(**inputs, labels=labels).loss
        return [
            loss,
            *torch.autograd.grad(loss * 1.5, [p for p in model.parameters() if p.requires_grad], allow_unused=True),
        ]

    expected = outcome()
    used: list[int] = []
    ours = longtail.CrossEntropyLoss()
    ours.register_forward_hook(lambda *_: used.append(1))
    with set_loss_function(model, ours):
        got = outcome()
    assert used == [1]
    assert expected[0] > 0
    for a, b in zip(got, expected, strict=True):
        if b is not None:
            # Their losses are computed in float32.
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-7)


def test_loss_function_of_one_model_alone() -> None:
    model, other = tiny("LlamaForCausalLM"), tiny("LlamaForCausalLM")
    own = model.loss_function
    keys = list(model.state_dict())
    before = model(input_ids=IDS, labels=IDS).loss
    handle = set_loss_function(model, longtail.FocalLoss(gamma=2.0))
    assert list(model.state_dict()) == keys
    assert len(list(model.modules())) == len(list(other.modules()))
    focal = model(input_ids=IDS, labels=IDS).loss
    assert focal < before
    assert_same(other(input_ids=IDS, labels=IDS).loss, before)
    assert other.loss_function is own
    inner = set_loss_function(model, longtail.FocalLoss(gamma=4.0))
    assert model(input_ids=IDS, labels=IDS).loss < focal
    assert_same(
        pickle.loads(pickle.dumps(model))(input_ids=IDS, labels=IDS).loss, model(input_ids=IDS, labels=IDS).loss
    )
    inner.remove()
    assert_same(model(input_ids=IDS, labels=IDS).loss, focal)
    handle.remove()
    handle.remove()
    assert_same(model(input_ids=IDS, labels=IDS).loss, before)
    assert model.loss_function is own
    assert "_loss_function" not in vars(model)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_removed_in_any_order(order: tuple[int, ...]) -> None:
    """The loss of the model is that which was set last of those that are left."""
    model = tiny("LlamaForCausalLM")
    own = model(input_ids=IDS, labels=IDS).loss
    handles, losses = [], []
    for gamma in (1.0, 2.0, 4.0):
        handles.append(set_loss_function(model, longtail.FocalLoss(gamma=gamma)))
        losses.append(model(input_ids=IDS, labels=IDS).loss)
    left = list(range(3))
    for which in order:
        handles[which].remove()
        left.remove(which)
        assert_same(model(input_ids=IDS, labels=IDS).loss, losses[left[-1]] if left else own)
    assert "_loss_function" not in vars(model)


def test_a_removed_loss_is_not_kept_by_the_one_set_after_it() -> None:
    model = tiny("LlamaForCausalLM")
    loss = longtail.FocalLoss(gamma=2.0)
    known, handle = weakref.ref(loss), set_loss_function(model, loss)
    later = set_loss_function(model, longtail.CrossEntropyLoss())
    handle.remove()
    del loss, handle
    gc.collect()
    assert known() is None
    later.remove()


def test_a_loss_that_was_set_since_is_left_alone() -> None:
    model = tiny("LlamaForCausalLM")
    handle = set_loss_function(model, longtail.FocalLoss(gamma=2.0))
    model.loss_function = theirs = lambda *_, **__: torch.zeros(())
    handle.remove()
    assert model.loss_function is theirs


def test_loss_function_takes_what_models_pass() -> None:
    model = tiny("LlamaForCausalLM")
    logits = model(input_ids=IDS).logits.detach().flatten(0, 1)
    shifted = F.pad(IDS, (0, 1), value=-100)[:, 1:]
    with set_loss_function(model, longtail.CrossEntropyLoss()):
        summed = F.cross_entropy(logits, shifted.flatten(), reduction="sum")
        assert_close(model(input_ids=IDS, labels=IDS, num_items_in_batch=torch.tensor(5)).loss, summed / 5)
        given = model(input_ids=IDS, labels=IDS, shift_labels=IDS).loss
        assert_close(given, F.cross_entropy(logits, IDS.flatten()))
        ignoring = model(input_ids=IDS, labels=IDS, shift_labels=IDS, ignore_index=3).loss
        assert_close(ignoring, F.cross_entropy(logits, IDS.flatten(), ignore_index=3))


def test_models_that_ours_does_not_serve() -> None:
    loss = longtail.CrossEntropyLoss()
    with pytest.raises(TypeError, match=r"model is a Linear, expected a transformers\.PreTrainedModel"):
        set_loss_function(torch.nn.Linear(2, 2), loss)
    for name, remedy in (
        ("T5ForConditionalGeneration", r"use ComputeLoss\(loss, shift_labels=False\), and .* DataCollatorForSeq2Seq\("),
        ("BertForTokenClassification", "use ComputeLoss$"),
    ):
        with pytest.raises(ValueError, match=f"the forward of {name} has its loss written into it; {remedy}"):
            set_loss_function(tiny(name), loss)
    with pytest.raises(
        ValueError, match="the model's loss is ForQuestionAnsweringLoss, expected one of ForCausalLMLoss"
    ):
        set_loss_function(tiny("LlamaForQuestionAnswering"), loss)
    regression = tiny("ViTForImageClassification", num_labels=1)
    several = tiny("ViTForImageClassification", num_labels=3)
    pixels = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for model, labels in (
        (regression, torch.zeros(2)),
        (several, torch.zeros(2, 3)),
        (regression, torch.tensor([0, 0])),
    ):
        with set_loss_function(model, loss), pytest.raises(ValueError, match="regression or for several labels"):
            model(pixel_values=pixels, labels=labels)


def test_half_precision_logits_are_read_as_they_are() -> None:
    model = tiny("LlamaForCausalLM").to(torch.bfloat16)
    seen = []
    loss = longtail.CrossEntropyLoss()
    loss.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with set_loss_function(model, loss):
        value = model(input_ids=IDS, labels=IDS).loss
    assert seen == [torch.bfloat16]
    assert value.dtype == torch.float32
