"""How the passes of a batch are launched, and the emulated kernels as what computes one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from batches import Batch, ProbabilityBatch, SigmoidBatch, SoftmaxBatch
from hierarchical_batches import HierarchicalBatch
from layouts import laid
from longtail.ops.layout import row_count
from tolerances import assert_same
from two_way_cases import TwoWayBatch

from . import harness
from .harness import BACKWARD, LOSS, LOSS_AND_GRAD, SHARED, SWEEP, WARP, Launch, Plan, describe, poisoned
from .passes import hierarchical_launch, sigmoid_launch, softmax_launch, two_way_launch


@dataclass(frozen=True)
class Plans:
    """One for each pass; `vector`: whether they need rows of logits and gradient that lie alike."""

    loss: Plan
    backward: Plan
    both: Plan
    device = "cpu"
    again = True

    @property
    def vector(self) -> bool:
        return self.both.vector

    def gradient_factor(self, _dtype: torch.dtype) -> float:
        return 1.0

    def softmax(self, batch: SoftmaxBatch, otherwise: bool = False) -> None:
        harness.run([one.otherwise() if otherwise else one for one in launches(batch)])

    def sigmoid(self, batch: SigmoidBatch, otherwise: bool = False) -> None:
        harness.run([one.otherwise() if otherwise else one for one in launches(batch)])

    def probabilities(self, batch: ProbabilityBatch, otherwise: bool = False) -> None:
        harness.run([one.otherwise() if otherwise else one for one in launches(batch)])

    def hierarchical(self, batch: HierarchicalBatch, otherwise: bool = False) -> None:
        harness.run([one.otherwise() if otherwise else one for one in launches(batch)])

    def two_way(self, batch: TwoWayBatch, otherwise: bool = False) -> None:
        harness.run([one.otherwise() if otherwise else one for one in launches(batch)])

    def hierarchical_stats(self, shard: HierarchicalBatch, otherwise: bool = False) -> None:
        harness.run([one.otherwise() if otherwise else one for one in launches(shard) if one.pass_ != BACKWARD])

    def hierarchical_grads(self, shard: HierarchicalBatch, stats: Tensor, otherwise: bool = False) -> None:
        found = shard_backward(shard, self, stats)
        harness.run([one.otherwise() if otherwise else one for one in found])

    def scale(self, grad: Tensor, factor: Tensor, target: Tensor | None = None) -> None:
        """On devices of one multiprocessor and of many, in both orders: to the same bits."""
        flat = torch.empty(0, dtype=grad.dtype).set_(grad.untyped_storage()).clone()
        copies = [flat.clone().as_strided(grad.shape, grad.stride(), grad.storage_offset()) for _ in range(3)]
        few, *others = (
            harness.scaling(x, factor, n, target) for x, n in zip((grad, *copies), (1, 132, 1, 132), strict=True)
        )
        harness.run([few, others[0], *(one.otherwise() for one in others[1:])])
        for again in copies:
            assert_same(again, grad, "in another order")


def launches(batch: Batch) -> list[Launch]:
    """All passes, of which each writes results of its own, by the plans that are the batch's kernels."""
    plans = batch.kernels
    assert isinstance(plans, Plans)
    if isinstance(batch, ProbabilityBatch):
        return _probability_launches(batch, plans)
    z, written = batch.laid(batch.logits), batch.laid(batch.logits)
    grads = [laid(poisoned(z.shape, z.dtype), batch.grad_layout) for _ in range(2)]
    batch.z, batch.grads = z, [*grads, written]
    if isinstance(batch, SoftmaxBatch):
        return _softmax_launches(batch, plans, written)
    if isinstance(batch, HierarchicalBatch):
        return _hierarchical_launches(batch, plans, written)
    if isinstance(batch, TwoWayBatch):
        return _two_way_launches(batch, plans, written)
    assert isinstance(batch, SigmoidBatch)
    return _sigmoid_launches(batch, plans, written)


def _softmax_launches(batch: SoftmaxBatch, plans: Plans, written: Tensor) -> list[Launch]:
    rows = len(batch.target)
    batch.losses = [poisoned((rows,)) for _ in range(3)]
    batch.stats = [poisoned((5, rows)).t() if written.dim() == 3 else poisoned((rows, 5)) for _ in range(3)]
    (l0, l1, l2), (s0, s1, s2), (g0, g1, g2), up = batch.losses, batch.stats, batch.grads, batch.up
    inputs, in_place = (batch.z, batch.target, batch.tail), (written, batch.target, batch.tail)
    return [
        softmax_launch(LOSS, plans.loss, *inputs, loss=l0, stats=s0),
        softmax_launch(BACKWARD, plans.backward, *inputs, stats=s0, grad=g0, up=up),
        softmax_launch(LOSS_AND_GRAD, plans.both, *inputs, loss=l1, stats=s1, grad=g1, up=up),
        softmax_launch(LOSS_AND_GRAD, plans.both, *in_place, loss=l2, stats=s2, grad=g2, up=up),
    ]


def _probability_launches(batch: ProbabilityBatch, plans: Plans) -> list[Launch]:
    batch.z, y, rows = batch.laid(batch.logits), batch.y, len(batch.logits)
    batch.losses, batch.stats = [poisoned((rows,))], [poisoned((rows, 5))]
    batch.grads = [laid(poisoned(batch.z.shape, batch.z.dtype), batch.grad_layout)]
    (loss,), (stats,), (grad,) = batch.losses, batch.stats, batch.grads
    inputs = batch.z, y, batch.tail
    return _fitting([
        softmax_launch(LOSS, plans.loss, *inputs, loss=loss, stats=stats),
        softmax_launch(BACKWARD, plans.backward, *inputs, stats=stats, grad=grad, up=batch.up),
    ])  # fmt: skip


def _fitting(found: list[Launch]) -> list[Launch]:
    """Vectors where the matrices allow them, as the operators do."""
    plans = [replace(one.plan, vector=one.plan.vector and describe(one).alike) for one in found]
    return [replace(one, plan=plan) for one, plan in zip(found, plans, strict=True)]


def _sigmoid_launches(batch: SigmoidBatch, plans: Plans, written: Tensor) -> list[Launch]:
    shape = batch.logits.shape if batch.elementwise else (row_count(batch.logits),)
    batch.losses = [poisoned(shape) for _ in range(3)]
    (l0, l1, l2), (g0, g1, g2), up, y = batch.losses, batch.grads, batch.up, batch.y
    inputs, in_place = (batch.z, y, batch.tail), (written, y, batch.tail)
    return _fitting([
        sigmoid_launch(LOSS, plans.loss, *inputs, loss=l0),
        sigmoid_launch(BACKWARD, plans.backward, *inputs, grad=g0, up=up),
        sigmoid_launch(LOSS_AND_GRAD, plans.both, *inputs, loss=l1, grad=g1, up=up),
        sigmoid_launch(LOSS_AND_GRAD, plans.both, *in_place, loss=l2, grad=g2, up=up),
    ])  # fmt: skip


def _two_way_launches(batch: TwoWayBatch, plans: Plans, written: Tensor) -> list[Launch]:
    rows = row_count(batch.logits)
    batch.losses = [poisoned((rows,)) for _ in range(3)]
    batch.stats = [poisoned((4, rows)).t() if written.dim() == 3 else poisoned((rows, 4)) for _ in range(3)]
    (l0, l1, l2), (s0, s1, s2), (g0, g1, g2), up, y = batch.losses, batch.stats, batch.grads, batch.up, batch.y
    inputs, in_place = (batch.z, y, batch.tail), (written, y, batch.tail)
    return _fitting([
        two_way_launch(LOSS, plans.loss, *inputs, loss=l0, stats=s0),
        two_way_launch(BACKWARD, plans.backward, *inputs, stats=s0, grad=g0, up=up),
        two_way_launch(LOSS_AND_GRAD, plans.both, *inputs, loss=l1, stats=s1, grad=g1, up=up),
        two_way_launch(LOSS_AND_GRAD, plans.both, *in_place, loss=l2, stats=s2, grad=g2, up=up),
    ])  # fmt: skip


def _hierarchical_launches(batch: HierarchicalBatch, plans: Plans, written: Tensor) -> list[Launch]:
    rows, columns = len(batch.target), 2 * batch.tail[0].shape[1] + 1
    batch.losses = [poisoned((rows,)) for _ in range(3)]
    batch.stats = [poisoned((rows, columns)) for _ in range(3)]
    (l0, l1, l2), (s0, s1, s2), (g0, g1, g2), up = batch.losses, batch.stats, batch.grads, batch.up
    inputs, in_place = (batch.z, batch.target, batch.tail), (written, batch.target, batch.tail)
    return _fitting([
        hierarchical_launch(LOSS, plans.loss, *inputs, loss=l0, stats=s0),
        hierarchical_launch(BACKWARD, plans.backward, *inputs, stats=s0, grad=g0, up=up),
        hierarchical_launch(LOSS_AND_GRAD, plans.both, *inputs, loss=l1, stats=s1, grad=g1, up=up),
        hierarchical_launch(LOSS_AND_GRAD, plans.both, *in_place, loss=l2, stats=s2, grad=g2, up=up),
    ])  # fmt: skip


def shard_backward(shard: HierarchicalBatch, plans: Plans, stats: Tensor) -> list[Launch]:
    """From the statistics of all shards: into a gradient of its own, and in place."""
    shard.z, written = shard.laid(shard.logits), shard.laid(shard.logits)
    shard.grads = [laid(poisoned(written.shape, written.dtype), shard.grad_layout), written]
    rest, more = (shard.target, shard.tail), {"stats": stats, "up": shard.up}
    return _fitting([
        hierarchical_launch(BACKWARD, plans.backward, shard.z, *rest, grad=shard.grads[0], **more),
        hierarchical_launch(BACKWARD, plans.backward, written, *rest, grad=written, **more),
    ])  # fmt: skip


def swept(cluster: int = 1, vector: bool = True, threads: int = 64) -> Plans:
    plan = Plan(SWEEP, vector, threads, cluster=cluster)
    return Plans(plan, plan, plan)


def kept(cluster: int = 1, threads: int = 64) -> Plans:
    """The row in shared memory between its two uses."""
    sweep = Plan(SWEEP, True, threads, cluster=cluster)
    return Plans(sweep, sweep, Plan(SHARED, True, threads, cluster=cluster))


def in_warp(lanes: int, vector: bool = False, batch: int = 1) -> Plans:
    plan = Plan(WARP, vector, 64, lanes=lanes, batch=batch)
    return Plans(plan, plan, plan)


def over_pixels(lanes: int, threads: int = 64, vector: bool = True, kept: bool = False) -> Plans:
    """kept: the logits stay in shared memory between their two uses."""
    sweep = Plan(SWEEP, vector, threads, lanes)
    return Plans(sweep, sweep, Plan(SHARED if kept else SWEEP, vector, threads, lanes))


REGIMES: dict[str, Plans] = {
    "block": swept(),
    "single_elements": swept(vector=False),
    "one_warp": swept(threads=32),
    "widest": swept(threads=256),
    **{f"cluster_{n}": swept(n) for n in (2, 4, 8, 16)},
    "single_elements_cluster": swept(2, vector=False, threads=32),
    "single_elements_wide": swept(2, vector=False),
    **{f"kept_{n}": kept(n) for n in (1, 2, 4, 8, 16)},
    "warp": in_warp(32),
    "warp_of_vectors": in_warp(32, vector=True, batch=4),
}
# Pixels of whole groups, and single ones.
PIXELS: dict[str, Plans] = {
    "alone": over_pixels(32, 32),
    "shared_classes": over_pixels(8, 64),
    "kept": over_pixels(16, 64, kept=True),
    "kept_alone": over_pixels(32, 32, kept=True),
    "single_alone": over_pixels(64, 64, vector=False),
    "single": over_pixels(32, 128, vector=False),
    "single_kept": over_pixels(32, 64, vector=False, kept=True),
}
# Of the sigmoid family: rows, whatever the lanes; pixels whose classes are in one thread, in one warp or in many.
SIGMOID_REGIMES: dict[str, Plans] = {
    "lane": in_warp(1, vector=True),
    "lanes": in_warp(8, vector=True),
    "warp": in_warp(32, vector=True),
    "warp_of_single_elements": in_warp(32),
    "block": swept(),
    "widest": swept(threads=256),
    "cluster_2": swept(2),
    "cluster_16": swept(16, threads=32),
    "single_elements": swept(2, vector=False, threads=32),
}
SIGMOID_PIXELS: dict[str, Plans] = {
    "along": over_pixels(32, 32),
    "in_a_warp": over_pixels(4, 32),
    "warps": over_pixels(32, 128),
    "widest": over_pixels(4, 256),
    "single_pixels": over_pixels(32, 32, vector=False),
    "single_pixels_spread": over_pixels(16, 64, vector=False),
}

# Of hierarchical cross-entropy: a block per row.
HIERARCHICAL_REGIMES: dict[str, Plans] = {
    "one_warp": swept(threads=32),
    "block": swept(),
    "widest": swept(threads=256),
    "single_elements": swept(vector=False),
}


def emulated(plans: dict[str, Plans], *names: str) -> dict[str, Plans]:
    """Those of the names, or all, as `kernels.over` takes them."""
    return {f"emulated-{name}": plans[name] for name in names or plans}


def warps(classes: int, dtype: torch.dtype) -> list[Plans]:
    """The least and the most lanes for single elements, and for vectors if rows are made of them; rows alone, and as
    many together as a team of lanes may have."""
    held = {True: 32, False: 16}
    per_vector = 16 // dtype.itemsize
    plans = []
    for vector in (False, True):
        fitting = [n for n in (1, 2, 4, 8, 16, 32) if n * held[vector] >= classes]
        if fitting and not (vector and classes % per_vector):
            plans += [in_warp(n, vector) for n in {fitting[0], 32}]
            plans += [in_warp(n, vector, batch=min(n, 8)) for n in {fitting[0], 32} if n > 1]
    return plans
