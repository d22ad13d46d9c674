"""Models that answer to ``fused_lm_head=True`` are compiled, copied and hooked as others are; what calls may hold."""

from __future__ import annotations

import copy
import functools
import unittest.mock
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tiny_transformers import examples, tiny  # first: it skips where a package is missing

import longtail  # isort: skip
from longtail.integrations import lm_head  # isort: skip
from longtail.integrations.trl import TokenStatistics, add_fused_lm_head  # isort: skip
from tolerances import assert_close

IDS = torch.stack([row["input_ids"] for row in examples()[3:7]])
LABELS = torch.stack([row["labels"] for row in examples()[3:7]])
LOOSE = 1000.0  # parts of the models compute in float32


def llama(**head: Any) -> Any:
    model = tiny("LlamaForCausalLM")
    add_fused_lm_head(model, **head)
    return model


def answer(model: Any, **inputs: Any) -> TokenStatistics:
    return model(input_ids=IDS, **{"labels": LABELS, "fused_lm_head": True, **inputs})


def test_compiled() -> None:
    """In one graph; what answers to the keyword is compiled in TRL's trainer."""
    model = llama()
    found = torch.compile(model, backend="eager", fullgraph=True)(input_ids=IDS)
    assert torch.equal(found.logits, model(input_ids=IDS).logits)


def hooked(model: Any) -> None:
    """As accelerate sets its hooks."""
    own = model.forward
    model.forward = functools.update_wrapper(functools.partial(type(model).forward, model), own)


@pytest.mark.parametrize("before", [None, hooked, add_fused_lm_head], ids=["own", "hooked", "twice"])
def test_a_deep_copy_computes_with_its_own_weights(before: Callable[[Any], None] | None) -> None:
    model = tiny("LlamaForCausalLM")
    if before is not None:
        before(model)
    add_fused_lm_head(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    found = answer(copied)
    assert (copied(input_ids=IDS).logits == 0).all()
    assert_close(
        found.log_probs[found.label_mask].exp(),
        torch.tensor(1 / 11, dtype=torch.float64).expand(int(found.label_mask.sum())),
        factor=LOOSE,
    )
    assert (model(input_ids=IDS).logits != 0).any()


def test_a_deep_copy_of_a_model_with_a_function_for_its_forward() -> None:
    """The function may hold the original anywhere."""
    model = tiny("LlamaForCausalLM")
    own = model.forward
    model.forward = lambda **inputs: own(**inputs)
    add_fused_lm_head(model)
    model(input_ids=IDS)
    with pytest.raises(RuntimeError, match=r"a copy of a LlamaForCausalLM whose forward had been set to .*lambda"):
        copy.deepcopy(model)(input_ids=IDS)


@pytest.mark.parametrize(("asked", "configured"), [(None, True), (False, True), (True, False)])
def test_the_loss_of_routers_is_in_the_loss_where_it_is_in_the_models_own(asked: bool | None, configured: bool) -> None:
    model = tiny("MixtralForCausalLM", router_aux_loss_coef=0.5, output_router_logits=configured)
    inputs = {} if asked is None else {"output_router_logits": asked}
    want = model(input_ids=IDS, labels=LABELS, **inputs)
    add_fused_lm_head(model)
    found = answer(model, **inputs)
    assert (found.aux_loss is None) == (want.aux_loss is None) == (not (configured if asked is None else asked))
    assert found.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)
    found.loss.backward()
    assert (model.model.layers[0].mlp.gate.weight.grad != 0).any()


@pytest.mark.parametrize("gradient", ["forward", "inplace"])
@pytest.mark.parametrize("layer", [nn.Linear, type("Adapted", (nn.Linear,), {})], ids=["linear", "adapted"])
def test_a_loss_that_says_how_its_gradient_is_made(layer: type, gradient: str) -> None:
    """It is not read: there is no logit to overwrite."""
    model = tiny("LlamaForCausalLM")
    model.lm_head.__class__ = layer
    expected = copy.deepcopy(model)
    add_fused_lm_head(model, loss=longtail.CrossEntropyLoss(gradient=gradient))
    answer(model).loss.backward()
    logits = expected(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(logits, LABELS[:, 1:].flatten()).backward()
    assert_close(model.lm_head.weight.grad, expected.lm_head.weight.grad, factor=LOOSE)


def test_what_is_differentiable() -> None:
    own = answer(llama(loss=lambda stats: -stats.log_prob))
    ours = answer(llama(loss=longtail.CrossEntropyLoss()))
    assert [x.requires_grad for x in (own.log_probs, own.entropy, ours.log_probs, ours.entropy)] == [True] * 3 + [False]


def test_hooks_of_the_output_layer_take_effect() -> None:
    model = llama()
    want = answer(model).log_probs
    with model.lm_head.register_forward_hook(lambda _, __, logits: 2 * logits):
        assert not torch.equal(answer(model).log_probs, want)
    with model.lm_head.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],)):
        assert not torch.equal(answer(model).log_probs, want)
    assert torch.equal(answer(model).log_probs, want)


def test_hooks_of_activation_offloading_leave_the_logits_unmade(monkeypatch: pytest.MonkeyPatch) -> None:
    offloading = pytest.importorskip("trl.models.activation_offloading")
    layer = nn.Linear(2, 3)
    monkeypatch.setattr(offloading, "OffloadActivations", unittest.mock.MagicMock())  # needs an accelerator
    offloading.get_act_offloading_ctx_manager(nn.ModuleDict({"lm_head": layer}))
    assert layer._forward_hooks
    assert lm_head.is_plain(layer)


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_the_number_of_items_is_one_number(shape: tuple[int, ...]) -> None:
    model = llama()
    found = answer(model, num_items_in_batch=torch.full(shape, 5))
    assert found.loss.shape == ()
    assert_close(found.loss, -answer(model).log_probs.sum() / 5)


def test_the_answer_is_a_record_whatever_return_dict_says() -> None:
    assert_close(answer(llama(), return_dict=False).log_probs, answer(llama()).log_probs)


def test_refused_in_a_call() -> None:
    with pytest.raises(ValueError, match="labels are None, expected labels or shift_labels beside fused_lm_head=True"):
        llama()(input_ids=IDS, fused_lm_head=True)
    model = llama(loss=lambda stats: (-stats.log_prob, stats))
    with pytest.raises(TypeError, match=r"the loss returned a tuple, expected a tensor, \[\d+\]"):
        answer(model)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "zero": ("Llama", {"temperature": 0.0}, "temperature is 0.0, expected a positive number"),
    "negative": ("Llama", {"temperature": -1.0}, "temperature is -1.0"),
    "vector": (
        "Llama", {"loss": longtail.CrossEntropyLoss(weight=torch.ones(5))}, r"weight has shape \[5\], expected \[11\]"
    ),
    "evaluation": (
        "Llama", {"evaluation_loss": longtail.CrossEntropyLoss(class_bias=torch.ones(12))},
        r"class_bias has shape \[12\], expected \[11\]",
    ),
    "scale": (
        "Gemma2", {"loss": longtail.CrossEntropyLoss(scale=2.0)},
        "the model caps its logits at 0.1, and the loss has scale=2.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_once(case: str) -> None:
    """And nothing is drawn from the random number generator to find out."""
    name, options, text = REFUSED[case]
    model = tiny(f"{name}ForCausalLM")
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=text):
        add_fused_lm_head(model, **options)
    add_fused_lm_head(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cap_that_the_loss_is_given_later() -> None:
    model, loss = tiny("Gemma2ForCausalLM"), longtail.CrossEntropyLoss()
    add_fused_lm_head(model, loss=loss)
    loss.scale = 2.0
    with pytest.raises(ValueError, match=r"the model caps its logits at 0.1, and the loss has scale=2.0"):
        answer(model)


def test_a_model_without_weights_yet_leaves_the_class_vectors_where_they_are() -> None:
    loss = longtail.CrossEntropyLoss(class_bias=torch.arange(11.0))
    add_fused_lm_head(tiny("LlamaForCausalLM").to("meta"), loss=loss)
    assert torch.equal(loss.class_bias, torch.arange(11.0))
