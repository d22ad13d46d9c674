"""What the ranks of a loss have to agree on, and the one text that all of them raise where they do not."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from ..errors import ArgumentValueError
from .collectives import Group, all_gather, on_device

T = TypeVar("T")


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
    """A rank's error, as every rank can make it again."""

    kind: type[Exception]
    text: str

    @classmethod
    def of(cls, error: Exception) -> Refusal:
        """The nearest type that takes a text, of Python or longtail."""
        try:
            text = str(error)
        except Exception:  # others wait for it
            text = "an error without a text"
        for kind in type(error).__mro__:
            if kind.__module__ not in ("builtins", ArgumentValueError.__module__) or kind in (Exception, BaseException):
                continue
            try:
                kind("")
            except TypeError:  # UnicodeDecodeError, ExceptionGroup
                continue
            return cls(kind, text if kind is type(error) else f"{type(error).__name__}: {text}")
        return cls(RuntimeError, f"{type(error).__name__}: {text}")


def explain(own: Proposal | Exception, groups: list[Group]) -> NoReturn:
    """Raises what keeps the ranks from going on, where each of them has come to know that something does.

    ``groups``: one, or those of a mesh's dimensions in turn. Every rank of them calls it, and raises the same text, in
    which ranks have their numbers in the default group. An error that only its own rank can make stays itself there.
    """
    me = torch.distributed.get_rank()
    known: dict[int, Any] = {me: Refusal.of(own) if isinstance(own, Exception) else own}
    for group in groups:
        parts: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(parts, known, group=group)
        known = {rank: other for part in parts for rank, other in part.items()}
    known = dict(sorted(known.items()))
    cause = own if isinstance(own, Exception) else None
    for rank, other in known.items():
        if isinstance(other, Refusal):
            if cause is not None and rank == me and other.kind is not type(cause):
                raise cause
            raise other.kind(f"rank {rank}: {other.text}") from cause
    check_equal("num_classes", {rank: p.num_classes for rank, p in known.items()})
    check_equal("whether class_start is given", {rank: p.class_start is not None for rank, p in known.items()})
    for name in dict.fromkeys(name for p in known.values() for name, _ in p.options):
        check_equal(name, {rank: dict(p.options).get(name) for rank, p in known.items()})
    raise ArgumentValueError(f"ranks {list(known)} disagree: {list(known.values())}")


def checksum(target: Tensor) -> Tensor:
    """Of class indices and their order, int64, 0-d; float64 holds it, and sums of it over 8192 ranks."""
    mixed = target.cumsum(0) * -0x61C8864680B583EB  # odd, without a pattern
    return (mixed ^ (mixed >> 32)).sum() & ((1 << 40) - 1)


def agreed(mesh: Any, device: torch.device, check: Callable[[], tuple[T, dict[str, Any]]]) -> T:
    """What ``check`` finds, the second part of which has to be the same on every rank of the mesh.

    A few numbers travel along each dimension of the mesh, at every call. A GPU compares them without a host sync.
    ``device``: of the data.

    Raises:
        ValueError: ranks disagree. On a GPU: an assertion.
        Exception: of ``check`` on some rank, on every one; GPUs assert where it is another rank's.
    """
    groups = mesh_groups(mesh)
    own: Proposal | Exception
    try:
        found, same = check()
        own = Proposal(tuple(same.items()))
        mine = [0.0, float(own.fingerprint())]
    except Exception as error:
        own, mine = error, [1.0, 0.0]
    known = on_device(tuple(mine), device if device.type == mesh.device_type else torch.device(mesh.device_type))
    for group in groups:
        seen = all_gather(known, group)
        odd = (seen[:, 0] != 0) | (seen[:, 1] != known[1])
        known = torch.stack([odd.any().double(), known[1]])
    if mesh.device_type == "cpu" and groups and known[0]:
        explain(own, groups)
    if isinstance(own, Exception):
        raise own
    if mesh.device_type != "cpu":
        torch._assert_async(known[0] == 0, "longtail: ranks of a mesh disagree, or one refused its arguments")
    return found


def refuse_on_mesh(error: Exception, data: Any) -> NoReturn:
    """Raises ``error`` on every rank of the mesh of ``data``, a DTensor, in the place of what :func:`agreed` checks."""

    def check() -> NoReturn:
        raise error

    agreed(data.device_mesh, data.device, check)
    raise error


def mesh_groups(mesh: Any) -> list[Group]:
    """Of the dimensions of several ranks, in turn."""
    return [mesh.get_group(i) for i in range(mesh.ndim) if mesh.size(i) > 1]


def check_equal(name: str, values: dict[int, Any]) -> None:
    """``values`` by rank.

    Raises:
        ValueError: they are not all the same, as fingerprints have it: -0.0 is not 0.0, NaN is NaN.
    """
    (first, expected), *others = values.items()
    for rank, value in others:
        if repr(value) != repr(expected):
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
