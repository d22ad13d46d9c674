"""Bytes that a rank puts on the wire, counted where torch hands them to the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class WireBytes(TorchDispatchMode):
    """Counts the collectives inside the block, and the bytes that this rank sends if they run as rings."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self._world = world
        self.sent = 0.0
        self.collectives = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes back with its local tensors
        name = func._overloadpacket.__name__.replace("_", "")
        if func.namespace in ("c10d", "_c10d_functional") and name not in ("waittensor", "wraptensorautograd"):
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        # Steps of a ring, each of the bytes that one rank puts in.
        share = (self._world - 1) / self._world
        if name.startswith("allreduce"):
            sent = 2 * share * _nbytes(args[0])
        elif name.startswith("reducescatter"):
            sent = share * _nbytes(args[1] if _writes(args) else args[0])
        elif name.startswith("allgather"):
            sent = (self._world - 1) * _nbytes(args[1] if _writes(args) else args[0])
        else:
            raise NotImplementedError(f"the traffic of {name} is not known")
        self.sent += sent
        self.collectives += 1


def _writes(args: Any) -> bool:
    """Whether a collective has its output first and its input second (c10d's own), or returns its output."""
    return len(args) > 1 and isinstance(args[1], torch.Tensor | list)


def _nbytes(x: Any) -> int:
    return sum(_nbytes(y) for y in x) if isinstance(x, list | tuple) else int(x.nbytes)
