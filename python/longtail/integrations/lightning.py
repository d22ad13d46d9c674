"""Lightning callbacks: deferred re-weighting, and accuracy by class frequency. Needs the extra ``lightning``.

A ``longtail.training.ClassBalancedSampler`` needs no callback: Lightning calls its ``set_epoch``. On several devices
tell the Trainer ``use_distributed_sampler=False``; the sampler deals its epochs out to the ranks itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as missing:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ImportError:
        raise ImportError(f"{missing}; longtail.integrations.lightning needs pip install 'lightning>=2.2'") from missing

from ..class_balance.counts import Counts
from ..training import LongTailAccuracy
from .reweighting import WeightSchedule, set_weight

__all__ = ["DeferredReweightingCallback", "LongTailAccuracyCallback"]


class DeferredReweightingCallback(Callback):
    """Sets the class weights of a loss at the start of every training epoch, and where training resumes within one.

    Args:
        schedule: epoch to weights [C], such as :class:`longtail.training.DeferredReweighting`.
        loss: name of the loss in the LightningModule ("loss", "head.loss", ...), or the module itself. Its ``weight``
            buffer is overwritten; make it with ``weight=schedule(0)``.

    Raises:
        AttributeError: when training starts, the LightningModule has no module of that name.
        ValueError: the loss has no ``weight``, or of another shape.
    """

    def __init__(self, schedule: WeightSchedule, loss: str | nn.Module = "loss") -> None:
        self.schedule = schedule
        self.loss = loss

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Resumed within an epoch, Lightning does not start that epoch again.
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = pl_module.get_submodule(self.loss) if isinstance(self.loss, str) else self.loss
        set_weight(loss, self.schedule(trainer.current_epoch))


class LongTailAccuracyCallback(Callback):
    """Logs :class:`longtail.training.LongTailAccuracy` of validation and test, over all ranks.

    Logged at the end of an epoch as ``val_accuracy``, ``val_accuracy_balanced``, ``_many``, ``_medium`` and ``_few``
    (``test_...``); scores without a single sample are left out. Each of several loaders has its own,
    ``val_accuracy_few/dataloader_idx_0`` and so on, as Lightning names what steps log. ``validation_step`` and
    ``test_step`` return a mapping with "correct" (bool, such as ``RowStatistics.correct``) and "target", of one shape.

    Without a callback: the metric itself is a ``torchmetrics.Metric``, for ``self.log("val_few", metric)`` with
    ``score="few"``, and for ``self.log_dict`` in a ``MetricCollection``.

    Args:
        samples_per_class, many, few, ignore_index: as in ``LongTailAccuracy``.
        get_correct: takes (correct, target), or what else ``LongTailAccuracy.update`` takes, out of what the step
            returned and the batch, where they stand elsewhere.

    Raises:
        TypeError: in the loop, a step returned no mapping with both.
    """

    def __init__(
        self,
        samples_per_class: Counts,
        many: float = 100,
        few: float = 20,
        *,
        ignore_index: int | None = -100,
        get_correct: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self._new = partial(LongTailAccuracy, samples_per_class, many, few, ignore_index=ignore_index)
        self._start(1)
        self.get_correct = get_correct or _correct_of

    def _start(self, loaders: int) -> None:
        self.metrics = [self._new() for _ in range(loaders)]
        self._one_by_one = False  # several loaders, one after the other

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(len(trainer.num_val_batches))

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(len(trainer.num_test_batches))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        # Lightning gives no index where a batch is of all loaders, in the other modes of its CombinedLoader.
        self._one_by_one = dataloader_idx is not None
        self.metrics[dataloader_idx or 0].update(*self.get_correct(outputs, batch))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, "val_accuracy")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, "test_accuracy")

    def _log(self, pl_module: LightningModule, name: str) -> None:
        known: dict[str, float] = {}
        for index, metric in enumerate(self.metrics):
            loader = f"/dataloader_idx_{index}" if self._one_by_one else ""
            scores = metric.compute(reduce=True)
            groups = {f"_{group}": getattr(scores, group) for group in ("balanced", "many", "medium", "few")}
            named = {"": scores.overall, **groups}
            known |= {name + group + loader: value for group, value in named.items() if value == value}
        # Every rank has the same scores already: nothing is left to synchronise.
        pl_module.log_dict(known, sync_dist=False, add_dataloader_idx=False)


def _correct_of(outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(outputs, Mapping) and {"correct", "target"} <= outputs.keys():
        return outputs["correct"], outputs["target"]
    kind = type(outputs).__name__
    raise TypeError(f'the step returned a {kind}, expected a mapping with "correct" and "target"')
