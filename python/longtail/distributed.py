"""What the vocabulary-parallel losses ask of torch.distributed: groups, gathers, sums in rank order, agreement.

Nothing here imports torch.distributed before a group is asked for: a torch without it imports longtail all the same.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from .errors import ArgumentValueError

P = ParamSpec("P")
R = TypeVar("R")
Group = Any
"""A torch.distributed.ProcessGroup; None stands for the default group."""


def is_dtensor(x: object) -> bool:
    """Whether ``x`` is a DTensor, without importing what defines it."""
    return hasattr(type(x), "full_tensor")  # the type: torch.compile does not see it on the tensor


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, for which torch.compile breaks its graph: groups and agreements are nothing that it can trace."""

    @functools.wraps(function)
    def inner(*args: P.args, **named: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **named)
        return function(*args, **named)

    return inner


def process_group(group: Group) -> Group:
    """``group``, or the default group for None.

    Raises:
        ValueError: torch.distributed is missing or not initialised, or this process is not in the group.
    """
    if not torch.distributed.is_available():
        raise ArgumentValueError("this build of torch has no torch.distributed, which vocabulary-parallel losses need")
    if group is None:
        if not torch.distributed.is_initialized():
            raise ArgumentValueError(
                "there is no default process group: call torch.distributed.init_process_group first, or pass group"
            )
        group = torch.distributed.group.WORLD
    if group is torch.distributed.GroupMember.NON_GROUP_MEMBER or torch.distributed.get_rank(group) < 0:
        raise ArgumentValueError("this process does not belong to group")
    return group


def collective_device(group: Group) -> torch.device:
    """Where the group's collectives take tensors."""
    return torch.device("cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu")


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


def sum_in_rank_order(x: Tensor) -> Tensor:
    """The sum of ``x`` [P, ...] over ranks, as a tree over neighbours: the same bits wherever the same ``x`` is."""
    while x.shape[0] > 1:
        pairs = x.shape[0] // 2
        joined = x[0 : 2 * pairs : 2] + x[1 : 2 * pairs : 2]
        x = joined if 2 * pairs == x.shape[0] else torch.cat([joined, x[-1:]])
    return x[0]


class Classes(NamedTuple):
    """Which rank of a group holds which classes."""

    starts: tuple[int, ...]
    """First class of each rank."""
    sizes: tuple[int, ...]
    """Classes of each rank; 0 is allowed."""

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def owners(self, target: Tensor) -> Tensor:
        """The rank that holds each class of ``target``, int64; of a value that is no class, some rank."""
        bounds, ranks = _borders(self, target.device)
        return ranks[torch.bucketize(target, bounds, right=True)]


@functools.lru_cache(maxsize=64)
def _borders(classes: Classes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the next rank begins, in the order of the classes, and the ranks in that order; on ``device``, once."""
    present = sorted((start, rank) for rank, start in enumerate(classes.starts) if classes.sizes[rank])
    bounds = torch.tensor([start for start, _ in present[1:]], device=device, dtype=torch.int64)
    return bounds, torch.tensor([rank for _, rank in present] or [0], device=device)


@dataclass(frozen=True)
class Proposal:
    """What a rank is about to compute. Ranks compare theirs before the first step that computes it."""

    class_start: int | None
    size: int
    num_classes: int | None
    options: tuple[tuple[str, Any], ...]
    """What has to be equal everywhere, by name: dtype, rows, losses' options."""
    lengths: tuple[tuple[str, int | None], ...]
    """Of each class vector, by name; None of one that is not given."""


class Agreement(NamedTuple):
    classes: Classes
    full: frozenset[str]
    """Class vectors that every rank was given for all classes; the others are given for the local ones, or not."""


_agreed: weakref.WeakKeyDictionary[Any, dict[Proposal, Agreement]] = weakref.WeakKeyDictionary()


def agree(proposal: Proposal | Exception, group: Group) -> Agreement:
    """Compares the ranks' proposals: one small collective, the first time a rank makes this proposal to the group.

    An exception in the place of a proposal is raised on every rank.

    Raises:
        ValueError: the proposals do not fit together; the same text on every rank.
    """
    known = _agreed.setdefault(group, {})
    if isinstance(proposal, Proposal) and proposal in known:
        return known[proposal]
    proposals: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(proposals, proposal, group=group)
    for rank, other in enumerate(proposals):
        if isinstance(other, Exception):
            raise type(other)(f"rank {rank}: {other}")
    agreement = joined(proposals)
    known[proposal] = agreement  # type: ignore[index]
    return agreement


def joined(proposals: list[Proposal]) -> Agreement:
    """What the proposals, in rank order, amount to together; see :func:`agree`."""
    for i, (name, _) in enumerate(proposals[0].options):
        _check_equal(name, [p.options[i][1] for p in proposals])
    classes = _joined_classes(proposals)
    full = set()
    for i, (name, _) in enumerate(proposals[0].lengths):
        lengths = [p.lengths[i][1] for p in proposals]
        _check_equal(f"whether {name} is given", [length is not None for length in lengths])
        if all(length == classes.total for length in lengths):
            full.add(name)
        elif None not in lengths and lengths != list(classes.sizes):
            raise ArgumentValueError(
                f"{name} has {lengths} elements on ranks 0 to {len(lengths) - 1}, expected {classes.total} on every "
                f"rank (all classes) or {list(classes.sizes)} (the local ones)"
            )
    return Agreement(classes, frozenset(full))


def _check_equal(name: str, values: list[Any]) -> None:
    for rank, value in enumerate(values):
        if value != values[0]:
            raise ArgumentValueError(f"ranks disagree on {name}: {values[0]!r} on rank 0, {value!r} on rank {rank}")


def _joined_classes(proposals: list[Proposal]) -> Classes:
    sizes = tuple(p.size for p in proposals)
    _check_equal("whether class_start is given", [p.class_start is not None for p in proposals])
    _check_equal("num_classes", [p.num_classes for p in proposals])
    num_classes = proposals[0].num_classes
    if num_classes is None and len(proposals) > 1 and any(sizes):
        raise ArgumentValueError(
            f"num_classes is None, expected the number of classes of all {len(proposals)} ranks together: without it a "
            f"rank that passes all classes looks like one that passes its share. The ranks pass {list(sizes)} classes"
        )
    starts = tuple(sum(sizes[:rank]) if p.class_start is None else p.class_start for rank, p in enumerate(proposals))
    ranges = sorted((start, start + size, rank) for rank, (start, size) in enumerate(zip(starts, sizes, strict=True)))
    ranges = [r for r in ranges if r[0] < r[1]]
    shown = ", ".join(f"[{start}, {stop}) on rank {rank}" for start, stop, rank in ranges)
    covered = 0
    for start, stop, _ in ranges:
        if start != covered:
            fault = "overlap" if start < covered else f"leave out [{covered}, {start})"
            raise ArgumentValueError(f"the ranks' classes {fault}: {shown}")
        covered = stop
    if num_classes not in (None, covered):
        raise ArgumentValueError(f"num_classes is {num_classes}, but the ranks hold {covered} classes: {shown}")
    return Classes(starts, sizes)
