"""Lightning with deferred re-weighting: plain training first, class weights for the last epochs (Cao et al. 2019).

One callback writes the class weights of the epoch into the module's loss, another logs the accuracy of frequent and of
rare classes. The data are points around ten centres: a thousand around the first, five around the last, and 200 around
each for validation.

Needs Lightning: pip install --no-build-isolation ".[lightning]"
Run: python examples/lightning_module.py
"""

import logging
import math
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import longtail
from longtail.integrations.lightning import DeferredReweightingCallback, LongTailAccuracyCallback
from longtail.training import DeferredReweighting, long_tailed_counts

Batch = tuple[Tensor, Tensor]


def points(centres: Tensor, counts: list[int]) -> TensorDataset:
    """Points around the centres (C, F), so many around each, and their classes."""
    classes = torch.arange(len(centres)).repeat_interleave(torch.tensor(counts))
    return TensorDataset(centres[classes] + torch.randn(len(classes), centres.shape[1]), classes)


class Classifier(LightningModule):
    def __init__(self, features: int, weight: Tensor) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, len(weight)))
        self.loss = longtail.CrossEntropyLoss(weight=weight)  # the callback finds it by its name, "loss"

    def training_step(self, batch: Batch) -> Tensor:
        inputs, target = batch
        return self.loss(self.model(inputs), target)

    def validation_step(self, batch: Batch) -> dict[str, Tensor]:
        inputs, target = batch
        loss, stats = longtail.cross_entropy(self.model(inputs), target, return_stats=True)
        self.log("val_loss", loss)
        return {"correct": stats.correct, "target": target}  # for LongTailAccuracyCallback

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class PrintScores(Callback):
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Classifier) -> None:
        weight, scores = pl_module.loss.weight, trainer.callback_metrics
        accuracies = (100 * scores.get(f"val_accuracy_{group}", math.nan) for group in ("many", "medium", "few"))
        columns = [f"{x:9.1f}" for x in accuracies]
        print(
            f"{trainer.current_epoch:5}{weight[0]:9.2f} to{weight[-1]:5.2f}{scores['val_loss']:9.3f}", *columns, sep=""
        )


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="training points of the most frequent class")
    parser.add_argument("--imbalance-factor", type=float, default=200, help="largest over smallest class")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the points; the last third is re-weighted")
    options = parser.parse_args()

    seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    centres = torch.randn(10, 8)
    counts = long_tailed_counts(options.samples, len(centres), options.imbalance_factor)
    train = DataLoader(points(centres, counts), batch_size=128, shuffle=True)
    validation = DataLoader(points(centres, [200] * len(centres)), batch_size=500)
    schedule = DeferredReweighting(counts, beta=0.999, epoch=options.epochs * 2 // 3)

    print("training points:", *counts)
    print("epoch  class weights val_loss   many %   medium      few")
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DeferredReweightingCallback(schedule), LongTailAccuracyCallback(counts), PrintScores()],
    )
    trainer.fit(Classifier(8, schedule(0)), train, validation)


if __name__ == "__main__":
    main()
