"""What models answer to TRL's ``fused_lm_head=True``: equal to plain PyTorch on their logits. Without TRL."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_transformers import examples, tiny  # first: it skips where a package is missing

import longtail  # isort: skip
from longtail.integrations.trl import TokenStatistics, add_fused_lm_head  # isort: skip
from tolerances import assert_close
from trainer_loops import reference_options

IDS = torch.stack([row["input_ids"] for row in examples()[3:7]])
LABELS = torch.stack([row["labels"] for row in examples()[3:7]])
COUNTED = LABELS[:, 1:] != -100
LOOSE = 1000.0  # parts of the models compute in float32


def answer(model: Any, **inputs: Any) -> TokenStatistics:
    return model(input_ids=IDS, **{"labels": LABELS, "fused_lm_head": True, **inputs})


def logits_of(model: Any) -> Tensor:
    """Of the tokens that have a label, (N, C)."""
    return model(input_ids=IDS).logits[:, :-1][COUNTED]


@pytest.mark.parametrize(
    "name", [f"{kind}ForCausalLM" for kind in ("Llama", "Granite", "Gemma2", "HyperCLOVAX", "Mixtral")]
)
def test_log_probabilities_and_entropies_are_those_of_the_logits(name: str) -> None:
    """Of models that scale and cap their logits too; by a random upstream gradient of every token."""
    model, temperature = tiny(name), 0.7
    expected = copy.deepcopy(model)
    add_fused_lm_head(model, temperature)
    found = answer(model)
    log_p = (logits_of(expected) / temperature).log_softmax(1)
    want = log_p.gather(1, LABELS[:, 1:][COUNTED][:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    upstream = torch.randn(2, *COUNTED.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for got, rows, what in zip((found.log_probs, found.entropy), want, ("log_probs", "entropy"), strict=True):
        assert_close(got[COUNTED], rows, what=what, factor=LOOSE)
        assert (got[~COUNTED] == 0).all()
    assert torch.equal(found.label_mask, COUNTED)
    assert torch.equal(found.is_top1[COUNTED], log_p.argmax(1) == LABELS[:, 1:][COUNTED])
    assert_close(found.loss, -want[0].mean(), factor=LOOSE)
    (upstream[0] * found.log_probs + upstream[1] * found.entropy).sum().backward()
    sum((x[COUNTED] * rows).sum() for x, rows in zip(upstream, want, strict=True)).backward()
    assert_equal_gradients(model, expected)


def assert_equal_gradients(model: Any, expected: Any) -> None:
    for (name, got), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_close(got.grad, want.grad, what=name, factor=LOOSE)


def bounded(stats: longtail.RowStatistics) -> Tensor:
    """A loss of one's own: generalised cross-entropy of q = 0.5, and a bonus of entropy."""
    return (1 - (0.5 * stats.log_prob).exp()) / 0.5 - 0.1 * stats.entropy


class Adapted(nn.Linear):
    """As an adapter: more than its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.25 * input[..., :1]


@pytest.mark.parametrize("layer", [nn.Linear, Adapted], ids=["linear", "adapted"])
@pytest.mark.parametrize("kind", ["options", "function"])
def test_a_loss_in_place_of_the_log_probabilities(kind: str, layer: type) -> None:
    """With gradients; without them the log-probabilities."""
    model = tiny("GraniteForCausalLM")
    weight = model.lm_head.weight
    model.lm_head = layer(*weight.shape[::-1], dtype=torch.float64)
    expected = copy.deepcopy(model)
    loss = longtail.CrossEntropyLoss(**reference_options()) if kind == "options" else bounded
    add_fused_lm_head(model, loss=loss)
    found = answer(model, num_items_in_batch=torch.tensor(5))
    logits, labels = logits_of(expected), LABELS[:, 1:][COUNTED]
    if kind == "options":
        rows = longtail.reference.cross_entropy(logits, labels, reduction="none", **reference_options())
    else:
        p = logits.softmax(1)
        rows = 2 * (1 - p.gather(1, labels[:, None])[:, 0].sqrt()) + 0.1 * (p * p.log()).sum(1)
    assert_close(-found.log_probs[COUNTED], rows, factor=LOOSE)
    assert_close(found.loss, rows.sum() / 5, factor=LOOSE)
    found.loss.backward()
    (rows.sum() / 5).backward()
    assert_equal_gradients(model, expected)
    with torch.no_grad():
        plain = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
        assert_close(answer(model).log_probs[COUNTED], plain, factor=LOOSE)


def test_labels_that_are_shifted_already_and_none_at_all() -> None:
    """A micro-batch without a label has a loss of 0, and gradients of 0."""
    model = tiny("LlamaForCausalLM")
    add_fused_lm_head(model)
    shifted = nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:]
    found = answer(model, labels=None, shift_labels=shifted)
    assert_close(found.log_probs[:, :-1], answer(model).log_probs)
    assert found.label_mask.shape == IDS.shape
    assert not found.label_mask[:, -1].any()
    nothing = answer(model, labels=torch.full_like(LABELS, -100)).loss
    nothing.backward()
    assert nothing == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_other_calls_are_as_before() -> None:
    model = tiny("LlamaForCausalLM")
    signature = inspect.signature(model.forward)
    before = model(input_ids=IDS, labels=LABELS)
    add_fused_lm_head(model)
    after = model(input_ids=IDS, labels=LABELS)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert inspect.signature(model.forward) == signature
    assert model.training
    assert model.generate(IDS[:, :3], max_new_tokens=2, do_sample=False).shape == (4, 5)


@pytest.mark.parametrize("float32", [False, True], ids=["autocast", "float32"])
def test_precision_of_the_projection(float32: bool) -> None:
    """bfloat16 under autocast, or float32; the numbers are float32, and as exact as the projection."""
    model = tiny("LlamaForCausalLM").float()
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)
    add_fused_lm_head(model, cast_lm_head_to_fp32=float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = answer(model)
        states = model.base_model(input_ids=IDS).last_hidden_state[:, :-1][COUNTED]
    dtype = torch.float32 if float32 else torch.bfloat16
    logits = states.to(dtype) @ model.lm_head.weight.to(dtype).T
    want = logits.double().log_softmax(1).gather(1, LABELS[:, 1:][COUNTED][:, None])[:, 0]
    assert found.log_probs.dtype == torch.float32
    assert_close(found.log_probs[COUNTED], want, factor=10.0)


def llama() -> Any:
    return tiny("LlamaForCausalLM")


def doubled() -> Any:
    """A model whose logits are not what its configuration says."""
    model = llama()
    forward = model.forward

    def twice(**inputs: Any) -> Any:
        outputs = forward(**inputs)
        outputs.logits = 2 * outputs.logits
        return outputs

    model.forward = twice
    return model


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "head": (
        lambda: llama().base_model, {}, TypeError, "LlamaModel has no output layer, expected a causal"
    ),
    "logits": (doubled, {}, ValueError, "are not those of its output layer with scale 1.0 and softcap None"),
    "module": (
        llama, {"loss": longtail.FocalLoss(gamma=2.0)}, TypeError,
        "the loss is a FocalLoss, expected a longtail.CrossEntropyLoss",
    ),
    "string": (llama, {"loss": "focal"}, TypeError, "the loss is a str, expected a longtail.CrossEntropyLoss"),
    "reduction": (
        llama, {"evaluation_loss": longtail.CrossEntropyLoss(reduction="sum")}, ValueError,
        "the loss has reduction='sum', expected reduction='mean'",
    ),
    "normalizer": (
        llama, {"loss": longtail.CrossEntropyLoss(normalizer="count")}, ValueError,
        "the loss has normalizer='count', expected normalizer=None",
    ),
    "temperature": (
        llama, {"loss": longtail.CrossEntropyLoss(), "temperature": 0.5}, ValueError,
        r"temperature is 0.5, expected 1.0 with a CrossEntropyLoss",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    model, options, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        add_fused_lm_head(model(), **options)


def test_a_function_that_returns_one_loss() -> None:
    model = llama()
    add_fused_lm_head(model, loss=lambda stats: -stats.log_prob.mean())
    with pytest.raises(ValueError, match=rf"the loss returned shape \[\], expected \[{COUNTED.sum()}\], one a token"):
        answer(model)
