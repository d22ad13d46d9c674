"""Lightning: weights that switch between epochs, accuracy by class frequency, our sampler, two-step training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning.pytorch")

import longtail  # noqa: E402
from longtail.integrations.lightning import DeferredReweightingCallback, LongTailAccuracyCallback  # noqa: E402
from longtail.training import (  # noqa: E402
    ClassBalancedSampler,
    ComplementObjectiveTraining,
    DeferredReweighting,
    LongTailAccuracy,
)
from tolerances import assert_close, assert_same  # noqa: E402

COUNTS = [130, 60, 40, 3]
FEATURES, EPOCHS, LEARNING_RATE = 5, 2, 0.5

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*number of training batches",
    "ignore:.*have no `val_dataloader`",
    "ignore:.*LeafSpec",
    "ignore:.*your dataloader is not resumable",
)


def data(rows: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(rows) % 3  # the rarest class has no sample
    return TensorDataset(torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64), target)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, 4, dtype=torch.float64)


class Classifier(lightning.LightningModule):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.model = network()
        self.loss = loss
        self.weights: list[Tensor] = []

    def training_step(self, batch: Any, _: int) -> Tensor:
        self.weights.append(self.loss.weight.clone())
        return self.loss(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> dict[str, Tensor]:
        loss, stats = self.loss(self.model(batch[0]), batch[1], return_stats=True)
        return {"loss": loss, "correct": stats.correct, "target": batch[1]}

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)


def trainer(callbacks: list[Any], epochs: int = EPOCHS, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )


@pytest.mark.parametrize("name", ["loss", None])
def test_fit_switches_the_weights(name: str | None) -> None:
    schedule = DeferredReweighting(COUNTS, 0.9, epoch=1, dtype=torch.float64)
    module = Classifier(longtail.CrossEntropyLoss(weight=schedule(0)))
    expected = copy.deepcopy(module.model)
    loader = DataLoader(data(), batch_size=8)
    trainer([DeferredReweightingCallback(schedule, name or module.loss)]).fit(module, loader)
    assert len(module.weights) == EPOCHS * 3
    for i, weight in enumerate(module.weights):
        assert_same(weight, schedule(i // 3))
    assert_same(module.state_dict()["loss.weight"], schedule(1))
    optimizer = torch.optim.SGD(expected.parameters(), lr=LEARNING_RATE)
    for epoch in range(EPOCHS):
        for input, target in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(expected(input), target, schedule(epoch)).backward()
            optimizer.step()
    for got, want in zip(module.model.parameters(), expected.parameters(), strict=True):
        assert_close(got, want, factor=10)


def test_a_resumed_fit_has_the_weights_of_its_epoch(tmp_path) -> None:
    schedule = DeferredReweighting(COUNTS, 0.9, epoch=1, dtype=torch.float64)
    loader = DataLoader(data(), batch_size=8)
    first = Classifier(longtail.CrossEntropyLoss(weight=schedule(0)))
    run = trainer([DeferredReweightingCallback(schedule)], epochs=1)
    run.fit(first, loader)
    run.save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    second = Classifier(longtail.CrossEntropyLoss(weight=schedule(0)))
    trainer([DeferredReweightingCallback(schedule)]).fit(second, loader, ckpt_path=tmp_path / "one.ckpt")
    assert len(second.weights) == 3
    for weight in second.weights:
        assert_same(weight, schedule(1))


def test_a_fit_resumed_within_an_epoch_has_its_weights(tmp_path) -> None:
    """The loss is no part of the module, so that the checkpoint does not hold the weights."""
    schedule = DeferredReweighting(COUNTS, 0.9, epoch=1, dtype=torch.float64)
    loader = DataLoader(data(), batch_size=8)

    class Elsewhere(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.criterion = [longtail.CrossEntropyLoss(weight=schedule(0))]

        def training_step(self, batch: Any, _: int) -> Tensor:
            self.weights.append(self.criterion[0].weight.clone())
            return self.criterion[0](self.model(batch[0]), batch[1])

        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == 4:
                self.trainer.save_checkpoint(tmp_path / "within.ckpt", weights_only=False)

    first, second = Elsewhere(), Elsewhere()
    trainer([DeferredReweightingCallback(schedule, first.criterion[0])]).fit(first, loader)
    run = trainer([DeferredReweightingCallback(schedule, second.criterion[0])])
    run.fit(second, loader, ckpt_path=tmp_path / "within.ckpt")
    assert len(second.weights) == 2, "what was left of the second epoch"
    for weight in second.weights:
        assert_same(weight, schedule(1))


def test_a_loss_without_weights_is_refused() -> None:
    module = Classifier(longtail.CrossEntropyLoss())
    schedule = DeferredReweighting(COUNTS, 0.9, epoch=1)
    with pytest.raises(ValueError, match="CrossEntropyLoss has no class weights, expected one made with"):
        trainer([DeferredReweightingCallback(schedule)]).fit(module, DataLoader(data()))
    with pytest.raises(AttributeError, match="criterion"):
        trainer([DeferredReweightingCallback(schedule, "criterion")]).fit(module, DataLoader(data()))


def test_accuracy_is_logged() -> None:
    """Equal to a plain count at the end; the sanity check beforehand leaves no trace; empty groups are not logged."""
    module = Classifier(longtail.CrossEntropyLoss(weight=torch.ones(4)))
    validation = data(30)
    run = trainer([LongTailAccuracyCallback(COUNTS, many=50, few=20)], num_sanity_val_steps=2)
    run.fit(module, DataLoader(data(), batch_size=8), DataLoader(validation, batch_size=7))
    logged = {key: value.item() for key, value in run.callback_metrics.items()}
    input, target = validation.tensors
    correct = module.model(input).argmax(1) == target
    share = [correct[target == c].double().mean().item() for c in range(3)]
    assert logged == pytest.approx(
        {
            "val_accuracy": correct.double().mean().item(),
            "val_accuracy_balanced": sum(share) / 3,
            "val_accuracy_many": (share[0] + share[1]) / 2,
            "val_accuracy_medium": share[2],
        },
        rel=1e-6,
    )
    assert 0.2 < logged["val_accuracy"] < 1
    (tested,) = run.test(module, DataLoader(validation, batch_size=7), verbose=False)
    assert tested == pytest.approx({key.replace("val", "test"): value for key, value in logged.items()}, rel=1e-6)


def test_each_of_several_loaders_has_its_own_accuracy() -> None:
    """Named as Lightning names what steps log; on the sets alone the scores are the same."""

    class Two(Classifier):
        def validation_step(self, batch: Any, _: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
            return super().validation_step(batch, dataloader_idx)

        test_step = validation_step

    module = Two(longtail.CrossEntropyLoss(weight=torch.ones(4)))
    sets = [TensorDataset(*(tensor[part] for tensor in data(30).tensors)) for part in (slice(0, 18), slice(18, 30))]
    loaders = [DataLoader(rows, batch_size=7) for rows in sets]
    expected = {}
    for index, loader in enumerate(loaders):
        (alone,) = trainer([LongTailAccuracyCallback(COUNTS)]).validate(module, loader, verbose=False)
        expected |= {f"{name}/dataloader_idx_{index}": value for name, value in alone.items()}
    assert expected["val_accuracy/dataloader_idx_0"] != expected["val_accuracy/dataloader_idx_1"]
    run = trainer([LongTailAccuracyCallback(COUNTS)], epochs=1)
    run.validate(module, loaders, verbose=True)
    assert {name: value.item() for name, value in run.callback_metrics.items()} == expected
    run.test(module, loaders, verbose=False)
    tested = {name.replace("val", "test"): value for name, value in expected.items()}
    assert {name: value.item() for name, value in run.callback_metrics.items()} == tested
    run.fit(module, DataLoader(data(), batch_size=8), loaders)
    assert run.callback_metrics.keys() == expected.keys()


def test_loaders_whose_batches_come_together_have_one_accuracy() -> None:
    """In a mode of the CombinedLoader in which Lightning gives steps no index, and what they log none."""

    class Together(Classifier):
        def validation_step(self, batch: Any, index: int) -> dict[str, Tensor]:
            return super().validation_step([torch.cat(parts) for parts in zip(*batch, strict=True)], index)

    module = Together(longtail.CrossEntropyLoss(weight=torch.ones(4)))
    loaders = [
        DataLoader(TensorDataset(*(x[part] for x in data(30).tensors)), 5) for part in (slice(15), slice(15, 30))
    ]
    both = lightning.utilities.CombinedLoader(loaders, "min_size")
    (seen,) = trainer([LongTailAccuracyCallback(COUNTS)]).validate(module, both, verbose=False)
    whole = Classifier(module.loss)
    (expected,) = trainer([LongTailAccuracyCallback(COUNTS)]).validate(whole, DataLoader(data(30), 30), verbose=False)
    assert seen == pytest.approx(expected)


def test_accuracy_from_what_the_step_returns() -> None:
    class Other(Classifier):
        def validation_step(self, batch: Any, _: int) -> Tensor:
            return self.model(batch[0])

    def get_correct(outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return outputs.argmax(1) == batch[1], batch[1]

    module = Other(longtail.CrossEntropyLoss(weight=torch.ones(4)))
    loader = DataLoader(data(), batch_size=8)
    callback = LongTailAccuracyCallback(COUNTS, get_correct=get_correct)
    run = trainer([callback])
    run.validate(module, loader, verbose=False)
    expected = LongTailAccuracy(COUNTS)
    input, target = data().tensors
    expected.update(module.model(input).argmax(1) == target, target)
    assert run.callback_metrics["val_accuracy"] == pytest.approx(expected.compute().overall)
    with pytest.raises(TypeError, match='the step returned a Tensor, expected a mapping with "correct" and "target"'):
        trainer([LongTailAccuracyCallback(COUNTS)]).validate(module, loader, verbose=False)


def test_metrics_are_logged_as_they_are() -> None:
    """By ``self.log``, on steps and over the epoch, and as a collection; Lightning resets them."""
    from torchmetrics import MetricCollection

    steps: list[float] = []

    class Logs(Classifier):
        def __init__(self, loss: nn.Module) -> None:
            super().__init__(loss)
            self.balanced = LongTailAccuracy(COUNTS, score="balanced")
            scores = {name: LongTailAccuracy(COUNTS, 50, 20, score=name) for name in ("overall", "many", "few")}
            self.scores = MetricCollection(scores, prefix="val_")

        def validation_step(self, batch: Any, _: int) -> None:
            logits = self.model(batch[0])
            steps.append(self.balanced(logits, batch[1]).item())
            self.log("val_balanced", self.balanced, on_step=True, on_epoch=True)
            self.scores.update(logits, batch[1])
            self.log_dict(self.scores)

    module = Logs(longtail.CrossEntropyLoss(weight=torch.ones(4)))
    run = trainer([], epochs=2)
    run.fit(module, DataLoader(data(), batch_size=8), DataLoader(data(30), batch_size=7))
    expected = LongTailAccuracy(COUNTS, 50, 20)
    input, target = data(30).tensors
    expected.update(module.model(input), target)
    scores = expected.compute()
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    wanted = {"val_balanced_epoch": scores.balanced, "val_overall": scores.overall, "val_many": scores.many}
    assert {name: logged[name] for name in wanted} == pytest.approx(wanted)
    assert logged["val_few"] != logged["val_few"], "of no sample"
    assert len(set(steps)) > 2
    assert module.balanced.seen.sum() == 0


def test_the_sampler_gets_its_epochs() -> None:
    seen: list[int] = []

    class Recorder(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            seen.extend(batch[2].tolist())
            return super().training_step(batch[:2], index)

    input, target = data().tensors
    sampler = ClassBalancedSampler(target, "square_root", 16)
    loader = DataLoader(TensorDataset(input, target, torch.arange(24)), batch_size=8, sampler=sampler)
    trainer([]).fit(Recorder(longtail.CrossEntropyLoss(weight=torch.ones(4))), loader)
    expected = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    assert seen == expected[0] + expected[1]
    assert expected[0] != expected[1]


def test_complement_objective_training_by_manual_optimization() -> None:
    def optimizers(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), torch.optim.Adam(model.parameters(), lr=0.01)

    class TwoSteps(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model = network()

        def training_step(self, batch: Any, _: int) -> None:
            ComplementObjectiveTraining(self.model, *self.optimizers()).step(*batch)

        def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
            return optimizers(self.model)

    module, expected = TwoSteps(), network()
    loader = DataLoader(data(), batch_size=8)
    run = trainer([])
    run.fit(module, loader)
    training = ComplementObjectiveTraining(expected, *optimizers(expected))
    for _ in range(EPOCHS):
        for input, target in loader:
            training.step(input, target)
    assert run.global_step == 2 * 3 * EPOCHS, "Lightning counts both steps"
    for got, want in zip(module.model.parameters(), expected.parameters(), strict=True):
        assert_same(got, want)
