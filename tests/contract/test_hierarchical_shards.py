"""Promise: of shards of the classes, whatever the tree, the operators make statistics and the gradient of all of them.

Each shard reads its own columns, and where they lie in the tree. What the shards know of a row is combined between the
two operators: the larger maximum of each ring, the sums moved to it, and the target's logit from where the target is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import hierarchy_cases
import longtail
from batches import check, one_thread, random_case
from emulation.harness import LaunchFailed
from emulation.plans import HIERARCHICAL_REGIMES, emulated
from hierarchical_batches import HierarchicalBatch, operator_options, tree
from hierarchical_shards import ShardedBatch, ShardKernels, elsewhere, of_targets, shard_options
from interpreted import HALVES, TRAPPED
from kernels import CPU, GPU, TRITON, over
from longtail import Hierarchy
from longtail.options import HierarchicalOptions
from tolerances import assert_close, assert_same

BOTH = (False, True)  # classes at their own positions, or shuffled
REGIMES = emulated(HIERARCHICAL_REGIMES, "one_warp", "block", "single_elements")
FEW = emulated(HIERARCHICAL_REGIMES, "block", "single_elements")
BLOCK = emulated(HIERARCHICAL_REGIMES, "block")
# Rows, depth, the classes of each shard.
CASES: list[tuple[int, int, tuple[int, ...]]] = [
    *((4, 1, (1, 0)), (4, 1, (0, 1, 0, 1)), (7, 1, (6, 7)), (7, 1, (0, 1, 4, 0, 1, 7, 0))),
    *((7, 3, (20, 21)), (7, 3, (0, 1, 13, 0, 1, 26, 0)), (4, 8, (75, 75)), (4, 8, (1, 149))),
]
FOR_TRITON = [(3, 1, (6, 7)), (2, 3, (0, 1, 13, 26))]  # the interpreter is slow


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize(
    ("kernels", "case", "shuffled"),
    [
        *over(CPU | REGIMES, CASES, BOTH),
        *over(TRITON, FOR_TRITON, BOTH),
        *over(GPU, [*CASES, (40, 3, (20000, 0, 30257))], BOTH),
    ],
)
def test_shards_make_the_whole(kernels: ShardKernels, case: tuple[int, int, tuple[int, ...]], shuffled: bool) -> None:
    rows, depth, sizes = case
    check(ShardedBatch.cut(kernels, tree(sum(sizes), depth, shuffled), sizes, rows))
    if rows > 4:
        check(ShardedBatch.cut(kernels, tree(sum(sizes), depth, shuffled), sizes, rows, vectors=False))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("name", ["ordered", "shuffled"])
@pytest.mark.parametrize("kernels", over(CPU))
def test_nodes_of_every_size_in_rows_of_several_blocks(kernels: ShardKernels, name: str, dtype: torch.dtype) -> None:
    """Beside and within shards, from one class to nearly all: where large ones are found once for all rows, too."""
    hierarchy, _ = hierarchy_cases.tree(name)
    for sizes in ((1100, 0, 400), (260, 1, 1239)):
        check(ShardedBatch.cut(kernels, hierarchy, sizes, 48, dtype), factor=2)


@pytest.mark.parametrize("kernels", over(CPU | TRITON | BLOCK))
def test_nodes_that_hold_a_whole_shard(kernels: ShardKernels) -> None:
    """One at the top, or two, one below the other; the classes of those further down alternate."""
    paths = [(("all",), ())[k] + ("ab"[c >= 150], "xyz"[c % 3], c) for k in range(2) for c in range(300)]
    for hierarchy in (Hierarchy.from_paths(paths[:300]), Hierarchy.from_paths(paths[300:])):
        check(ShardedBatch.cut(kernels, hierarchy, (150, 150), 3))


@pytest.mark.parametrize("kernels", over(TRITON | BLOCK))
def test_rows_of_several_blocks(kernels: ShardKernels) -> None:
    check(ShardedBatch.cut(kernels, hierarchy_cases.tree("shuffled")[0], (700, 800), 3))


@pytest.mark.parametrize(
    ("kernels", "dtype", "shuffled"),
    [*over(CPU, [torch.float64], BOTH), *over(CPU | FEW | GPU, HALVES, BOTH), *over(TRITON, HALVES, [True])],
)
def test_every_type(kernels: ShardKernels, dtype: torch.dtype, shuffled: bool) -> None:
    check(ShardedBatch.cut(kernels, tree(103, 3, shuffled), (60, 43), 5, dtype))


@pytest.mark.parametrize(
    ("kernels", "sizes", "margins", "targets"),
    [
        *over(CPU | BLOCK | GPU, [(6, 13), (1, 0, 18), (18, 1)], [(20.0, 100.0, 1e4)], [(0, 5, 9, 18)]),
        *over(TRITON, [(6, 13)], [(20.0, 1e4)], [(5,)]),
    ],
)
def test_saturation(
    kernels: ShardKernels, sizes: tuple[int, ...], margins: tuple[float, ...], targets: tuple[int, ...]
) -> None:
    """Margins of the target on both sides, of each class to the next, and a large common offset."""
    noise, one, rising = torch.randn(19, 19, generator=cases.generator(1)), torch.eye(19), torch.arange(19)
    logits = [noise + margin * x for margin in margins for x in (one, -one, rising, -rising)]
    for shuffled in BOTH:
        check(of_targets(kernels, [*logits, noise + 1e4], targets, sizes, shuffled), factor=2)


@pytest.mark.parametrize(
    ("kernels", "shuffled", "targets"),
    [*over(CPU | FEW | GPU, BOTH, [tuple(range(19))]), *over(TRITON, [True], [(1, 5)])],
)
def test_infinite_and_undefined_logits(kernels: ShardKernels, shuffled: bool, targets: tuple[int, ...]) -> None:
    noise, one = torch.randn(19, 19, generator=cases.generator(2)), torch.eye(19, dtype=torch.bool)
    absent, left, odd = noise.clone(), noise.clone(), noise.clone()
    absent[:, 3:9] = -torch.inf  # whole nodes, and some that are the target's
    left[:, :7] = -torch.inf  # a whole shard
    odd[0, 0], odd[1, 6], odd[2, 7], odd[3, 2], odd[5, 14] = torch.inf, torch.inf, torch.nan, -torch.inf, torch.nan
    alone = [noise.masked_fill(one, -torch.inf), noise.masked_fill(~one, -torch.inf), torch.full((19, 19), -torch.inf)]
    check(of_targets(kernels, [absent, left, odd, *alone], targets, (7, 12), shuffled), factor=2)


@pytest.mark.parametrize("shuffled", BOTH)
@pytest.mark.parametrize(
    ("kernels", "layout", "dtype"),
    [
        *over(CPU | FEW, ["row_stride", "offset"], [torch.float32, torch.bfloat16]),
        *over(TRITON, ["row_stride"], [torch.float32]),
    ],
)
def test_layouts(kernels: ShardKernels, layout: str, dtype: torch.dtype, shuffled: bool) -> None:
    """Rows that begin anywhere within 16 bytes; nothing between them is written."""
    check(ShardedBatch.cut(kernels, tree(67, 3, shuffled), (29, 0, 38), 3, dtype, layout=layout))


@pytest.mark.parametrize("upstream", ["stride0", "strided"])
@pytest.mark.parametrize("kernels", over(CPU | TRITON | BLOCK))
def test_strides_of_upstream_and_target(kernels: ShardKernels, upstream: str) -> None:
    up = cases.upstreams((6,), torch.float32)[upstream]
    batch = ShardedBatch.cut(kernels, tree(23, 3, True), (9, 14), 6, up=up)
    batch.target = batch.target.repeat_interleave(3)[::3]
    check(batch)


@pytest.mark.parametrize("kernels", over(CPU | TRITON | FEW))
def test_nothing_there_and_nothing_counted(kernels: ShardKernels) -> None:
    hierarchy = tree(5, 2)
    tail, ignored = operator_options(hierarchy, vectors=False), torch.full((3,), cases.IGNORE)
    for sizes in ((2, 3), (5, 0)):
        check(ShardedBatch(kernels, hierarchy, sizes, (torch.zeros(0, 5), ignored[:0]), tail))
        check(ShardedBatch(kernels, hierarchy, sizes, (torch.full((3, 5), torch.nan), ignored), tail))


@pytest.mark.parametrize("kernels", over(CPU | TRITON | BLOCK | GPU))
@pytest.mark.parametrize("shuffled", BOTH)
def test_a_shard_without_classes_knows_nothing(kernels: ShardKernels, shuffled: bool) -> None:
    batch = ShardedBatch.cut(kernels, tree(11, 3, shuffled), (0, 11), 4)
    empty = batch.shards()[0]
    kernels.hierarchical_stats(empty)
    nothing = torch.tensor([-torch.inf, 0.0] * 3 + [-torch.inf])
    for stats in empty.stats:
        assert_same(stats.cpu(), nothing.repeat(4, 1).masked_fill((batch.target == cases.IGNORE)[:, None].cpu(), 0.0))


@pytest.mark.parametrize("kernels", over(CPU | TRITON | FEW | GPU))
@pytest.mark.parametrize("shuffled", BOTH)
def test_a_shard_that_has_the_target_is_a_tree_of_its_own(kernels: ShardKernels, shuffled: bool) -> None:
    """Losses and gradients are those of the tree of its classes alone; targets of others are left out."""
    classes, start, size = 53, 17, 22
    logits, target = random_case((9, classes))
    target[:4] = torch.tensor([start, start + size - 1, start + 7, start + 11])
    hierarchy = tree(classes, 3, shuffled)
    tail = shard_options(hierarchy, operator_options(hierarchy, rows=9), start, size)
    case = logits[:, start : start + size].clone(), elsewhere(target, start, size)
    batch = HierarchicalBatch(kernels, case, tail)
    check(batch)
    options = HierarchicalOptions(*tail)
    vectors = {"weight": options.weight[start : start + size], "class_bias": options.class_bias}
    names = _names(hierarchy)[start : start + size]
    truth = hierarchy_cases.losses(
        case[0].double(), torch.where(case[1] < 0, case[1], case[1] - start), names, 0.3,
        **{k: x.double() for k, x in vectors.items()}, sample_weight=options.sample_weight.double(),
    )  # fmt: skip
    for loss in batch.losses:
        assert_close(loss.cpu(), truth, factor=4)


def _names(hierarchy: Hierarchy) -> list[tuple[int, ...]]:
    """The path of each class, without what pads it."""
    return [tuple(dict.fromkeys(path)) for path in hierarchy.tables().path.tolist()]


@pytest.mark.parametrize("wrong", [-1, 5])
@pytest.mark.parametrize("kernels", over(CPU | TRITON | BLOCK))
def test_targets_out_of_bounds(kernels: ShardKernels, wrong: int) -> None:
    """Those of the tree are the bounds, whatever the shard."""
    case = torch.zeros(2, 5), torch.tensor([1, wrong])
    hierarchy = tree(5, 2)
    batch = ShardedBatch(kernels, hierarchy, (2, 3), case, operator_options(hierarchy, vectors=False))
    with pytest.raises((IndexError, LaunchFailed), match="out of bounds"):
        batch.run()


# What becomes of the tables of a tree of 6 classes.
FAULTS: dict[str, Any] = {
    "an empty leaf": lambda o, leaf: o._replace(node_end=_with(o.node_end, leaf, o.node_begin[leaf])),
    "another class": lambda o, _: o._replace(path=o.path.roll(1, 0)),
    "the class of another position": lambda o, _: o._replace(order=o.order.roll(1)),
    "the position of another class": lambda o, _: o._replace(position=o.position.roll(1)),
}


def _with(x: Tensor, place: int, value: Tensor) -> Tensor:
    return x.index_fill(0, torch.tensor([place]), int(value))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kernels", over(CPU | BLOCK | TRITON))
def test_only_a_shard_may_lack_the_target(kernels: ShardKernels, fault: str) -> None:
    for shuffled in BOTH:
        tail = operator_options(tree(6, 2, shuffled), vectors=False)
        options = HierarchicalOptions(*tail)
        if options.order is None and fault.endswith(("position", "of another class")):
            continue
        broken = list(FAULTS[fault](options, int(options.path[1, -1])))
        batch = HierarchicalBatch(kernels, (torch.zeros(1, 6), torch.tensor([1])), broken)
        with pytest.raises(
            (RuntimeError, LaunchFailed, *TRAPPED),
            match=r"do not nest|does not end|is not its class alone|order and position differ",
        ):
            batch.run()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_leaf_of_two_classes_is_refused_in_a_shard_too(backend: str) -> None:
    hierarchy = tree(6, 2)
    options = HierarchicalOptions(*shard_options(hierarchy, operator_options(hierarchy, vectors=False), 0, 4))
    leaf = int(options.path[1, -1])
    broken = options._replace(node_end=_with(options.node_end, leaf, options.node_begin[leaf] + 2))
    with longtail.use_backend(backend), pytest.raises(RuntimeError, match="not nest"):
        torch.ops.longtail.hierarchical_loss(torch.zeros(1, 4), torch.tensor([1]), *broken)


def test_too_deep_for_kernels() -> None:
    """What takes trees of any depth takes shards of them."""
    hierarchy, _ = hierarchy_cases.tree("too_deep")
    for kernels in CPU.values():
        check(ShardedBatch.cut(kernels, hierarchy, (11, 0, 19), 5))


def test_opcheck() -> None:
    hierarchy = tree(11, 3, True)
    batch = ShardedBatch.cut(CPU["cpu"], hierarchy, (4, 7), 5)
    shard = batch.shards()[0]
    _, stats = torch.ops.longtail.hierarchical_loss(shard.logits, shard.target, *shard.tail)
    arguments: dict[str, tuple[Any, ...]] = {
        "hierarchical_loss": (),
        "hierarchical_loss_backward": (stats,),
        "hierarchical_loss_backward_": (stats,),
    }
    for name, more in arguments.items():
        first = () if name == "hierarchical_loss" else (shard.up,)
        given = (*first, shard.logits, shard.target, *more, *shard.tail)
        results = torch.library.opcheck(getattr(torch.ops.longtail, name).default, given)
        assert set(results.values()) == {"SUCCESS"}, results
