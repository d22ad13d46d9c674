"""The little that the training aids need of ``torch.distributed``; without it a process is alone."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from .arguments import check_integer
from .distributed import collective_device


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


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over the ranks of a group (default all), a new tensor on the device of ``tensor``.

    Without an initialised process group: a copy. NCCL reduces on the current GPU, whatever the device of ``tensor``.
    """
    if not is_initialized():
        return tensor.clone()
    work = tensor.to(collective_device(group), copy=True)
    dist.all_reduce(work, group=group)
    return work.to(tensor.device)
