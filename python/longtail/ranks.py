"""The little that the training aids need of ``torch.distributed``; without it a process is alone."""

from __future__ import annotations

import hashlib
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import collective_device, process_group
from .errors import ArgumentValueError

FIRST = 1024  # numbers that travel along with the check of the ranks; those beyond need a second reduction


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """What is not given comes from the default process group, or is 0 of 1."""
    if world_size is None:
        world_size = dist.get_world_size() if is_initialized() else 1
    if rank is None:
        rank = dist.get_rank() if is_initialized() else 0
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}, expected at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1}")
    return rank, world_size


def group_or_alone(group: Any) -> Any:
    """The process group of ``group``; None where none is given and this process is alone.

    Raises:
        TypeError: ``group`` is no process group.
        ValueError: this process is not in it.
    """
    return None if group is None and not is_initialized() else process_group(group)


def checked_sum(part: Tensor | Exception, options: dict[str, Any], group: Any, device: torch.device) -> Tensor:
    """The sum of the ranks' float64 vectors, new and on ``device``; every rank learns in it whether it may be used.

    Alone (``group`` None, see :func:`group_or_alone`): a copy. NCCL reduces on the current GPU, whatever the device.

    Args:
        part: the vector, whose length follows from ``options``; or why this rank has none.
        options: what has to be equal on all ranks, by name; numbers, strings and None.
        group: of which every rank has to call.
        device: of ``part``, and of the same type on all ranks.

    Raises:
        Exception: a rank passed one, in the first such rank's words: "rank 1: ...". Where the sum goes from GPU to GPU
            the host does not wait for it: only that rank raises, and the others run into a device assertion.
        ValueError: the ranks' options differ; likewise.
    """
    if group is None:
        if isinstance(part, Exception):
            raise part
        return part.to(device, copy=True)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    mark = 0 if isinstance(part, Exception) else _mark(options)
    head = torch.zeros(world + FIRST, dtype=torch.float64, device=collective_device(group))
    head[rank] = mark
    if not isinstance(part, Exception):
        head[world : world + len(part)] = part[:FIRST]
    dist.all_reduce(head, group=group)
    fits = (head[:world] == mark).all()
    if "cpu" in (device.type, head.device.type):
        if mark == 0 or not fits:
            _raise_everywhere(part if isinstance(part, Exception) else options, group)
    else:
        if isinstance(part, Exception):
            raise part
        torch._assert_async(fits, "a rank refused its arguments, or the ranks disagree on theirs")
    assert isinstance(part, Tensor)
    total = head[world : world + len(part)]
    if len(part) > FIRST:
        rest = part[FIRST:].to(head.device, copy=True)
        dist.all_reduce(rest, group=group)
        total = torch.cat([total, rest])
    return total.to(device)


def _mark(options: dict[str, Any]) -> int:
    """A positive number that float64 holds, another one for other options."""
    return 1 + int.from_bytes(hashlib.sha256(repr(options).encode()).digest()[:6], "big")


def _raise_everywhere(own: Exception | dict[str, Any], group: Any) -> NoReturn:
    """Raises on every rank what the first rank with an exception says, or where the options differ."""
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, _plain(own) if isinstance(own, Exception) else own, group=group)
    cause = own if isinstance(own, Exception) else None
    for rank, other in enumerate(said):
        if not isinstance(other, dict):
            kind, text = other
            if cause is not None and rank == dist.get_rank(group) and kind is not type(cause):
                raise cause
            raise kind(f"rank {rank}: {text}") from cause
    names = [name for name in said[0] if any(other.get(name) != said[0][name] for other in said)]
    first = said[0][names[0]]
    rank = next(rank for rank, other in enumerate(said) if other.get(names[0]) != first)
    raise ArgumentValueError(
        f"ranks disagree on {names[0]}: {first!r} on rank 0, {said[rank].get(names[0])!r} on rank {rank}"
    )


def _plain(error: Exception) -> tuple[type[Exception], str]:
    """An exception as every rank can make it again: the nearest type that takes a text, of Python or longtail."""
    for kind in type(error).__mro__:
        if kind.__module__ not in ("builtins", ArgumentValueError.__module__) or kind in (Exception, BaseException):
            continue
        try:
            kind("")
        except TypeError:  # UnicodeDecodeError, ExceptionGroup
            continue
        return kind, str(error) if kind is type(error) else f"{type(error).__name__}: {error}"
    return RuntimeError, f"{type(error).__name__}: {error}"
