"""One batch through the emulated kernels, all passes, against float64."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cases
from longtail.ops import fallback
from tolerances import assert_close, assert_same

from .harness import BACKWARD, LOSS, LOSS_AND_GRAD, SHARED, SWEEP, WARP, Launch, Plan, launch, poisoned

# The order of the sum of a row's U, and the hardware's exp, cost more digits than eager PyTorch's sums do.
STATS_FACTOR = 4


@dataclass(frozen=True)
class Plans:
    """One for each pass; `vector`: whether they need rows of logits and gradient that lie alike."""

    loss: Plan
    backward: Plan
    both: Plan

    @property
    def vector(self) -> bool:
        return self.both.vector


def swept(cluster: int = 1, vector: bool = True, threads: int = 64) -> Plans:
    plan = Plan(SWEEP, vector, threads, cluster=cluster)
    return Plans(plan, plan, plan)


def kept(cluster: int = 1, threads: int = 64) -> Plans:
    """The row in shared memory between its two uses."""
    sweep = Plan(SWEEP, True, threads, cluster=cluster)
    return Plans(sweep, sweep, Plan(SHARED, True, threads, cluster=cluster))


def in_warp(lanes: int, vector: bool = False) -> Plans:
    plan = Plan(WARP, vector, 64, lanes=lanes)
    return Plans(plan, plan, plan)


REGIMES: dict[str, Plans] = {
    "block": swept(),
    "single_elements": swept(vector=False),
    "one_warp": swept(threads=32),
    "widest": swept(threads=256),
    **{f"cluster_{n}": swept(n) for n in (2, 4, 8, 16)},
    "single_elements_cluster": swept(2, vector=False, threads=32),
    **{f"kept_{n}": kept(n) for n in (1, 2, 4, 8, 16)},
}


def far_apart(x: Tensor) -> Tensor:
    """Rows more than 2^31 elements apart, of which only they themselves take memory."""
    stride, flags = 2**31 + 24, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    count = (len(x) - 1) * stride + x.shape[1]
    memory = torch.frombuffer(mmap.mmap(-1, count * x.itemsize, flags), dtype=x.dtype)
    rows = memory.as_strided(x.shape, (stride, 1))
    return rows.copy_(x)


LAYOUTS = {**cases.LAYOUTS, "far_apart": far_apart}


def poisoned_like(x: Tensor, layout: str) -> Tensor:
    return LAYOUTS[layout](poisoned(x.shape, x.dtype))


def assert_padding_untouched(x: Tensor, what: str) -> None:
    """Whatever lies in the storage of x but not in x is NaN, as cases.LAYOUTS leaves it."""
    everything = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    outside = torch.ones_like(everything, dtype=torch.bool)
    outside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
    assert everything[outside].isnan().all(), f"{what}: written outside of the rows"


class Batch:
    """Logits and outputs for one run over all passes: loss, backward, both, both in place."""

    def __init__(
        self,
        plans: Plans,
        case: tuple[Tensor, Tensor],
        options: dict[str, Any],
        up: Tensor | None = None,
        layout: str = "contiguous",
        grad_layout: str | None = None,
    ) -> None:
        self.logits, self.target = case
        self.tail = cases.operator_options(self.logits.shape[1], options)
        self.up = cases.upstreams(self.target.shape, torch.float32)["random"] if up is None else up
        self.plans, self.layout, self.grad_layout = plans, layout, grad_layout or layout

    def launches(self) -> list[Launch]:
        n = len(self.target)
        self.z = LAYOUTS[self.layout](self.logits)
        self.written = LAYOUTS[self.layout](self.logits)
        self.losses = [poisoned((n,)) for _ in range(3)]
        self.stats = [poisoned((n, 5)) for _ in range(3)]
        self.grads = [poisoned_like(self.logits, self.grad_layout) for _ in range(2)]
        inputs, in_place = (self.z, self.target), (self.written, self.target)
        tail, plans = self.tail, self.plans
        loss, stats, grad = self.losses, self.stats, self.grads
        return [
            launch(LOSS, plans.loss, *inputs, tail, loss=loss[0], stats=stats[0]),
            launch(BACKWARD, plans.backward, *inputs, tail, stats=stats[0], grad=grad[0], up=self.up),
            launch(LOSS_AND_GRAD, plans.both, *inputs, tail, loss=loss[1], stats=stats[1], grad=grad[1], up=self.up),
            launch(
                LOSS_AND_GRAD, plans.both, *in_place, tail, loss=loss[2], stats=stats[2], grad=in_place[0], up=self.up
            ),
        ]

    def check(self, factor: float = 1.0) -> None:
        """Every output against float64, and the ignored rows."""
        wide = [x.double() if isinstance(x, Tensor) else x for x in self.tail]
        truth = fallback.softmax_loss_and_grad(self.up.double(), self.logits.double(), self.target, *wide)
        eager = fallback.softmax_loss_and_grad(self.up, self.logits, self.target, *self.tail)
        for loss in self.losses:
            assert_close(loss, truth[0], eager[0], what="loss", factor=factor)
        defined = ~truth[0].isnan()
        for stats in self.stats:
            parts = (stats[defined], truth[1][defined], eager[1][defined])
            assert_close(*parts, what="stats", factor=STATS_FACTOR * factor)
            assert not stats[~defined].isfinite().all(1).any(), "stats of a row without a loss say so"
        for grad in (*self.grads, self.written):
            assert_close(grad, truth[2], eager[2], what="gradient", factor=factor)
            if "far_apart" not in (self.layout, self.grad_layout):
                assert_padding_untouched(grad, "gradient")
        assert_same(self.z, self.logits, "logits")
        ignored = self.target == cases.IGNORE
        for value in (*self.losses, *self.stats, *self.grads, self.written):
            assert (value[ignored] == 0).all(), "ignored rows are exactly 0"

    def outputs(self) -> list[Tensor]:
        return [x.clone() for x in (*self.losses, *self.stats, *self.grads, self.written)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's threads cost more than they give on tensors of this size, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(run: Callable[[Iterable[Launch]], Any], batch: Batch, factor: float = 1.0) -> None:
    """Both orders of threads and both sizes of grid: right, and the same bits."""
    run(batch.launches())
    batch.check(factor)
    first = batch.outputs()
    run([one.otherwise() for one in batch.launches()])
    for one, other in zip(first, batch.outputs(), strict=True):
        assert_same(one, other, "in another order")
