"""Our losses in the Hugging Face Trainer: equal to the loop written by hand."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_transformers import (  # first: it skips where the package is missing
    ACCUMULATION,
    COUNTS,
    LENGTH,
    STEPS,
    VOCABULARY,
    arguments,
    examples,
    tiny,
    transformers,
)

import longtail  # isort: skip
from longtail.integrations.transformers import (  # isort: skip
    ComputeLoss,
    DeferredReweightingCallback,
    set_loss_function,
)
from longtail.training import ClassBalancedSampler, DeferredReweighting
from tolerances import assert_close, assert_same
from trainer_loops import assert_equal_models, plain_loop, reference_options


def trainer(model: Any, folder: Path, data: list[Any], compute: ComputeLoss | None = None, **changes: Any) -> Any:
    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(data)

    callbacks = changes.pop("callbacks", None)
    options = arguments(folder, **changes)
    return InOrder(model=model, args=options, train_dataset=data, compute_loss_func=compute, callbacks=callbacks)


@pytest.mark.parametrize("options", [{}, reference_options()], ids=["plain", "class options"])
@pytest.mark.parametrize("way", ["compute_loss_func", "loss_function", "partial"])
def test_trainer_with_gradient_accumulation_equals_the_plain_loop(
    tmp_path: Path, way: str, options: dict[str, Any]
) -> None:
    model = tiny("LlamaForCausalLM")
    expected = copy.deepcopy(model)
    loss: Any = longtail.CrossEntropyLoss(**options)
    if way == "partial":
        loss = functools.partial(longtail.cross_entropy, **options)
    if way == "loss_function":
        with set_loss_function(model, loss):
            trainer(model, tmp_path, examples()).train()
    else:
        trainer(model, tmp_path, examples(), ComputeLoss(loss, shift_labels=True)).train()
    plain_loop(expected, options)
    assert (model.lm_head.weight - tiny("LlamaForCausalLM").lm_head.weight).abs().max() > 0.01, "it has trained"
    assert_equal_models(model, expected)


@pytest.mark.parametrize("way", ["compute_loss_func", "loss_function"])
@pytest.mark.parametrize("own", [False, True], ids=["plain", "its own"])
def test_trainer_evaluates(tmp_path: Path, own: bool, way: str) -> None:
    """Plain cross-entropy of the whole set, from batches of one size each, unless another loss is given.

    The last prediction of a row has no label.
    """
    model, data = tiny("LlamaForCausalLM"), [{**examples()[0]}, {**examples()[5]}]
    loss = longtail.FocalLoss(gamma=2.0)
    choice = {"evaluation_loss": loss} if own else {}
    if way == "compute_loss_func":
        got = trainer(model, tmp_path, data, ComputeLoss(loss, shift_labels=True, **choice)).evaluate(data)
    else:
        with set_loss_function(model, loss, **choice):
            got = trainer(model, tmp_path, data).evaluate(data)
    logits = model(input_ids=torch.stack([row["input_ids"] for row in data])).logits[:, :-1].flatten(0, 1)
    target = torch.stack([row["labels"] for row in data])[:, 1:].flatten()
    want = longtail.reference.cross_entropy(logits, target, focal_gamma=2.0 if own else 0.0)
    assert got["eval_loss"] == pytest.approx(want.item(), rel=1e-6)


class OwnLoss(transformers.Trainer):
    """As TRL's SFTTrainer: the model's logits, and a loss of its own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"])
        loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class TwoForwards(transformers.Trainer):
    """As consistency losses: another forward, without labels, beside that of the model's loss."""

    first = True  # the one with labels

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        if self.first:
            outputs = model(**inputs)
            other = model(input_ids=inputs["input_ids"])
            loss = outputs.loss + 0.1 * F.mse_loss(outputs.logits, other.logits)
        else:
            other = model(input_ids=inputs["input_ids"])
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
            loss = loss + 0.1 * F.mse_loss(outputs.logits, other.logits)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("first", [True, False], ids=["labels first", "labels last"])
def test_a_trainer_with_another_forward(first: bool, tmp_path: Path) -> None:
    model, data = tiny("LlamaForCausalLM"), examples()
    with set_loss_function(model, longtail.FocalLoss(gamma=2.0)):
        run = TwoForwards(model=model, args=arguments(tmp_path), train_dataset=data, eval_dataset=data)
        run.first = first
        run.train()
        run.evaluate()


def fused_forward(model: Any) -> None:
    """The newer SFTTrainer's way: the labels go in, and a loss comes out that is not the model's loss function."""
    forward = model.forward

    def fused(input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        outputs = forward(input_ids=input_ids)
        if labels is not None:
            outputs.loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return outputs

    model.forward = fused


UNUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "smoothing": (r"\(its label_smoothing_factor is 0.1\).* label_smoothing=0.1 to the loss", {}),
    "own": (r"OwnLoss computes a loss of its own, not that of the model: pass compute_loss_func=ComputeLoss\(loss", {}),
    "fused": (r"Trainer computes a loss of its own, not that of the model: pass compute_loss_func=", {}),
    "function": (r"Trainer computes a loss of its own", {"compute_loss_func": lambda *_, **__: torch.zeros(())}),
}


@pytest.mark.parametrize("evaluate", [False, True], ids=["train", "evaluate"])
@pytest.mark.parametrize("way", UNUSED)
def test_a_loss_function_that_the_trainer_does_not_use(way: str, evaluate: bool, tmp_path: Path) -> None:
    model, data = tiny("LlamaForCausalLM"), examples()
    message, given = UNUSED[way]
    handle = set_loss_function(model, longtail.FocalLoss(gamma=2.0))
    model(input_ids=data[0]["input_ids"][None])  # logits alone, outside of a trainer
    if way == "fused":
        fused_forward(model)
    first = {"max_steps": 1, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": len(data)}  # seen at once
    if way == "own":
        first = {"max_steps": 2, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": len(data) // 2}
    options = arguments(tmp_path, **first, label_smoothing_factor=0.1 if way == "smoothing" else 0.0)
    kind = OwnLoss if way == "own" else transformers.Trainer
    run = kind(model=model, args=options, train_dataset=data, eval_dataset=data, **given)
    with pytest.raises(ValueError, match=message):
        run.evaluate() if evaluate else run.train()
    assert run.predict([{"input_ids": data[0]["input_ids"]}]).predictions.shape == (1, LENGTH, VOCABULARY)
    handle.remove()
    if way != "function":
        run.evaluate() if evaluate else run.train()


@pytest.mark.parametrize("evaluate", [False, True], ids=["train", "evaluate"])
def test_label_smoothing_beside_compute_loss_is_refused(evaluate: bool, tmp_path: Path) -> None:
    compute = ComputeLoss(longtail.CrossEntropyLoss(), shift_labels=True)
    run = trainer(tiny("LlamaForCausalLM"), tmp_path, examples(), compute, label_smoothing_factor=0.2)
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0.2, expected 0: .*Give label_smoothing=0.2 to"):
        run.evaluate(examples()) if evaluate else run.train()


def test_label_smoothing_of_the_loss_is_the_trainers(tmp_path: Path) -> None:
    """The remedy that the errors name."""
    expected, model = tiny("LlamaForCausalLM"), tiny("LlamaForCausalLM")
    trainer(expected, tmp_path, examples(), label_smoothing_factor=0.2).train()
    with set_loss_function(model, longtail.CrossEntropyLoss(label_smoothing=0.2)):
        trainer(model, tmp_path, examples()).train()
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # theirs sums in float32


def test_compute_loss_of_sequences() -> None:
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, -100, 1, 1])
    weight = torch.tensor([1.0, 2.0, 3.0])
    compute = ComputeLoss(longtail.CrossEntropyLoss(weight=weight), shift_labels=False)
    expected = F.cross_entropy(logits, labels, weight.double())
    for outputs in ({"logits": logits}, (logits, "hidden states")):
        assert_close(compute(outputs, labels), expected)
    summed = F.cross_entropy(logits, labels, weight.double(), reduction="sum")
    for items in (7, 7.0, torch.tensor(7), torch.tensor([[7], [7]])):
        assert_close(compute((logits,), labels, items), summed / 7)
    sigmoid = longtail.ClassBalancedLoss([5, 4, 1], 0.9, "sigmoid")
    rows = longtail.class_balanced_loss(logits, labels, [5, 4, 1], 0.9, "sigmoid", reduction="sum")
    assert_close(ComputeLoss(sigmoid, shift_labels=False)((logits,), labels, 7), rows / 7)


def test_wrong_arguments_of_compute_loss() -> None:
    compute = ComputeLoss(longtail.CrossEntropyLoss(), shift_labels=False)
    with pytest.raises(ValueError, match='labels are None, expected inputs with "labels"'):
        compute((torch.randn(2, 3),), None)
    with pytest.raises(ValueError, match=r"labels have shape \[2, 4\], expected \[2, 3\] as the logits"):
        compute((torch.randn(2, 3, 5),), torch.zeros(2, 4, dtype=torch.int64))
    for wrong in ({"reduction": "sum"}, {"ignore_index": 0}, {"return_stats": True}):
        (option,) = wrong
        with pytest.raises(ValueError, match=f"the loss has {option}=.*, expected {option}="):
            ComputeLoss(longtail.CrossEntropyLoss(**wrong), shift_labels=False)


def test_deferred_reweighting_in_the_trainer(tmp_path: Path) -> None:
    """Each epoch's steps use that epoch's weights."""
    schedule = DeferredReweighting(COUNTS, 0.99, epoch=1)
    loss = longtail.CrossEntropyLoss(weight=schedule(0))
    used: list[Tensor] = []
    loss.register_forward_hook(lambda module, *_: used.append(module.weight.clone()))
    model = tiny("LlamaForCausalLM")
    callback = DeferredReweightingCallback(schedule, loss)
    trainer(
        *(model, tmp_path, examples(), ComputeLoss(loss, shift_labels=True)),
        max_steps=-1,
        num_train_epochs=2,
        callbacks=[callback],
    ).train()
    assert len(used) == 2 * STEPS * ACCUMULATION
    for i, weight in enumerate(used):
        assert_same(weight, schedule(0) if i < len(used) // 2 else schedule(1))
    with pytest.raises(ValueError, match=r"CrossEntropyLoss has no class weights, expected one made with"):
        DeferredReweightingCallback(schedule, longtail.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"weights of shape \[11\], expected \[2\]"):
        DeferredReweightingCallback(schedule, longtail.CrossEntropyLoss(weight=torch.ones(2)))


def test_the_sampler_gets_its_epochs(tmp_path: Path) -> None:
    data = examples()
    sampler = ClassBalancedSampler([0] * 9 + [1] * 3, "square_root", rank=0, world_size=1)
    seen: list[Tensor] = []

    class Sampled(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> ClassBalancedSampler:
            return sampler

        def training_step(self, model: Any, inputs: dict[str, Tensor], *rest: Any) -> Tensor:
            seen.extend(inputs["input_ids"])
            return super().training_step(model, inputs, *rest)

    options = arguments(tmp_path, max_steps=-1, num_train_epochs=2)
    Sampled(model=tiny("LlamaForCausalLM"), args=options, train_dataset=data).train()
    for epoch, part in enumerate(torch.stack(seen).chunk(2)):
        sampler.set_epoch(epoch)
        assert_same(part, torch.stack([data[i]["input_ids"] for i in sampler]))
