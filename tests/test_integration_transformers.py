"""Our losses in the Hugging Face Trainer, and on one model: equal to the loop written by hand."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import longtail  # noqa: E402
from longtail.integrations.transformers import (  # noqa: E402
    ComputeLoss,
    DeferredReweightingCallback,
    set_loss_function,
)
from longtail.training import ClassBalancedSampler, DeferredReweighting  # noqa: E402
from tolerances import assert_close, assert_same  # noqa: E402

VOCABULARY, LENGTH, BATCH, ACCUMULATION, STEPS = 11, 7, 2, 2, 3
LEARNING_RATE = 0.3
COUNTS = [90, 60, 40, 30, 20, 10, 8, 6, 4, 2, 1]


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
            vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
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


def arguments(folder: Path, **changes: Any) -> Any:
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return transformers.TrainingArguments(**options)


def trainer(model: Any, folder: Path, data: list[Any], compute: ComputeLoss | None = None, **changes: Any) -> Any:
    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(data)

    callbacks = changes.pop("callbacks", None)
    options = arguments(folder, **changes)
    return InOrder(model=model, args=options, train_dataset=data, compute_loss_func=compute, callbacks=callbacks)


def reference_options() -> dict[str, Any]:
    return {
        "weight": longtail.effective_number_weight(COUNTS, 0.9, dtype=torch.float64),
        "class_bias": longtail.logit_adjustment(COUNTS, dtype=torch.float64),
        "complement_gamma": -1.0,
    }


def plain_loop(model: Any, options: dict[str, Any]) -> None:
    """Each step on its micro-batches at once: the sum of the rows' losses over the number of labels that count."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    step = BATCH * ACCUMULATION
    for start in range(0, STEPS * step, step):
        together = examples()[start : start + step]
        ids = torch.stack([example["input_ids"] for example in together])
        target = torch.stack([example["labels"] for example in together])[:, 1:].flatten()
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        rows = longtail.reference.cross_entropy(logits, target, reduction="none", **options)
        optimizer.zero_grad()
        (rows.sum() / (target != -100).sum()).backward()
        optimizer.step()


def assert_equal_models(model: Any, expected: Any) -> None:
    for (name, got), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_close(got, want, what=name, factor=1000)  # parts of the models compute in float32


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


def test_trainer_evaluates(tmp_path: Path) -> None:
    """The loss of the whole set, from batches of one size each; the last prediction of a row has no label."""
    model, data = tiny("LlamaForCausalLM"), [{**examples()[0]}, {**examples()[5]}]
    compute = ComputeLoss(longtail.FocalLoss(gamma=2.0), shift_labels=True)
    got = trainer(model, tmp_path, data, compute).evaluate(eval_dataset=data)["eval_loss"]
    logits = model(input_ids=torch.stack([row["input_ids"] for row in data])).logits[:, :-1].flatten(0, 1)
    target = torch.stack([row["labels"] for row in data])[:, 1:].flatten()
    want = longtail.reference.cross_entropy(logits, target, focal_gamma=2.0)
    assert got == pytest.approx(want.item(), rel=1e-6)


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
    with pytest.raises(ValueError, match="the loss has reduction='sum', expected"):
        ComputeLoss(longtail.CrossEntropyLoss(reduction="sum"), shift_labels=False)


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
    for name in ("T5ForConditionalGeneration", "BertForTokenClassification"):
        with pytest.raises(ValueError, match=f"the forward of {name} has its loss written into it"):
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
