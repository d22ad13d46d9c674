"""Promise: whatever computes them, the operators of ZLPR and the two-way loss equal float64, over rows and images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import cases
from batches import check, one_thread
from emulation.harness import LaunchFailed
from emulation.plans import SIGMOID_PIXELS, SIGMOID_REGIMES, emulated
from interpreted import HALVES
from kernels import CPU, GPU, TRITON, over
from two_way_cases import KINDS, OPTION_SETS, TwoWayBatch, TwoWayKernels, options, random_case

VECTORS = ("zlpr_vectors", "two_way_vectors")
ROWS = emulated(SIGMOID_REGIMES, "lanes", "block", "cluster_2", "warp_of_single_elements")
PIXELS = emulated(SIGMOID_PIXELS, "along", "in_a_warp", "single_pixels_spread")
# One class, two; less than a register, no whole number of them; more than a block; images.
CPU_SHAPES = [(7, 1), (7, 2), (6, 11), (3, 127), (3, 2100), (3, 7, 5), (2, 19, 32), (1, 70, 300)]
TRITON_SHAPES = [(7, 1), (7, 11), (3, 127), (2, 4100), (3, 7, 5), (2, 19, 32)]
GPU_SHAPES = [(300, 1), (301, 11), (66, 127), (130, 8192), (40, 50257), (3, 7, 35), (2, 19, 1024), (2, 1203, 512)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize(
    ("kernels", "shape", "kind", "name"),
    [
        *over(CPU, CPU_SHAPES, KINDS, OPTION_SETS),
        *over(TRITON, TRITON_SHAPES, ("class", "soft"), VECTORS[1:]),
        *over(TRITON, [(7, 11), (3, 7, 5)], ("class", "hard"), ("zlpr",)),
        *over(ROWS, [(6, 127)], KINDS, OPTION_SETS),
        *over(PIXELS, [(2, 21, 48)], KINDS, OPTION_SETS),
        *over(GPU, GPU_SHAPES, KINDS, OPTION_SETS),
    ],
)
def test_every_option(kernels: TwoWayKernels, shape: tuple[int, ...], kind: str, name: str) -> None:
    check(TwoWayBatch.of(kernels, shape, kind, name))


SLOW = ("widest", "cluster_16")  # many threads
EMULATED_ROWS = [(9, 1), (7, 11), (5, 64), (3, 1003), (2, 2100)]
EMULATED_IMAGES = [(3, 7, 35), (2, 19, 64), (1, 1, 96), (2, 70, 40), (5, 3, 1)]


@pytest.mark.parametrize(
    ("kernels", "shape", "kind"),
    [
        *over(emulated(SIGMOID_REGIMES, *(x for x in SIGMOID_REGIMES if x not in SLOW)), EMULATED_ROWS, KINDS),
        *over(emulated(SIGMOID_REGIMES, *SLOW), [(9, 1), (2, 2100)], KINDS),
        *over(emulated(SIGMOID_PIXELS), EMULATED_IMAGES, KINDS),
    ],
)
def test_every_size(kernels: TwoWayKernels, shape: tuple[int, ...], kind: str) -> None:
    check(TwoWayBatch.of(kernels, shape, kind, "two_way_vectors"))


@pytest.mark.parametrize(
    ("kernels", "dtype", "shape", "kind"),
    [
        *over(CPU, (torch.float64, *HALVES), [(5, 203), (2, 19, 33)], ("class", "soft")),
        *over(TRITON | GPU, HALVES, [(5, 203), (2, 19, 32)], ("class", "soft")),
        *over(ROWS, HALVES, [(4, 1003)], ("class", "soft")),
        *over(PIXELS, HALVES, [(2, 19, 64)], ("class", "soft")),
    ],
)
def test_every_type(kernels: TwoWayKernels, dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    """Soft targets also in the type of the logits."""
    for name in VECTORS:
        batch = TwoWayBatch.of(kernels, shape, kind, name, dtype)
        check(batch)
        if kind == "soft":
            batch.target = batch.target.to(dtype)
            check(batch)


def saturated(margin: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in which labels lie above the others, below, each class by that far from the next, and by an offset."""
    noise = torch.randn(6, 19, generator=cases.generator(1))
    y = (torch.rand(6, 19, generator=cases.generator(2)) < 0.3).float()
    y[:, 0], y[4] = 1.0, y[4] * 0.6 + 0.2
    rising = torch.arange(19.0)
    logits = [noise + margin * x for x in (y, -y, rising, -rising, torch.ones(19), -torch.ones(19))]
    return torch.cat(logits), y.repeat(6, 1)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize(
    ("kernels", "margin", "name"),
    [*over(CPU | GPU, (20.0, 100.0, 1e4), OPTION_SETS), *over(TRITON, (20.0, 1e4), ("zlpr", "two_way"))],
)
def test_saturation(kernels: TwoWayKernels, margin: float, name: str, images: bool) -> None:
    logits, y = saturated(margin)
    if images:
        logits, y = (x.view(6, 6, 19).movedim(1, 2).contiguous() for x in (logits, y))
    check(TwoWayBatch(kernels, (logits, y), options(name, logits)), factor=2)


@pytest.mark.parametrize(
    ("kernels", "name"), over(emulated(SIGMOID_REGIMES, "lanes", "block"), ("zlpr", "two_way_vectors"))
)
def test_saturation_in_registers(kernels: TwoWayKernels, name: str) -> None:
    for margin in (20.0, 1e4):
        logits, y = saturated(margin)
        check(TwoWayBatch(kernels, (logits, y), options(name, logits)), factor=2)


@pytest.mark.parametrize("name", ["zlpr", "two_way_vectors"])
@pytest.mark.parametrize(
    ("kernels", "shape", "kind"),
    [
        *over(CPU | TRITON | GPU, [(9, 70), (2, 19, 16)], ("class", "soft")),
        *over(ROWS, [(9, 70)], ("class", "soft")),
        *over(PIXELS, [(2, 19, 16)], ("class", "soft")),
    ],
)
def test_infinite_and_undefined_logits(kernels: TwoWayKernels, shape: tuple[int, ...], kind: str, name: str) -> None:
    logits, target = random_case(shape, kind)
    target.masked_fill_(target == cases.IGNORE, 0)
    rows = logits if len(shape) == 2 else logits.movedim(1, 2).flatten(0, 1)
    rows[1, 3:9], rows[2, 0], rows[3, 5], rows[4] = -torch.inf, torch.inf, torch.nan, -torch.inf
    rows[5, 1], rows[5, 7], rows[6] = torch.inf, torch.inf, torch.inf
    if len(shape) == 3:
        logits = rows.view(shape[0], shape[2], shape[1]).movedim(2, 1).contiguous()
    check(TwoWayBatch(kernels, (logits, target), options(name, logits)), factor=2)


@pytest.mark.parametrize("name", ["zlpr", "two_way"])
@pytest.mark.parametrize(
    ("kernels", "shape"),
    [*over(CPU | TRITON | GPU, [(5, 40), (1, 40, 5)]), *over(ROWS, [(5, 40)]), *over(PIXELS, [(1, 40, 5)])],
)
def test_rows_of_one_side_and_targets_that_are_undefined(
    kernels: TwoWayKernels, shape: tuple[int, ...], name: str
) -> None:
    """Of no negatives, with a positive at -inf, with NaN in one side alone, and with a target of NaN."""
    logits = torch.randn(5, 40, generator=cases.generator(0))
    y = torch.ones(5, 40)
    logits[1, 3], logits[2, 3], y[3, :20], y[3, 4], y[4] = -torch.inf, torch.nan, 0.0, torch.nan, 0.0
    if len(shape) == 3:
        logits, y = logits.t()[None].contiguous(), y.t()[None].contiguous()
    one = TwoWayBatch(kernels, (logits, y), options(name, logits))
    check(one)
    expected = [False, name == "two_way", True, True, False]
    assert one.losses[0].isnan().tolist() == [*expected[:1], False, *expected[2:]]


@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize(
    ("kernels", "shape", "layout"),
    [
        *over(CPU, [(3, 64), (3, 43)], ["row_stride", "offset"]),
        *over(TRITON, [(3, 43)], ["row_stride", "offset"]),
        *over(CPU | TRITON, [(2, 8, 37)], ["class_stride", "image_stride", "offset"]),
        *over(ROWS, [(5, 64), (5, 1003)], ["row_stride", "offset", "far_apart"]),
        *over(PIXELS, [(2, 8, 37), (2, 8, 64)], ["whole_vectors_apart", "class_stride", "offset", "far_apart"]),
    ],
)
def test_layouts(kernels: TwoWayKernels, shape: tuple[int, ...], layout: str, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(TwoWayBatch.of(kernels, shape, kind, "two_way_vectors", dtype, layout=layout))


@pytest.mark.parametrize("upstream", ["stride0", "strided"])
@pytest.mark.parametrize(
    ("kernels", "shape"),
    [*over(CPU | TRITON, [(6, 127), (2, 7, 16)]), *over(ROWS, [(6, 127)]), *over(PIXELS, [(2, 7, 16)])],
)
def test_strides_of_upstream_and_target(kernels: TwoWayKernels, shape: tuple[int, ...], upstream: str) -> None:
    up = cases.upstreams((6 if len(shape) == 2 else 32,), torch.float32)[upstream]
    batch = TwoWayBatch.of(kernels, shape, "class", "zlpr_vectors", up=up)
    batch.target = batch.target.reshape(-1).repeat_interleave(3)[::3]
    check(batch)


@pytest.mark.parametrize("kind", ["class", "hard"])
@pytest.mark.parametrize(
    ("kernels", "shape"),
    [*over(CPU | TRITON, [(7, 40), (2, 9, 8)]), *over(ROWS, [(7, 40)]), *over(PIXELS, [(2, 9, 8)])],
)
def test_infinite_upstream_gradients_of_what_does_not_count(
    kernels: TwoWayKernels, shape: tuple[int, ...], kind: str
) -> None:
    batch = TwoWayBatch.of(kernels, shape, kind, "two_way")
    y = batch.target
    uncounted = y == cases.IGNORE if kind == "class" else ~(y > 0).any(1)
    batch.up = batch.up.masked_fill(uncounted.reshape(-1), torch.inf)
    check(batch)
    assert all(x.isfinite().all() for x in (*batch.losses, *batch.grads))


@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize(
    ("kernels", "shape"),
    [
        *over(CPU | TRITON, [(0, 5), (3, 0), (0, 5, 4), (3, 0, 4), (2, 3, 0)]),
        *over(ROWS, [(3, 0)]),
        *over(PIXELS, [(3, 0, 4)]),
    ],
)
def test_nothing_there(kernels: TwoWayKernels, shape: tuple[int, ...], kind: str) -> None:
    target = torch.zeros(shape) if kind == "soft" else torch.full((shape[0], *shape[2:]), cases.IGNORE)
    logits = torch.zeros(shape)
    for name in VECTORS:
        check(TwoWayBatch(kernels, (logits, target), options(name, logits)))


@pytest.mark.parametrize("kernels", over(CPU | TRITON))
def test_nothing_ignored(kernels: TwoWayKernels) -> None:
    """None is no index: an element of -100 is a number like others."""
    for shape in ((4, 19), (1, 19, 16)):
        logits, y = random_case(shape, "hard")
        given: dict[str, Any] = {"joint": False, "ignore_index": None}
        check(TwoWayBatch(kernels, (logits, y.clamp(0, 1)), given))
        check(TwoWayBatch(kernels, (logits, y.clamp(0, 1)), given | {"joint": True}))


@pytest.mark.parametrize("kernels", over(CPU | TRITON))
def test_targets_a_rounding_outside(kernels: TwoWayKernels) -> None:
    logits, y = random_case((4, 40), "hard")
    y = y.masked_fill(y == cases.IGNORE, 0.0)
    y = torch.where(y == 1, 1 + 2.0**-23, y - 2.0**-30)
    for name in ("zlpr", "two_way"):
        batch = TwoWayBatch(kernels, (logits, y), options(name, logits))
        check(batch)
        assert batch.losses[0].isfinite().all()


@pytest.mark.parametrize("wrong", [-1, 5])
@pytest.mark.parametrize(
    ("kernels", "shape"),
    [*over(CPU | TRITON, [(2, 5), (1, 5, 2)]), *over(ROWS, [(2, 5)]), *over(PIXELS, [(1, 5, 2)])],
)
def test_targets_out_of_bounds(kernels: TwoWayKernels, shape: tuple[int, ...], wrong: int) -> None:
    logits = torch.zeros(shape)
    target = torch.tensor([1, wrong]).view(shape[0], *shape[2:])
    with pytest.raises((IndexError, LaunchFailed), match="out of bounds"):
        TwoWayBatch(kernels, (logits, target), options("zlpr", logits)).run()
