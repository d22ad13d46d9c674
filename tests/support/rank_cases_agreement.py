"""What each rank does in the tests of what ranks compare at every call; run by :mod:`ranks`."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import cases
import longtail
from longtail.parallel import handshake
from rank_cases import raised_by
from tolerances import assert_close

FEATURES = 6


class Heads:
    """Calls of both losses by the ranks of a group, with any sizes of their parts, against one process."""

    def __init__(self, group: Any, kind: str) -> None:
        self.group, self.kind = group, kind
        self.rank = dist.get_rank(group)

    def data(self, sizes: list[int], rows: int) -> tuple[Tensor, Tensor, Tensor]:
        g = cases.generator(rows)
        x, w = (torch.randn(n, FEATURES, generator=g, dtype=torch.float64) for n in (rows, sum(sizes)))
        return x, w, torch.randint(sum(sizes), (rows,), generator=g)

    def call(self, sizes: list[int], rows: int = 7, given: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
        """(loss, gradient of the hidden states that this rank finds)"""
        x, w, target = self.data(sizes, rows)
        begin = sum(sizes[: self.rank])
        own = w[begin : begin + sizes[self.rank]]
        shared: dict[str, Any] = {"group": self.group, "num_classes": sum(sizes)} | options
        if given:
            shared["class_start"] = begin
        if "target" in shared:
            target = shared.pop("target")
        x = x.to(shared.pop("dtype", torch.float64)).requires_grad_()
        if self.kind == "linear":
            loss = longtail.vocab_parallel_linear_cross_entropy(x, own.to(x.dtype), target, **shared)
            return loss, torch.autograd.grad(loss.sum(), x)[0]
        loss = longtail.vocab_parallel_cross_entropy(x @ own.to(x.dtype).T, target, **shared)
        (part,) = torch.autograd.grad(loss.sum(), x)
        dist.all_reduce(part, group=self.group)
        return loss, part

    def check(self, sizes: list[int], rows: int = 7, given: bool = False, **options: Any) -> None:
        loss, grad = self.call(sizes, rows, given, **options)
        x, w, target = self.data(sizes, rows)
        x.requires_grad_()
        truth = longtail.reference.cross_entropy(x @ w.T, target, **options)
        assert_close(loss.detach(), truth.detach(), what=f"loss of {sizes}", factor=8)
        assert_close(grad, torch.autograd.grad(truth.sum(), x)[0], what=f"gradient of {sizes}", factor=64)


def several_heads(group: Any, kind: str, given: bool, layouts: list[list[int]]) -> None:
    heads = Heads(group, kind)
    for _ in range(2):
        for sizes in layouts:
            heads.check(sizes, given=given)
            heads.check(sizes, rows=9, given=given, focal_gamma=2.0, reduction="sum")


def odd_one_out(group: Any, kind: str, odd: dict[str, Any], rank: int) -> tuple[str, str]:
    """All ranks have met all options; then one passes ``odd`` alone. What this one raises; all go on after it."""
    heads = Heads(group, kind)
    sizes = [3] * dist.get_world_size(group)
    for options in ({}, odd):
        with contextlib.suppress(Exception):
            heads.call(sizes, **options)
    mine = odd if heads.rank == rank else {}
    found = raised_by(lambda: heads.call(sizes, **mine))
    heads.check(sizes)
    return found


def as_gpus_do() -> Any:
    """Headers of heads that are known are compared by the device, whose assertion is an error on the CPU."""
    return mock.patch("longtail.parallel.handshake.reads_headers", side_effect=lambda _device, known: not known)


def compared_on_the_device(group: Any, kind: str) -> None:
    """Right or refused: what one rank can not see is never a number."""
    heads, two = Heads(group, kind), [[2, 3, 1], [2, 2, 2]]
    with as_gpus_do():
        for given in (True, False):
            for _ in range(3):
                heads.check([2, 2, 2], given=given)
                heads.check([4, 0, 3], given=given, weight=torch.arange(1.0, 8.0, dtype=torch.float64))
                heads.check([1, 3, 1], given=given, normalizer=torch.tensor(3.0))
        for sizes in two * 2:
            heads.check(sizes, given=True)


def odd_one_out_on_the_device(group: Any, kind: str, odd: dict[str, Any], rank: int) -> tuple[str, str]:
    with as_gpus_do():
        return odd_one_out(group, kind, odd, rank)


def changing_ranges_on_the_device(group: Any) -> list[str]:
    """What comes of heads of as many classes, whose ranges change, where no rank says where its own begin."""
    heads = Heads(group, "logits")
    found = []
    with as_gpus_do():
        for sizes in ([11, 33, 22], [11, 33, 22], [33, 11, 22], [22, 22, 22], [33, 22, 11], [11, 33, 22]):
            try:
                heads.check(sizes)
            except (ValueError, RuntimeError) as error:
                found.append(str(error))
            else:
                found.append("")
    return found


def normalizers(group: Any) -> tuple[tuple[str, str], ...]:
    heads = Heads(group, "logits")
    values: list[Any] = [7 if heads.rank == 0 else torch.tensor(7.0), 3 + heads.rank]
    return tuple(raised_by(lambda value=value: heads.call([3, 3], normalizer=value)) for value in values)


class Elsewhere:
    """No tensor, but it has a device."""

    device = "elsewhere"


def data_that_do_not_travel(group: Any) -> list[tuple[str, str]]:
    """One rank passes data from where the group takes none: what each call raises; all go on after it."""
    heads = Heads(group, "logits")
    loss, found = longtail.vocab_parallel_cross_entropy, []
    logits, target = torch.empty(7, 3, device="meta"), torch.empty(7, dtype=torch.int64, device="meta")
    for odd in ({"local_logits": logits, "target": target}, {"local_logits": logits}, {"local_logits": Elsewhere()}):
        mine: dict[str, Any] = {"local_logits": torch.zeros(7, 3), "target": torch.arange(7) % 6}
        mine |= odd if heads.rank == 1 else {}
        found.append(raised_by(lambda mine=mine: loss(**mine, group=group, num_classes=6)))
        heads.check([3, 3])
    return found


def numbers_of_numpy(group: Any, kind: str) -> None:
    """Integers and truth values are what they are worth, whatever their type."""
    heads = Heads(group, kind)
    odd: dict[str, Any] = {"num_classes": np.int64(6), "class_start": np.int64(3 * heads.rank), "return_stats": 0}
    if kind == "linear":
        odd |= {"chunk_size": np.int32(4), "sequence_parallel": 0}
    plain = {"class_start": 3 * heads.rank} | ({"chunk_size": 4} if kind == "linear" else {})
    heads.call([3, 3], **odd if heads.rank else plain)


def targets_alike(group: Any) -> list[tuple[str, str]]:
    """Targets of as many of each class, which a sum of classes times rows does not tell apart, and of large sums."""
    shared, rank = {"group": group, "num_classes": 2**40}, dist.get_rank(group)
    cases = [([0, 1, 1, 0], [1, 0, 0, 1]), ([2**39] * 999 + [0], [2**39] * 999 + [1])]
    return [
        raised_by(
            lambda pair=pair: longtail.vocab_parallel_cross_entropy(
                torch.zeros(len(pair[rank]), 0), torch.tensor(pair[rank]), **shared
            )
        )
        for pair in cases
    ]


def failing(group: Any, kind: str, step: str, rank: int) -> tuple[str, str]:
    """A step fails on one rank, in the middle of a call."""
    heads = Heads(group, kind)
    sizes = [3] * dist.get_world_size(group)
    heads.check(sizes)
    broken = mock.patch(f"longtail.{step}", side_effect=MemoryError("no memory"))
    with broken if heads.rank == rank else contextlib.nullcontext():
        found = raised_by(lambda: heads.call(sizes))
    heads.check(sizes)
    return found


def memory_of_many_calls(group: Any) -> None:
    """What remains of calls does not grow with them."""
    heads = Heads(group, "logits")
    for n in range(1, 101):
        heads.call([n, n], rows=n, given=n % 2 == 0)
    memory = handshake._memories[group]
    assert len(memory.rooms) <= handshake.CALLS
    assert len(memory.starts) <= handshake.HEADS


def backward_in_two_orders(group: Any, sequence_parallel: bool) -> list[tuple[str, str]]:
    """Two losses, whose backward passes the last rank runs the other way round: what each of them raises."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    target = torch.arange(2 * world)
    losses = []
    for seed in range(2):
        g = cases.generator(seed)
        x = torch.randn(2 if sequence_parallel else 2 * world, FEATURES, generator=g).requires_grad_()
        losses.append(
            longtail.vocab_parallel_linear_cross_entropy(
                *(x, torch.randn(2, FEATURES, generator=g), target),
                group=group,
                num_classes=2 * world,
                gradient="backward",
                sequence_parallel=sequence_parallel,
            )
        )
    found = [raised_by(loss.backward) for loss in (losses[::-1] if rank == world - 1 else losses)]
    for loss in losses:
        loss.backward()
    return found


def meshes_as_groups(group: Any) -> list[tuple[str, str]]:
    """A 1-D mesh is a group; of other things the error says what is expected."""
    logits, target, classes = torch.randn(4, 2), torch.arange(4), 2 * dist.get_world_size(group)

    def call(over: Any) -> Tensor:
        loss: Tensor = longtail.vocab_parallel_cross_entropy(logits, target, group=over, num_classes=classes)
        return loss

    torch.manual_seed(dist.get_rank())
    mesh = DeviceMesh.from_group(group, "cpu")
    assert torch.equal(call(mesh), call(group))
    counts = longtail.class_counts(torch.arange(3), 3, reduce=True, group=mesh)
    assert counts.tolist() == [dist.get_world_size(group)] * 3
    grid, part = init_device_mesh("cpu", (2, 2)), DeviceMesh("cpu", [0, 1])
    found = [raised_by(lambda: call(grid)), raised_by(lambda: call("tp"))]
    return found if dist.get_rank() < 2 else [*found, raised_by(lambda: call(part))]


def functional_gradients(group: Any, kind: str, gradient: str) -> None:
    """torch.func.grad of the losses is what autograd finds."""
    heads, sizes = Heads(group, kind), [3, 4]
    x, w, target = heads.data(sizes, 7)
    begin = sum(sizes[: heads.rank])
    own = w[begin : begin + sizes[heads.rank]].clone()
    shared = {"group": group, "num_classes": 7, "gradient": gradient}

    def loss(x: Tensor, own: Tensor) -> Tensor:
        if kind == "linear":
            return longtail.vocab_parallel_linear_cross_entropy(x, own, target, **shared) * 3
        return longtail.vocab_parallel_cross_entropy(x @ own.T, target, **shared) * 3

    got = torch.func.grad(loss, (0, 1))(x, own)
    leaves = x.clone().requires_grad_(), own.clone().requires_grad_()
    for one, other in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert_close(one, other)
