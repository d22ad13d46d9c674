"""What the metrics by class frequency stand on where torchmetrics is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torchmetrics
from torch import Tensor


class Metric(torchmetrics.Metric):
    """torchmetrics' Metric, whose ``compute`` also takes ``reduce`` and ``group``."""

    def __init__(self, **options: Any) -> None:
        # A kept value would keep a rank without news out of the collective call that the others make.
        super().__init__(**{"compute_with_cache": False} | options)

    def _sums_ranks(self, reduce: bool | None) -> bool:
        """Whether ``compute`` itself goes over the ranks' states; by default torchmetrics has done it before."""
        return bool(reduce)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """torchmetrics' wrapper synchronises and keeps the value, unless the call says which ranks count."""
        synchronised = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def of_ranks(*, reduce: bool | None = None, group: Any = None) -> Any:
            if reduce is None and group is None:
                value = synchronised()
                # which makes a number of the tensor of one class
                return value if isinstance(value, Tensor) else value._replace(per_class=value.per_class.reshape(-1))
            if self._is_synced:
                raise RuntimeError("the states are those of all ranks already (sync), expected unsync() before reduce=")
            return compute(reduce=reduce, group=group)

        return of_ranks

    def _nothing(self) -> dict[str, Tensor]:
        """The states kept in lists, as tensors without rows."""
        return {}

    def _sync_dist(self, *arguments: Any, **named: Any) -> None:
        for name, empty in self._nothing().items():  # of which torchmetrics would know neither the type nor the width
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                setattr(self, name, [empty])
        super()._sync_dist(*arguments, **named)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._computed = None  # a value that torchmetrics has kept, of the states before
        super()._load_from_state_dict(*arguments)
        for name in self._nothing():
            if isinstance(state := getattr(self, name), list):
                setattr(self, name, list(state))  # updates must not grow the list of the state_dict
