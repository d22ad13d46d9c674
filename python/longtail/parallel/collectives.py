"""What the vocabulary-parallel losses ask of torch.distributed: groups, gathers, sums in rank order.

Nothing here imports torch.distributed before a group is asked for: a torch without it imports longtail all the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, ArgumentValueError

P = ParamSpec("P")
R = TypeVar("R")
Group = Any
"""A torch.distributed.ProcessGroup or a 1-D DeviceMesh; None stands for the default group."""


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, for which torch.compile breaks its graph: groups and agreements are nothing that it can trace."""

    @functools.wraps(function)
    def inner(*args: P.args, **named: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **named)
        return function(*args, **named)

    return inner


def process_group(group: Group) -> Group:
    """``group``, that of a 1-D DeviceMesh, or the default group for None.

    Raises:
        TypeError: it is no group.
        ValueError: torch.distributed is missing or not initialised, this process is not in the group, or it is a mesh
            of several dimensions.
    """
    if not torch.distributed.is_available():
        raise ArgumentValueError("this build of torch has no torch.distributed, which vocabulary-parallel losses need")
    if group is None:
        if not torch.distributed.is_initialized():
            raise ArgumentValueError(
                "there is no default process group: call torch.distributed.init_process_group first, or pass group"
            )
        group = torch.distributed.group.WORLD
    if hasattr(group, "mesh_dim_names"):  # a DeviceMesh, without importing what defines it
        if group.ndim != 1:
            raise ArgumentValueError(
                f"group is a DeviceMesh of {group.ndim} dimensions, expected one dimension: mesh.get_group(dimension)"
            )
        inside = group.get_coordinate() is not None
        group = group.get_group() if inside else torch.distributed.GroupMember.NON_GROUP_MEMBER
    outside = group is torch.distributed.GroupMember.NON_GROUP_MEMBER
    if not outside and not isinstance(group, torch.distributed.ProcessGroup):
        raise ArgumentTypeError(f"group is a {type(group).__name__}, expected a ProcessGroup or a 1-D DeviceMesh")
    if outside or torch.distributed.get_rank(group) < 0:
        raise ArgumentValueError("this process does not belong to group")
    return group


def collective_device(group: Group) -> torch.device:
    """Where the group's collectives take tensors."""
    return torch.device("cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu")


def takes(group: Group, device: torch.device) -> bool:
    """Whether the group's collectives take tensors of ``device``."""
    return device.type in {found.type for found in group._device_types}


def device_of(data: object, group: Group) -> torch.device:
    """Where a rank meets the others that was given ``data``, whatever it is."""
    usable = isinstance(data, Tensor) and takes(group, data.device)
    return data.device if usable else collective_device(group)  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float64, on the device once: a CUDA graph can not be captured over a copy. The host does not wait for that."""
    return torch.tensor(values, dtype=torch.float64, device="cpu").to(device, non_blocking=True)


def _collective(name: str, before: str) -> Callable[..., Any]:
    """A collective by its name since torch 2.13, or ``before`` that."""
    found: Callable[..., Any] = getattr(torch.distributed, name, None) or getattr(torch.distributed, before)
    return found


def all_gather(x: Tensor, group: Group) -> Tensor:
    """The contiguous ``x`` of every rank, at least 1-d, stacked in rank order: [P, *x.shape]."""
    world = torch.distributed.get_world_size(group)
    if world == 1:
        return x[None]
    gathered = x.new_empty((world, *x.shape))
    _collective("all_gather_single", "all_gather_into_tensor")(gathered.flatten(0, 1), x, group=group)
    return gathered


def all_reduce_async(x: Tensor, group: Group) -> Callable[[], None]:
    """Begins the sum of ``x`` over the ranks, in its place, and returns what waits for it."""
    work = torch.distributed.all_reduce(x, group=group, async_op=True)
    return lambda: None if work is None else work.wait()


def reduce_scatter_async(partial: Tensor, out: Tensor, group: Group) -> Callable[[], None]:
    """Begins the sum of ``partial`` over the ranks; of its rows, in rank order, ``out`` gets this rank's."""
    reduce_scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")
    work = reduce_scatter(out, partial, group=group, async_op=True)

    def wait(_partial: Tensor = partial) -> None:  # which has to live until then
        if work is not None:
            work.wait()

    return wait
