"""The handshake of ranks: what they assume of each other, compared inside the first all-gather of every call.

    header + payload --all-gather--> headers compared; the payload of every rank

No call trusts what an earlier one found. Two things remain of those before: how long messages were, which all ranks of
a group have seen alike, so that an all-gather has one length whatever they disagree on; and where this rank's classes
began, a guess that the headers confirm. A payload that is too long for the message goes in a second all-gather, once
the headers have shown that every rank has one of its length.

The CPU reads the headers. A GPU compares them without a host sync, and reads them where this rank meets a head anew.
"""

from __future__ import annotations

import functools
import hashlib
import math
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..arguments import given_normalizer
from ..errors import ArgumentValueError
from .agreement import Proposal, check_equal, checksum, class_starts, explain
from .collectives import Group, all_gather, device_of, on_device, takes


class Column(IntEnum):
    """Of a header, float64."""

    FAULT = 0
    """1: this rank has refused its arguments."""
    SAME = 1
    """Fingerprint of the options."""
    BYTES = 2
    """Of the payload."""
    TARGET = 3
    """Checksum."""
    READS = 4
    """1: this rank reads the headers."""
    START = 5
    SIZE = 6
    RANGE = 7
    """See :func:`range_code`."""
    NORMALIZER = 8


EQUAL = 4  # columns from the first on
HEADER = 80  # bytes: a multiple of 16, as every part of a message
CALLS = 16  # whose longest message the next one has room for
HEADS = 64  # whose first class a rank remembers
TEXT = "longtail: ranks disagree on their classes, options, shapes, dtypes or targets, or one refused its arguments"


class _Memory:
    """What remains of a group's calls."""

    def __init__(self) -> None:
        self.rooms: deque[int] = deque([HEADER], maxlen=CALLS)
        self.starts: OrderedDict[tuple[Any, ...], int] = OrderedDict()
        self.calls = 0

    def remember(self, head: tuple[Any, ...], start: int) -> None:
        self.starts[head] = start
        self.starts.move_to_end(head)
        if len(self.starts) > HEADS:
            self.starts.popitem(last=False)


_memories: weakref.WeakKeyDictionary[Any, _Memory] = weakref.WeakKeyDictionary()


def range_code(start: int, stop: int) -> int:
    """Codes of ranges add up to that of [0, C) where, and but for chance only where, they cut it into pieces."""
    first, last = (  # hashes: multiples of bounds would add up of ranges that overlap, too
        int.from_bytes(hashlib.blake2b(x.to_bytes(8, "little"), digest_size=5).digest(), "little")
        for x in (start, stop)
    )
    return last - first


def reads_headers(device: torch.device, known: bool) -> bool:
    """Whether the host reads headers from ``device``: a GPU's cost a wait, which ``known`` heads do without."""
    return device.type == "cpu" or not known


def _borders(starts: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Where the next rank begins, in the order of the classes, and the ranks in that order."""
    bounds, ranks = starts.masked_fill(sizes == 0, 2.0**62).to(torch.int64).sort()
    return bounds[1:], ranks


@functools.lru_cache(maxsize=64)
def _known_borders(starts: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    return _borders(*(torch.tensor(x, dtype=torch.float64, device=device) for x in (starts, sizes)))


def _exchange(header: Tensor, payload: Tensor | None, group: Group) -> tuple[Tensor, Tensor | None]:
    """Every rank's header, and payload where it fits in the message."""
    room = max(_memories[group].rooms)
    message = torch.empty(room, dtype=torch.uint8, device=header.device)
    message[: header.nbytes].view(torch.float64).copy_(header)
    end = room if payload is None else HEADER + payload.nbytes
    if payload is not None and end <= room:
        message[HEADER:end].view(payload.dtype).copy_(payload.reshape(-1))
    received = all_gather(message, group)
    headers = received[:, : header.nbytes].view(torch.float64)
    if payload is None or end > room:
        return headers, None
    return headers, received[:, HEADER:end].view(payload.dtype).unflatten(1, payload.shape)


def refuse(error: Exception, group: Group, data: object) -> NoReturn:
    """Raises ``error`` on every rank, in the place of a :class:`Handshake`; GPUs that know their head assert.

    ``data``: what this rank was given for logits or hidden states.
    """
    if torch.distributed.get_world_size(group) == 1:
        raise error
    next_turn(group)
    _tell(error, group, device_of(data, group))


def next_turn(group: Group) -> int:
    """The number of one more of the group's calls."""
    memory = _memories.setdefault(group, _Memory())
    memory.calls += 1
    return memory.calls


def check_turn(turn: int, group: Group, device: torch.device) -> None:
    """Compares which of the group's calls the ranks are about to differentiate.

    Raises:
        RuntimeError: not the same one. On a GPU: an assertion.
    """
    if torch.distributed.get_world_size(group) == 1:
        return
    turns = all_gather(torch.full((1,), turn, dtype=torch.int64, device=device), group)
    text = "longtail: ranks run the backward passes of several losses in different orders"
    if device.type != "cpu":
        torch._assert_async((turns == turn).all(), text)
    elif (turns != turn).any():
        ranks = torch.distributed.get_process_group_ranks(group)
        shown = ", ".join(f"{n} on rank {rank}" for rank, n in zip(ranks, turns.flatten().tolist(), strict=True))
        raise RuntimeError(f"{text}: of all calls in the group, that of number {shown}")


def _tell(error: Exception, group: Group, device: torch.device) -> NoReturn:
    header = [0.0] * len(Column)
    header[Column.FAULT] = header[Column.READS] = 1.0
    headers, _ = _exchange(on_device(tuple(header), device), None, group)
    if headers[:, Column.READS].all():
        explain(error, [group])
    raise error


class Handshake:
    """One call of the ranks of a group: where this rank's classes begin, who holds a class, and gathers.

    As a context: what this rank raises before the ranks have compared what they assume is raised on every rank.
    """

    def __init__(
        self, proposal: Proposal, group: Group, target: Tensor, normalizer: str | float | Tensor | None
    ) -> None:
        self.group, self.proposal = group, proposal
        self.rank, self.world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        self._memory = _memories.setdefault(group, _Memory())
        self._target, self._normalizer = target, given_normalizer(normalizer, target.device)
        self._head = (proposal.class_start, proposal.size, proposal.num_classes)
        self._reads = reads_headers(target.device, self._head in self._memory.starts)
        self.start = self._guess()
        self._borders: tuple[Tensor, Tensor] | None = None
        if self.world == 1:
            class_starts((self.start,), (proposal.size,), proposal.total, (0,))
        elif not takes(group, target.device):
            raise ArgumentValueError(f"the data are on {target.device}, where group has no collectives")
        self.turn = next_turn(group)
        self._awaited = self.world > 1  # the other ranks wait, or will, for this one's header

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._awaited and isinstance(error, Exception):
            _tell(error, self.group, self._target.device)

    def _guess(self) -> int:
        """The first class of this rank: as given, as the last time, or as an even split has it."""
        class_start, total = self.proposal.class_start, self.proposal.total
        if class_start is not None:
            return class_start
        even = min(self.rank * -(-total // self.world), total - self.proposal.size)
        return self._memory.starts.get(self._head, even)

    def gather(self, payload: Callable[[], Tensor]) -> Tensor:
        """What ``payload`` makes on every rank, in rank order: [P, *payload.shape].

        The first one of a call compares the ranks. ``payload`` is called again where ``start`` was wrong.

        Raises:
            ValueError: ranks disagree; the same text on every rank. On a GPU that has met the head: an assertion.
        """
        if self._borders is not None or self.world == 1:
            return all_gather(payload().contiguous(), self.group)
        while True:
            sent = payload().contiguous()
            header = self._header(sent.nbytes)
            self._awaited = False
            headers, received = _exchange(header, sent, self.group)
            confirmed = self._compare(headers)
            self._memory.rooms.append(HEADER + -(-sent.nbytes // 16) * 16)
            if confirmed:
                self._target, self._normalizer = self._target.new_empty(0), None  # which others may free now
                return all_gather(sent, self.group) if received is None else received
            self._awaited = True

    def _header(self, payload_bytes: int) -> Tensor:
        size = self.proposal.size
        header = [0.0] * len(Column)
        header[Column.SAME] = self.proposal.fingerprint()
        header[Column.BYTES] = payload_bytes
        header[Column.READS] = self._reads
        header[Column.START], header[Column.SIZE] = self.start, size
        header[Column.RANGE] = range_code(self.start, self.start + size)
        found = on_device(tuple(header), self._target.device).clone()
        found[Column.TARGET] = checksum(self._target)
        if self._normalizer is not None:
            found[Column.NORMALIZER] = self._normalizer
        return found

    def _compare(self, headers: Tensor) -> bool:
        """Whether every rank's ``start`` is right, which settles who holds a class."""
        if not self._reads:
            torch._assert_async(self._fits(headers), TEXT)
            self._borders = _borders(headers[:, Column.START], headers[:, Column.SIZE])
            return True
        rows = headers.tolist()
        all_read = all(row[Column.READS] for row in rows)
        if any(row[Column.FAULT] or row[Column.SAME] != rows[0][Column.SAME] for row in rows):
            if all_read:
                explain(self.proposal, [self.group])
            raise ArgumentValueError(f"{TEXT}; this rank: {self.proposal}")
        ranks = torch.distributed.get_process_group_ranks(self.group)
        _check_values(rows, ranks)
        starts, sizes = (tuple(int(row[k]) for row in rows) for k in (Column.START, Column.SIZE))
        given = None if self.proposal.class_start is None else starts
        true = class_starts(given, sizes, self.proposal.total, tuple(ranks))
        confirmed = all(s == t or not size for s, t, size in zip(starts, true, sizes, strict=True))
        if not (confirmed or all_read):
            raise ArgumentValueError(f"{TEXT}: pass class_start, which {self.proposal} leaves to be found out")
        self.start = true[self.rank]
        self._memory.remember(self._head, self.start)
        if confirmed:
            self._borders = _known_borders(true, sizes, headers.device)
        return confirmed

    def _fits(self, headers: Tensor) -> Tensor:
        """What :meth:`_compare` reads, on the device."""
        fits = (headers[:, :EQUAL] == headers[self.rank, :EQUAL]).all() & (headers[self.rank, Column.FAULT] == 0)
        fits &= headers[:, Column.RANGE].sum() == range_code(0, self.proposal.total)
        if self.proposal.class_start is None:
            starts, sizes = headers[:, Column.START], headers[:, Column.SIZE]
            fits &= ((starts + sizes == sizes.cumsum(0)) | (sizes == 0)).all()
        if self._normalizer is not None:
            values = headers[:, Column.NORMALIZER]
            fits &= torch.isclose(values, values[self.rank], rtol=1e-5, atol=0.0, equal_nan=True).all()
        return fits

    def owners(self, target: Tensor) -> Tensor:
        """The rank that holds each class of ``target``, int64, after a gather; of what is no class, some rank."""
        if self._borders is None:
            return torch.zeros_like(target)
        bounds, ranks = self._borders
        return ranks[torch.bucketize(target.contiguous(), bounds, right=True)]

    def check_turn(self) -> None:
        """That every rank is about to differentiate this call; see :func:`check_turn`."""
        check_turn(self.turn, self.group, self._target.device)


def _check_values(rows: list[list[float]], ranks: list[int]) -> None:
    """What the device knows alone."""
    first = rows[0]
    if any(row[:EQUAL] != first[:EQUAL] for row in rows):
        for name, column in ("the values of target (by a checksum)", Column.TARGET), ("bytes sent", Column.BYTES):
            check_equal(name, {rank: row[column] for rank, row in zip(ranks, rows, strict=True)})
    expected, *others = (row[Column.NORMALIZER] for row in rows)
    if not all(math.isclose(v, expected, rel_tol=1e-5) or (math.isnan(v) and math.isnan(expected)) for v in others):
        check_equal("normalizer", dict(zip(ranks, (expected, *others), strict=True)))
