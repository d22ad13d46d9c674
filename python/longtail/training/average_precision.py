"""Streaming mean average precision by how often a class was seen in training, of several labels a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import check_tensors, is_dtensor
from ..class_balance.counting import options_of_ranks
from ..class_balance.counts import Counts
from ..parallel.collectives import all_gather, collective_device
from ..parallel.ranks import checked_sum
from .frequency_metric import FrequencyMetric, check_on_device
from .scores import LongTailAveragePrecisions, means_by_frequency

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

CHUNK = 1 << 20  # elements that are sorted together: tens of MiB at work, whatever N and C
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
IGNORED = -1


class LongTailMeanAveragePrecision(FrequencyMetric):
    """Streaming mean average precision (mAP) of multi-hot targets: of all, many-, medium- and few-shot classes.

    The average precision of a class is ``sum_n (R_n - R_(n-1)) P_n`` over its distinct scores from the largest on, P_n
    and R_n being precision and recall where rows that score at least the n-th are predicted: scikit-learn's
    ``average_precision_score``, torchmetrics' ``MultilabelAveragePrecision`` without ``thresholds``. Nothing is binned
    or interpolated; equal scores are one threshold; any increasing function of the scores has the same result, so
    logits serve as well as probabilities. Means are over the classes of which ``update`` has seen a positive, each
    counting the same, as mAP is reported by frequency (Wu et al. 2020); the others are NaN and left out, where
    torchmetrics and scikit-learn count them as 0.

    All scores are kept, N C numbers of ``dtype`` and a byte of target each: 5 N C bytes by default, 0.5 GB of 100,000
    rows and 1000 classes. They are on the metric's device (``to`` moves them), which need not be the batches'.
    Otherwise as :class:`LongTailAccuracy`: a ``torchmetrics.Metric`` where that is installed, and the same without;
    the states are lists, ``preds`` and ``target`` [N, C], int8, in which -1 does not count.

    Args:
        samples_per_class, many, few, options: as in :class:`LongTailAccuracy`; a class's samples are its positives.
        ignore_index: target value of elements that do not count, or None.
        score: None: ``compute`` and calls return :class:`LongTailAveragePrecisions`. "mean", "many", "medium" or "few":
            that one, a 0-d tensor on the metric's device.
        dtype: in which scores are kept: torch.float32, torch.float64, torch.float16 or torch.bfloat16. Scores that it
            rounds to the same number are equal.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or is out of its range.
    """

    _choices = tuple(name for name in LongTailAveragePrecisions._fields if name != "per_class")
    preds: list[Tensor]
    target: list[Tensor]

    def __init__(
        self,
        samples_per_class: Counts,
        many: float = 100,
        few: float = 20,
        *,
        ignore_index: int | None = None,
        score: str | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        super().__init__(samples_per_class, many, few, ignore_index=ignore_index, score=score, **options)
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(map(str, DTYPES))}")
        self.kept_dtype = dtype
        self.add_state("preds", [], dist_reduce_fx="cat")
        self.add_state("target", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            preds: scores, floating point (N, C), probabilities or logits.
            target: multi-hot, (N, C), on the same device: bool, or 0 and 1 as integers or floating point.

        Raises:
            TypeError, ValueError: a dtype, shape or device does not fit; a score that counts is NaN; a target is
                neither 0 nor 1 nor ``ignore_index``. Both name the place.
        """
        shape = [self.samples_per_class.numel()]
        check_tensors(preds=preds, target=target)
        for name, given in (("preds", preds), ("target", target)):
            if is_dtensor(given):
                raise TypeError(f"{name} is a DTensor, expected {name}.full_tensor(), or its shard with reduce=True")
            if given.dim() != 2 or list(given.shape[1:]) != shape:
                raise ValueError(f"{name} has shape {list(given.shape)}, expected [N, {shape[0]}]")
        if len(preds) != len(target):
            raise ValueError(f"target has shape {list(target.shape)}, expected {list(preds.shape)} as preds")
        check_on_device(preds, target)
        if not preds.is_floating_point():
            raise TypeError(f"preds has dtype {preds.dtype}, expected floating point scores: update(preds, target)")
        labels = _labels(target, self.ignore_index)
        scores = preds.detach().masked_fill(labels == IGNORED, 0)
        _refuse(scores.isnan(), "preds", scores, "a number")
        self.preds.append(scores.to(self.device, self.kept_dtype))
        self.target.append(labels.to(self.device))

    def compute(self, *, reduce: bool | None = None, group: ProcessGroup | DeviceMesh | None = None) -> Any:
        """The scores of everything seen since construction or ``reset``: all of them, or the one of ``score``.

        The states stay each rank's own. A process without ``torch.distributed`` is alone.

        Args:
            reduce: True: of everything that the ranks of ``group`` have seen together, by collective calls that take a
                few classes at a time, whose memory is small. False: of this process alone. None: as in
                :meth:`LongTailAccuracy.compute`; torchmetrics' own synchronisation gathers all states on every rank.
            group: default ``process_group``, or all ranks; a process group or a 1-d DeviceMesh.

        Raises:
            TypeError: ``group`` is no process group.
            ValueError: the ranks' numbers of classes or dtypes differ; this process is not in ``group``.
            RuntimeError: with torchmetrics, ``reduce`` is given between ``sync()`` and ``unsync()``.
        """
        _, ranks = self._summed(reduce, group)
        empty = self._nothing()
        # A list of batches; torchmetrics makes one tensor of it when it synchronises.
        preds, target = (x if isinstance(x, list) else [x] for x in (self.preds, self.target))
        preds, target = [empty["preds"], *preds], [empty["target"], *target]
        own = sum(map(len, preds))
        rows = [own] if ranks is None else self._rows_of_ranks(own, ranks)
        step, parts = max(1, CHUNK // max(1, sum(rows))), []
        for start in range(0, self.samples_per_class.numel(), step):
            here = slice(start, start + step)
            scores, labels = (torch.cat([batch[:, here].T for batch in x], 1) for x in (preds, target))
            if ranks is not None and sum(rows) > 0:
                scores, labels = _of_ranks(scores, labels, rows, ranks)
            parts.append(average_precision(scores, labels))
        per_class = torch.cat(parts).cpu()
        means = means_by_frequency(per_class, self.samples_per_class, self.many, self.few)
        return self._asked(LongTailAveragePrecisions(per_class.nanmean().item(), per_class, **means))

    def _nothing(self) -> dict[str, Tensor]:
        """The states of no batch."""
        num_classes = self.samples_per_class.numel()
        dtypes = {"preds": self.kept_dtype, "target": torch.int8}
        return {name: torch.zeros(0, num_classes, dtype=dtype, device=self.device) for name, dtype in dtypes.items()}

    def _rows_of_ranks(self, own: int, group: Any) -> list[int]:
        """How many rows each rank has seen; every rank learns whether they fit together."""
        rows = torch.zeros(dist.get_world_size(group), dtype=torch.float64, device=self.device)
        rows[dist.get_rank(group)] = own
        call, num_classes = "LongTailMeanAveragePrecision.compute", self.samples_per_class.numel()
        options = options_of_ranks(call, num_classes, None, dtype=str(self.kept_dtype))
        return [int(n) for n in checked_sum(rows, options, group, self.device).tolist()]


def average_precision(preds: Tensor, target: Tensor) -> Tensor:
    """Of each class: preds [C, N] without NaN, target [C, N] of 1, 0, and -1 for what does not count -> float64 [C]."""
    if preds.shape[1] == 0:
        return preds.new_full(preds.shape[:1], torch.nan, dtype=torch.float64)
    scores, order = preds.sort(1, descending=True)
    target = target.gather(1, order)
    positives, counted = (x.cumsum(1) for x in (target == 1, target != IGNORED))
    last = torch.ones_like(target, dtype=torch.bool)  # the last of equal scores, where a threshold can lie
    last[:, :-1] = scores[:, 1:] != scores[:, :-1]
    at_thresholds = positives.where(last, 0)
    before = at_thresholds.cummax(1).values.roll(1, 1)  # positives above the scores that are equal to this one
    before[:, 0] = 0
    precision = at_thresholds.double() / counted.clamp(min=1)
    return ((at_thresholds - before) * precision).where(last, 0).sum(1) / positives[:, -1]


def _labels(target: Tensor, ignore_index: int | None) -> Tensor:
    """A multi-hot target as 1, 0 and IGNORED, int8."""
    if target.is_complex():
        raise TypeError(f"target has dtype {target.dtype}, expected bool, or 0 and 1")
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    wrong = (target != 0) & (target != 1) & ~ignored
    _refuse(wrong, "target", target, "0 or 1" if ignore_index is None else f"0, 1 or ignore_index = {ignore_index}")
    return (target == 1).to(torch.int8).masked_fill(ignored, IGNORED)


def _refuse(wrong: Tensor, name: str, values: Tensor, expected: str) -> None:
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name}[{row}, {column}] is {values[row, column].item()}, expected {expected}")


def _of_ranks(preds: Tensor, target: Tensor, rows: list[int], group: Any) -> tuple[Tensor, Tensor]:
    """What all ranks have of these classes, [C, sum of rows] each, in rank order: one gather of bytes."""
    filled = [torch.nn.functional.pad(x, (0, max(rows) - x.shape[1])) for x in (preds, target)]
    sent = torch.cat([x.view(torch.uint8) for x in filled], 1).to(collective_device(group))
    gathered = all_gather(sent, group).to(preds.device)  # [P, C, bytes]
    width = sent.shape[1] - max(rows)  # of the scores
    scores = gathered[:, :, :width].contiguous().view(preds.dtype)
    labels = gathered[:, :, width:].contiguous().view(target.dtype)
    first, second = (torch.cat([x[r, :, :n] for r, n in enumerate(rows)], 1) for x in (scores, labels))
    return first, second
