"""What metrics by class frequency share; a ``torchmetrics.Metric`` where that is installed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import check_choice, check_number
from ..class_balance.arrays import check_ignore_index
from ..class_balance.counts import Counts, checked_counts
from ..parallel.ranks import group_or_alone

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from .plain_metric import Metric
if not TYPE_CHECKING:
    try:
        from .torchmetrics_metric import Metric
    except Exception as error:  # a broken installation raises more than ImportError
        if not (isinstance(error, ModuleNotFoundError) and error.name == "torchmetrics"):
            warnings.warn(
                f"longtail's metrics are no torchmetrics.Metric here: torchmetrics raised {error!r}", stacklevel=2
            )
        from .plain_metric import Metric


class FrequencyMetric(Metric):
    """Scores of many-, medium- and few-shot classes: a NamedTuple with the field ``per_class``, or one of its others.

    Arguments: as in :class:`LongTailAccuracy`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    _choices: tuple[str, ...]
    """The names that ``score`` may have."""

    def __init__(
        self,
        samples_per_class: Counts,
        many: float,
        few: float,
        *,
        ignore_index: int | None,
        score: str | None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.samples_per_class, _ = checked_counts(samples_per_class)
        self.many = check_number("many", many)
        self.few = check_number("few", few)
        if self.few > self.many:
            raise ValueError(f"few is {few}, expected at most many = {many}, so that no class is in both")
        check_ignore_index(ignore_index)
        self.ignore_index = ignore_index
        if score is not None:
            check_choice("score", score, self._choices)
        self.score = score

    def _summed(self, reduce: bool | None, group: ProcessGroup | DeviceMesh | None) -> tuple[bool, Any]:
        """Whether ``compute`` itself goes over ranks, and the process group of those, None for this process alone."""
        summed = self._sums_ranks(True if reduce is None and group is not None else reduce)
        return summed, group_or_alone(self.process_group if group is None else group) if summed else None

    def _asked(self, scores: Any) -> Any:
        """All scores, or the one of ``score`` as a tensor."""
        return scores if self.score is None else torch.tensor(getattr(scores, self.score), device=self.device)


def check_on_device(preds: Tensor, target: Tensor) -> None:
    if preds.device != target.device:
        raise ValueError(f"preds is on {preds.device}, expected {target.device} as the target")
