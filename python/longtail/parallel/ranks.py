"""The little that the training aids need of ``torch.distributed``; without it a process is alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import check_integer
from .agreement import Proposal, explain
from .collectives import collective_device, process_group

FIRST = 1024  # numbers that travel along with the check of the ranks; those beyond need a second reduction


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """What is not given comes from the default process group, or is 0 of 1."""
    if world_size is None:
        world_size = dist.get_world_size() if is_initialized() else 1
    if rank is None:
        rank = dist.get_rank() if is_initialized() else 0
    check_integer("world_size", world_size)
    check_integer("rank", rank)
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
    proposal = Proposal(tuple(options.items()))
    mark = 0 if isinstance(part, Exception) else 1 + proposal.fingerprint()
    head = torch.zeros(world + FIRST, dtype=torch.float64, device=collective_device(group))
    head[rank] = mark
    if not isinstance(part, Exception):
        head[world : world + len(part)] = part[:FIRST]
    dist.all_reduce(head, group=group)
    fits = (head[:world] == mark).all()
    if "cpu" in (device.type, head.device.type):
        if mark == 0 or not fits:
            explain(part if isinstance(part, Exception) else proposal, [group])
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
