"""What the ranks of a loss have to agree on, and the one text that all of them raise where they do not."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch

from .distributed import Group, all_gather
from .errors import ArgumentTypeError, ArgumentValueError

T = TypeVar("T")
KINDS = (ArgumentValueError, ArgumentTypeError, IndexError, OverflowError, ValueError, TypeError)
"""Errors that are raised on the other ranks as they are; others are RuntimeErrors there."""


class Proposal(NamedTuple):
    """What a rank is about to compute."""

    options: tuple[tuple[str, Any], ...]
    """What has to be equal everywhere, by name: dtypes, rows, options."""
    size: int = 0
    """Classes that this rank holds."""
    class_start: int | None = None
    num_classes: int | None = None

    @property
    def total(self) -> int:
        """Classes of all ranks together."""
        return self.size if self.num_classes is None else self.num_classes

    def fingerprint(self) -> int:
        """Of what has to be equal everywhere; float64 holds it."""
        text = repr((self.num_classes, self.class_start is None, self.options))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")


class Refusal(NamedTuple):
    """A rank's error, as the others learn of it."""

    kind: type[Exception]
    text: str

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        exact: list[type[Exception]] = [k for k in KINDS if type(error) is k]
        near: list[type[Exception]] = [k for k in KINDS if isinstance(error, k)]
        return cls((exact or near or [RuntimeError])[0], str(error))


def explain(found: Proposal | Refusal, groups: list[Group]) -> NoReturn:
    """Raises what keeps the ranks from going on, where each of them has come to know that something does.

    ``groups``: one, or those of a mesh's dimensions in turn. Every rank of them calls it, and raises the same text, in
    which ranks have their numbers in the default group.
    """
    known = {torch.distributed.get_rank(): found}
    for group in groups:
        parts: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(parts, known, group=group)
        known = {rank: other for part in parts for rank, other in part.items()}
    known = dict(sorted(known.items()))
    for rank, other in known.items():
        if isinstance(other, Refusal):
            raise other.kind(f"rank {rank}: {other.text}")
    proposals: dict[int, Proposal] = known  # type: ignore[assignment]
    check_equal("num_classes", {rank: p.num_classes for rank, p in proposals.items()})
    check_equal("whether class_start is given", {rank: p.class_start is not None for rank, p in proposals.items()})
    names = dict.fromkeys(name for p in proposals.values() for name, _ in p.options)
    for name in names:
        check_equal(name, {rank: dict(p.options).get(name) for rank, p in proposals.items()})
    raise ArgumentValueError(f"ranks {list(proposals)} disagree: {list(proposals.values())}")


def agreed(mesh: Any, check: Callable[[], tuple[T, dict[str, Any]]]) -> T:
    """What ``check`` finds, the second part of which has to be the same on every rank of the mesh.

    A few numbers travel along each dimension of the mesh, at every call. A GPU compares them without a host sync.

    Raises:
        ValueError: ranks disagree. On a GPU: an assertion.
        Exception: of ``check`` on some rank, on every one; GPUs assert where it is another rank's.
    """
    groups = [mesh.get_group(i) for i in range(mesh.ndim) if mesh.size(i) > 1]
    fault: Exception | None = None
    proposal: Proposal | Refusal
    try:
        found, same = check()
        proposal = Proposal(tuple(same.items()))
        mine = [0.0, float(proposal.fingerprint())]
    except Exception as error:
        fault, proposal, mine = error, Refusal.of(error), [1.0, 0.0]
    known = torch.tensor(mine, dtype=torch.float64, device="cpu").to(mesh.device_type, non_blocking=True)
    for group in groups:
        seen = all_gather(known, group)
        odd = (seen[:, 0] != 0) | (seen[:, 1] != known[1])
        known = torch.stack([odd.any().double(), known[1]])
    if mesh.device_type != "cpu":
        torch._assert_async((known[0] == 0) | (fault is not None), "longtail: ranks of a mesh disagree, or one refused")
    elif groups and known[0]:
        explain(proposal, groups)
    if fault is not None:
        raise fault
    return found


def check_equal(name: str, values: dict[int, Any]) -> None:
    """``values`` by rank.

    Raises:
        ValueError: they are not all the same.
    """
    (first, expected), *others = values.items()
    for rank, value in others:
        if value != expected:
            raise ArgumentValueError(
                f"ranks disagree on {name}: {expected!r} on rank {first}, {value!r} on rank {rank}"
            )


@functools.lru_cache(maxsize=64)
def class_starts(
    given: tuple[int, ...] | None, sizes: tuple[int, ...], num_classes: int, ranks: tuple[int, ...]
) -> tuple[int, ...]:
    """The first class of each rank: as ``given``, or one after the other.

    Raises:
        ValueError: the ranks' classes overlap, leave some out or are not ``num_classes``.
    """
    starts = tuple(sum(sizes[:k]) for k in range(len(sizes))) if given is None else given
    ranges = sorted((start, start + size, rank) for start, size, rank in zip(starts, sizes, ranks, strict=True))
    ranges = [r for r in ranges if r[0] < r[1]]
    shown = ", ".join(f"[{start}, {stop}) on rank {rank}" for start, stop, rank in ranges)
    covered = 0
    for start, stop, _ in ranges:
        if start != covered:
            fault = "overlap" if start < covered else f"leave out [{covered}, {start})"
            raise ArgumentValueError(f"the ranks' classes {fault}: {shown}")
        covered = stop
    if num_classes != covered:
        raise ArgumentValueError(f"num_classes is {num_classes}, but the ranks hold {covered} classes: {shown}")
    return starts
