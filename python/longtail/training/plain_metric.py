"""What the metrics by class frequency stand on without torchmetrics: the part of its Metric that they need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class Metric(nn.Module):
    """Keeps sums over batches, or their rows; a call adds a batch and returns the value of that batch alone.

    Args:
        sync_on_compute, process_group: as torchmetrics has them; its other options need it.
    """

    def __init__(self, *, sync_on_compute: bool = True, process_group: Any = None, **others: Any) -> None:
        super().__init__()
        if others:
            raise TypeError(
                f"{type(self).__name__} got unknown options: {', '.join(sorted(others))}; without torchmetrics it "
                "takes sync_on_compute and process_group"
            )
        if not isinstance(sync_on_compute, bool):
            raise TypeError(f"sync_on_compute is a {type(sync_on_compute).__name__}, expected a bool")
        self.sync_on_compute = sync_on_compute
        self.process_group = process_group
        self._states: list[str] = []
        self._device = torch.get_default_device()
        self._saved = False

    def add_state(self, name: str, default: Tensor | list[Tensor], dist_reduce_fx: str = "sum") -> None:
        """A tensor that starts at ``default``, zeros, and that batches add to; or a list ("cat") that they lengthen."""
        assert dist_reduce_fx == ("cat" if isinstance(default, list) else "sum")
        setattr(self, name, default)  # no buffer: DistributedDataParallel would write rank 0's over the others'
        if isinstance(default, Tensor):
            self._device = default.device
        self._states.append(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._device = fn(torch.zeros(1, device=self._device)).device
        for name, state in self._kept().items():
            setattr(self, name, _each(state, lambda x: x.to(self._device)))  # counts stay integers under half()
        return self

    def _kept(self) -> dict[str, Tensor | list[Tensor]]:
        return {name: getattr(self, name) for name in self._states}

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return self._device

    def reset(self) -> None:
        """Forgets everything seen."""
        for name, state in self._kept().items():
            setattr(self, name, [] if isinstance(state, list) else torch.zeros_like(state))

    def update(self, *batch: Any) -> None:
        raise NotImplementedError

    def compute(self, *, reduce: bool | None = None, group: Any = None) -> Any:
        raise NotImplementedError

    def forward(self, *batch: Any, **named: Any) -> Any:
        """Adds a batch, as ``update``, and returns the value of that batch, which this process alone has seen."""
        before = self._kept()
        self.reset()
        try:
            self.update(*batch, **named)
            return self.compute(reduce=False)
        finally:
            for name, state in before.items():
                setattr(self, name, state + getattr(self, name))

    def clone(self) -> Self:
        """A copy of its own state."""
        return copy.deepcopy(self)

    def persistent(self, mode: bool = False) -> None:
        """Whether the ``state_dict`` holds the states; at first it does not."""
        self._saved = mode

    def _sums_ranks(self, reduce: bool | None) -> bool:
        """Whether ``compute`` itself goes over the ranks' states."""
        return self.sync_on_compute if reduce is None else reduce

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._saved:
            destination |= {prefix + name: _each(state, Tensor.clone) for name, state in self._kept().items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self._states:  # as torchmetrics: what is there is taken, and what is missing is not missed
            if prefix + name in state_dict:
                setattr(self, name, _each(state_dict.pop(prefix + name), lambda x: x.to(self._device)))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _each(state: Tensor | list[Tensor], change: Callable[[Tensor], Tensor]) -> Tensor | list[Tensor]:
    return [change(x) for x in state] if isinstance(state, list) else change(state)
