"""Runs on meta tensors, which have no data: what is launched on a GPU, and the bytes that are held meanwhile."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class DryRun(TorchDispatchMode):
    """Names of the operators that run, and the most bytes of storages made here and yet alive."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.made: set[tuple[tuple[int, ...], Any]] = set()
        """Shapes and dtypes of new storages."""
        self.peak = 0
        self._before = {x.untyped_storage()._cdata for x in inputs}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._see(x)
        self.calls.append(func.name().removeprefix("aten::"))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return out

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._before and key not in self._alive:
            self._alive[key] = StorageWeakRef(storage), storage.nbytes()
            self.made.add((tuple(x.shape), x.dtype))

    @property
    def gemms(self) -> list[str]:
        return [name for name in self.calls if "mm" in name]
