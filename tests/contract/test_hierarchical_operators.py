"""Promise: whatever computes them, the operators of hierarchical cross-entropy equal float64, for any tree."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cases
from batches import check, one_thread, random_case
from emulation.harness import LaunchFailed
from emulation.plans import HIERARCHICAL_REGIMES, emulated
from hierarchical_batches import HierarchicalBatch, HierarchicalKernels, operator_options, tree
from interpreted import HALVES
from kernels import CPU, GPU, TRITON, over

BOTH = (False, True)  # classes at their own positions, or shuffled
REGIMES = emulated(HIERARCHICAL_REGIMES)
FEW = emulated(HIERARCHICAL_REGIMES, "block", "single_elements")
# Shapes and depths: one class, two; classes right below the root alone; every level that kernels know; long rows.
SMALL = [((9, 1), 1), ((7, 2), 1), ((6, 11), 1), ((6, 11), 2), ((6, 127), 4), ((3, 300), 8)]
SHAPES = [*SMALL, ((2, 2100), 3)]
GPU_SHAPES = [*SHAPES, ((300, 1203), 5), ((130, 8192), 7), ((40, 50257), 2), ((24, 128256), 8)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize(
    ("kernels", "case", "shuffled"),
    [
        *over(CPU, SHAPES, BOTH),
        *over(TRITON, [*SMALL, ((2, 4100), 3)], BOTH),
        *over(REGIMES, SHAPES, BOTH),
        *over(GPU, GPU_SHAPES, BOTH),
    ],
)
def test_every_size(kernels: HierarchicalKernels, case: tuple[tuple[int, int], int], shuffled: bool) -> None:
    check(HierarchicalBatch.of(kernels, *case, shuffled))
    if case[0][1] < 50:
        check(HierarchicalBatch.of(kernels, *case, shuffled, vectors=False))


@pytest.mark.parametrize(
    ("kernels", "dtype", "shuffled"),
    [
        *over(CPU, [torch.float64], BOTH),
        *over(CPU | TRITON | FEW | GPU, HALVES, BOTH),
    ],
)
def test_every_type(kernels: HierarchicalKernels, dtype: torch.dtype, shuffled: bool) -> None:
    check(HierarchicalBatch.of(kernels, (5, 203), 3, shuffled, dtype))


def of_targets(
    kernels: HierarchicalKernels,
    logits: list[torch.Tensor],
    targets: tuple[int, ...],
    alpha: float,
    shuffled: bool = False,
) -> HierarchicalBatch:
    """Some of the rows of each of the logits [C, C], of which each row has its own class for a target; depth 4."""
    chosen, classes = torch.tensor(targets), logits[0].shape[1]
    tail = operator_options(tree(classes, 4, shuffled), alpha=alpha, vectors=False)
    return HierarchicalBatch(kernels, (torch.cat([z[chosen] for z in logits]), chosen.repeat(len(logits))), tail)


@pytest.mark.parametrize(
    ("kernels", "alpha", "margins", "targets"),
    [
        *over(
            CPU | emulated(HIERARCHICAL_REGIMES, "one_warp") | GPU,
            *((0.0, 0.4, 4.0), [(20.0, 100.0, 1e4)], [(0, 5, 9, 18)]),
        ),
        *over(TRITON, (0.0, 0.4), [(20.0, 1e4)], [(5,)]),  # the interpreter is slow
    ],
)
def test_saturation(
    kernels: HierarchicalKernels, alpha: float, margins: tuple[float, ...], targets: tuple[int, ...]
) -> None:
    """Margins of the target on both sides, of each class to the next, and a large common offset."""
    noise, one, rising = torch.randn(19, 19, generator=cases.generator(1)), torch.eye(19), torch.arange(19)
    logits = [noise + margin * x for margin in margins for x in (one, -one, rising, -rising)]
    check(of_targets(kernels, [*logits, noise + 1e4], targets, alpha), factor=2)


@pytest.mark.parametrize(
    ("kernels", "shuffled", "targets"),
    [*over(CPU | FEW | GPU, BOTH, [tuple(range(19))]), *over(TRITON, [True], [(1, 5)])],
)
def test_infinite_and_undefined_logits(kernels: HierarchicalKernels, shuffled: bool, targets: tuple[int, ...]) -> None:
    noise, one = torch.randn(19, 19, generator=cases.generator(2)), torch.eye(19, dtype=torch.bool)
    absent, odd = noise.clone(), noise.clone()
    absent[:, 3:9] = -torch.inf  # whole nodes, and some that are the target's
    odd[0, 0], odd[1, 6], odd[2, 7], odd[3, 2], odd[5, 4] = torch.inf, torch.inf, torch.nan, -torch.inf, torch.nan
    alone = [noise.masked_fill(one, -torch.inf), noise.masked_fill(~one, -torch.inf), torch.full((19, 19), -torch.inf)]
    check(of_targets(kernels, [absent, odd, *alone], targets, 0.4, shuffled), factor=2)


@pytest.mark.parametrize("shuffled", BOTH)
@pytest.mark.parametrize(
    ("kernels", "layouts"),
    [
        *over(CPU | TRITON, [("row_stride",), ("offset",)]),
        *over(FEW, [("row_stride",), ("offset",), ("offset", "contiguous"), ("contiguous", "far_apart")]),
    ],
)
def test_layouts(kernels: HierarchicalKernels, layouts: tuple[str, ...], shuffled: bool) -> None:
    """Rows that begin anywhere within 16 bytes, the gradient's as the logits' and otherwise, or beyond 2^31."""
    how = dict(zip(("layout", "grad_layout"), layouts, strict=False))
    for dtype in (torch.float32, torch.bfloat16):
        check(HierarchicalBatch.of(kernels, (3, 123), 3, shuffled, dtype, **how))


@pytest.mark.parametrize("upstream", ["stride0", "strided"])
@pytest.mark.parametrize("kernels", over(CPU | TRITON | emulated(HIERARCHICAL_REGIMES, "block")))
def test_strides_of_upstream_and_target(kernels: HierarchicalKernels, upstream: str) -> None:
    batch = HierarchicalBatch.of(kernels, (6, 23), 3, True, up=cases.upstreams((6,), torch.float32)[upstream])
    batch.target = batch.target.repeat_interleave(3)[::3]
    check(batch)


@pytest.mark.parametrize("kernels", over(TRITON | emulated(HIERARCHICAL_REGIMES, "block")))
def test_without_weight_by_depth_it_is_the_cross_entropy(kernels: HierarchicalKernels) -> None:
    logits, target = random_case((7, 40))
    for shuffled in BOTH:
        batch = HierarchicalBatch(kernels, (logits, target), operator_options(tree(40, 3, shuffled), alpha=0.0, rows=7))
        check(batch)
        bias, weight, sample = batch.wide()[7], batch.wide()[6], batch.wide()[8]
        truth = torch.nn.functional.cross_entropy(
            logits.double() + bias, target, weight, ignore_index=cases.IGNORE, reduction="none"
        )
        for loss in batch.losses:
            torch.testing.assert_close(loss.double(), truth * sample, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", over(CPU | TRITON | FEW))
def test_nothing_there_and_nothing_counted(kernels: HierarchicalKernels) -> None:
    tail = operator_options(tree(5, 2), vectors=False)
    check(HierarchicalBatch(kernels, (torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)), tail))
    check(HierarchicalBatch(kernels, (torch.full((3, 5), torch.nan), torch.full((3,), cases.IGNORE)), tail))


@pytest.mark.parametrize("wrong", [-1, 5])
@pytest.mark.parametrize("kernels", over(CPU | TRITON | emulated(HIERARCHICAL_REGIMES, "block")))
def test_targets_out_of_bounds(kernels: HierarchicalKernels, wrong: int) -> None:
    batch = HierarchicalBatch(
        kernels, (torch.zeros(2, 5), torch.tensor([1, wrong])), operator_options(tree(5, 2), vectors=False)
    )
    with pytest.raises((IndexError, LaunchFailed), match="out of bounds"):
        batch.run()


# Table of the tail, place, what stands there, what is said.
FAULTS = [
    (0, -1, 10**6, "path is out of bounds"),
    (0, -1, 0, "nodes do not nest"),
    (4, slice(None), 0, "order and position differ"),
    (5, slice(None), 0, "order and position differ"),
    (2, 0, 10**6, "nodes do not nest"),
    (4, slice(None), -1, "order is out of bounds"),
]


@pytest.mark.parametrize(("kernels", "fault"), over(emulated(HIERARCHICAL_REGIMES, "block"), FAULTS))
def test_wrong_tables_trap_on_a_gpu(kernels: HierarchicalKernels, fault: tuple[int, int | slice, int, str]) -> None:
    table, place, wrong, said = fault
    batch = HierarchicalBatch.of(kernels, (6, 60), 3, True)
    batch.tail[table] = batch.tail[table].clone()
    batch.tail[table][..., place] = wrong
    with pytest.raises(LaunchFailed, match=said):
        batch.run()
