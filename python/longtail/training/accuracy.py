"""Streaming accuracy by how often a class was seen in training; a ``torchmetrics.Metric`` where that is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import check_tensors, is_dtensor
from ..class_balance.chunks import count_indices
from ..class_balance.counts import Counts
from ..parallel.ranks import checked_sum
from ..reference.row_statistics import RowStatistics
from .frequency_metric import FrequencyMetric, check_on_device
from .scores import LongTailScores, scores_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class LongTailAccuracy(FrequencyMetric):
    """Streaming accuracy: overall, balanced, per class, many-, medium- and few-shot (Liu et al. 2019).

    Means are over the classes seen in ``update``, each counting the same. Where torchmetrics is installed this is a
    ``torchmetrics.Metric``, and otherwise a module that behaves alike: ``update``, ``compute``, ``reset``; a call adds
    a batch and returns that batch's own scores; ``to`` moves the states ``seen`` and ``correct``, int64 [C];
    ``persistent(True)`` puts them into the ``state_dict``.

    Args:
        samples_per_class: counts of the *training* set, [C].
        many: classes with more training samples than this are many-shot.
        few: classes with fewer are few-shot; those that are neither are medium-shot.
        ignore_index: target value that does not count, or None.
        score: None: ``compute`` and calls return :class:`LongTailScores`. "overall", "balanced", "many", "medium" or
            "few": that one, a 0-d tensor on the metric's device, as Lightning's ``self.log(name, metric)`` needs it.
            In a ``torchmetrics.MetricCollection`` several share one state, for ``self.log_dict``; where their
            ``ignore_index`` differ give it ``compute_groups=False``.
        options: ``sync_on_compute`` (default True) and ``process_group``; with torchmetrics its Metric's others too.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or is out of its range.
    """

    _choices = tuple(name for name in LongTailScores._fields if name != "per_class")
    seen: Tensor
    correct: Tensor

    def __init__(
        self,
        samples_per_class: Counts,
        many: float = 100,
        few: float = 20,
        *,
        ignore_index: int | None = -100,
        score: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(samples_per_class, many, few, ignore_index=ignore_index, score=score, **options)
        nothing = torch.zeros_like(self.samples_per_class, dtype=torch.int64)
        self.add_state("seen", nothing, dist_reduce_fx="sum")
        self.add_state("correct", nothing.clone(), dist_reduce_fx="sum")

    def update(self, preds: Tensor | RowStatistics, target: Tensor) -> None:
        """Adds a batch.

        Args:
            preds: logits, floating point, (C,), (N, C) or (N, C, d1, ...), whose largest is the prediction (the first
                of equal ones; of NaN none); or, of the target's shape, predicted labels (integers), or whether they
                are right (bool); or :class:`longtail.RowStatistics`, whose ``correct`` is that of the effective logits.
            target: integers, (), (N,) or (N, d1, ...), on the same device.

        Raises:
            TypeError, ValueError: a dtype, shape or device does not fit.
            IndexError: a target is out of range; names the place and the value.
        """
        num_classes = self.samples_per_class.numel()
        right = _right(preds, target, num_classes)
        counts = [count_indices(x, num_classes, self.ignore_index) for x in (target, target[right])]
        seen, correct = (x.to(self.seen.device) for x in counts)
        self.seen, self.correct = self.seen + seen, self.correct + correct

    def compute(self, *, reduce: bool | None = None, group: ProcessGroup | DeviceMesh | None = None) -> Any:
        """The scores of everything seen since construction or ``reset``: LongTailScores, or the one of ``score``.

        The states stay each rank's own. A process without ``torch.distributed`` is alone.

        Args:
            reduce: True: of everything that the ranks of ``group`` have seen together, a collective call that checks
                that they fit together. False: of this process alone. None: as ``sync_on_compute`` says, by default of
                all ranks; with torchmetrics by its own synchronisation, for which the states have to lie where the
                backend reaches them (NCCL: on the GPU). A ``group`` alone means True.
            group: default ``process_group``, or all ranks; a process group or a 1-d DeviceMesh.

        Raises:
            TypeError: ``group`` is no process group.
            ValueError: the ranks' numbers of classes differ; this process is not in ``group``.
            RuntimeError: with torchmetrics, ``reduce`` is given between ``sync()`` and ``unsync()``.
        """
        seen, correct = self.seen, self.correct
        summed, ranks = self._summed(reduce, group)
        if summed:
            both = torch.cat([seen, correct]).double()  # exact to 2^53
            options = {"the call": "LongTailAccuracy.compute", "num_classes": seen.numel()}
            seen, correct = checked_sum(both, options, ranks, seen.device).to(torch.int64).chunk(2)
        seen, correct = torch.stack([seen, correct]).cpu()
        scores = scores_of(seen, correct, self.samples_per_class, self.many, self.few)
        return self._asked(scores)


def _right(preds: Tensor | RowStatistics, target: Tensor, num_classes: int) -> Tensor:
    """Whether each prediction is the target; bool of the target's shape."""
    given = preds.correct if isinstance(preds, RowStatistics) else preds
    check_tensors(preds=given, target=target)
    if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
        raise TypeError(f"target has dtype {target.dtype}, expected integers: update(preds, target)")
    if is_dtensor(given):
        raise TypeError("preds is a DTensor, expected preds.full_tensor(), or its shard with reduce=True")
    check_on_device(given, target)
    if given.is_complex():
        raise TypeError(f"preds has dtype {given.dtype}, expected logits, labels or bool")
    shape, labels = list(target.shape), given
    if given.is_floating_point():
        logits = [*shape[:1], num_classes, *shape[1:]]
        if list(given.shape) != logits:
            raise ValueError(f"preds are logits of shape {list(given.shape)}, expected {logits} for target {shape}")
        largest, labels = given.max(min(1, len(shape)))
        return (labels == target) & ~largest.isnan()
    if list(given.shape) != shape:
        raise ValueError(f"preds has shape {list(given.shape)} and dtype {given.dtype}, expected {shape} as the target")
    return given if given.dtype == torch.bool else labels == target
