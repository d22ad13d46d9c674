"""What ``LongTailAccuracy`` stands on where torchmetrics is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torchmetrics
from torch import Tensor


class Metric(torchmetrics.Metric):
    """torchmetrics' Metric, whose ``compute`` also takes ``reduce`` and ``group``."""

    def _sums_ranks(self, reduce: bool | None) -> bool:
        """Whether ``compute`` itself adds up the ranks' states; by default torchmetrics has done it before."""
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

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._computed = None  # a value that torchmetrics has kept, of the states before
        super()._load_from_state_dict(*arguments)
