"""Promise: whatever computes them, the softmax operators equal float64, over rows [N, C] and images [N, C, P]."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

import cases
from batches import Kernels, SoftmaxBatch, check, one_thread, random_case
from emulation.harness import STORAGES
from emulation.plans import PIXELS, REGIMES, emulated, warps
from interpreted import HALVES, INTERPRETED, refuse_copies
from kernels import CPU, GPU, TRITON, over
from longtail.ops.layout import to_images
from longtail.options import SOFTMAX_VECTORS

FEW = ("plain", "smoothing_weight", "mixed")
FLOATS = (torch.float32, *HALVES)
# Rows and images for each backend: what of them is registers, vectors, blocks and their ends differs.
CPU_ROWS = [(7, 11), (2, 1000)]
CPU_IMAGES = [(3, 7, 5), (2, 19, 33)]
TRITON_ROWS = [(7, 1), (9, 2), (8, 3), (6, 127), (2, 1000), (2, 5000), (2, 5001)]
# Pixels of several images in one program; odd and even rows of pixels; classes in registers, and swept in blocks.
TRITON_IMAGES = [(3, 7, 5), (2, 19, 32), (1, 1, 40), (2, 2, 1), (2, 70, 33), (1, 70, 16)]
EMULATED_ROWS = [(7, 1), (9, 2), (8, 3), (6, 31), (5, 127), (6, 128), (3, 1000), (2, 5000)]
# Pixels of several images in one block; classes that are whole groups, less than one, and more than one and a part.
WHOLE = [(3, 7, 16), (2, 19, 40), (1, 8, 136), (2, 1, 8), (1, 2, 8), (1, 150, 16)]
RAGGED = [(3, 7, 5), (2, 19, 33), (1, 1, 40), (2, 2, 1), (1, 16, 9), (1, 150, 17)]
GPU_ROWS = [(300, 1), (301, 2), (7, 3), (66, 127), (129, 1000), (33, 4096), (130, 5000), (64, 32000), (133, 50257),
            (40, 128256)]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        refuse_copies(monkeypatch)


def lanes(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> dict[str, Kernels]:
    """A row in the registers of a warp: the emulated plans that hold it."""
    return {f"emulated-warp_{i}_of_{rows}x{classes}": plans for i, plans in enumerate(warps(classes, dtype))}


def batch(
    kernels: Kernels, shape: tuple[int, ...], option_set: str, dtype: torch.dtype = torch.float32, **how: str
) -> SoftmaxBatch:
    logits, target = random_case(shape, dtype)
    options = cases.options(option_set, shape[1], target, dtype)
    return SoftmaxBatch(kernels, (logits, target), options, **how)


def shaped(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return to_images(rows, torch.Size(shape)) if len(shape) == 3 else rows


# The interpreter is slow: every option once in the tile, in the sweep and in the tile of images, FEW elsewhere.
TRITON_OPTIONS = [(6, 127), (2, 5000), (3, 7, 5)]
SLOW = [(2, 50257), (2, 70, 33)]


@pytest.mark.parametrize(
    ("kernels", "shape", "option_set"),
    [
        *over(CPU, [*CPU_ROWS, *CPU_IMAGES], cases.OPTION_SETS),
        *over(TRITON, TRITON_OPTIONS, cases.OPTION_SETS),
        *over(TRITON, [x for x in (*TRITON_ROWS, *TRITON_IMAGES) if x not in (*TRITON_OPTIONS, *SLOW)], FEW),
        *over(TRITON, SLOW, ["plain"]),
        *(x for s in ((8, 3), (5, 127), (3, 1000)) for x in over(lanes(*s), [s], cases.OPTION_SETS)),
        *over(
            emulated(REGIMES, "block", "cluster_2", "single_elements", "kept_1", "kept_2"),
            [(8, 3), (5, 127), (3, 1000)],
            cases.OPTION_SETS,
        ),
        *over(emulated(PIXELS, "shared_classes"), [(2, 19, 16)], cases.OPTION_SETS),
        *over(emulated(PIXELS, "kept_alone"), [(1, 7, 24)], cases.OPTION_SETS),
        *over(emulated(PIXELS, "single"), [(3, 30, 5)], cases.OPTION_SETS),
        *over(GPU, GPU_ROWS, cases.OPTION_SETS),
    ],
)
def test_every_option(kernels: Kernels, shape: tuple[int, ...], option_set: str) -> None:
    check(batch(kernels, shape, option_set))


# Beside the smallest and the largest cluster, which see every size and type.
IN_BETWEEN = {"cluster_4", "cluster_8", "kept_4", "kept_8", "one_warp", "widest"}
SHARED = {"cluster_8", "cluster_16", "kept_8", "kept_16"}  # many threads are slow


def regimes() -> Iterator[object]:
    for name in REGIMES:
        if name.startswith("warp") or name == "single_elements_wide":
            continue
        for (rows, classes), dtype in product(EMULATED_ROWS, STORAGES):
            if name not in IN_BETWEEN or (classes in (31, 1000, 5000) and dtype != torch.float16):
                shape = (3 if name in SHARED else rows, classes)
                yield from over(emulated(REGIMES, name), [shape], ("plain", "mixed_tail"), [dtype])
    for rows, classes, dtype in product((1, 33), (1, 2, 3, 24, 31, 127, 128, 256, 512, 1000, 1024), STORAGES):
        yield from over(lanes(rows, classes, dtype), [(rows, classes)], FEW, [dtype])


@pytest.mark.parametrize(
    ("kernels", "shape", "option_set", "dtype"),
    [
        *over(CPU, [*CPU_ROWS, *CPU_IMAGES], FEW, cases.DTYPES),
        *over(TRITON, [*TRITON_ROWS, TRITON_IMAGES[1], TRITON_IMAGES[5]], FEW, [torch.bfloat16]),
        *over(TRITON, [*TRITON_ROWS, TRITON_IMAGES[1], TRITON_IMAGES[5]], ["mixed"], [torch.float16]),
        *regimes(),
        *over(emulated(PIXELS, *list(PIXELS)[:4]), WHOLE, ("plain", "mixed"), STORAGES),
        *over(emulated(PIXELS, *list(PIXELS)[4:]), RAGGED, ("plain", "mixed"), STORAGES),
        *over(emulated(PIXELS, "shared_classes", "kept"), WHOLE, ["mixed_tail"], STORAGES),
        *over(emulated(PIXELS, "single", "single_kept"), RAGGED, ["mixed_tail"], STORAGES),
        *over(GPU, GPU_ROWS, (*FEW, "complement"), HALVES),
    ],
)
def test_every_size_and_type(kernels: Kernels, shape: tuple[int, ...], option_set: str, dtype: torch.dtype) -> None:
    check(batch(kernels, shape, option_set, dtype))


@pytest.mark.parametrize(
    ("kernels", "shape", "option_set", "dtype"),
    [
        *(
            x
            for s, dtype in product(((5, 127), (3, 1000)), HALVES)
            for x in over(
                lanes(*s, dtype) | emulated(REGIMES, "cluster_2", "kept_2"),
                *([s], ("weight", "class_bias", "softcap", "mixed_linear", "tail_linear"), [dtype]),
            )
        ),
        *(
            x
            for name, s in (("shared_classes", (2, 19, 16)), ("kept", (1, 127, 8)), ("single", (3, 30, 5)))
            for x in over(
                emulated(PIXELS, name),
                *([s], ("smoothing_weight", "class_bias", "softcap", "mixed_linear", "tail_linear"), HALVES),
            )
        ),
    ],
)
def test_options_of_half_types(kernels: Kernels, shape: tuple[int, ...], option_set: str, dtype: torch.dtype) -> None:
    check(batch(kernels, shape, option_set, dtype))


@pytest.mark.parametrize(
    ("kernels", "shape", "gamma", "margin"),
    [
        *over(CPU, [(4, 19), (1, 30, 40)], cases.GAMMAS, cases.MARGINS),
        *(
            x
            for s, gamma in (
                *(((4, 1), 0.5), ((4, 2), 0.0), ((4, 127), 0.5), ((4, 127), 2.0), ((4, 4099), 1.5)),
                *(((1, 2, 8), 0.0), ((1, 30, 8), 0.5), ((1, 30, 8), 2.0), ((1, 100, 8), 1.5)),
            )
            for x in over(TRITON, [s], [gamma], cases.MARGINS if s[1] < 100 or s[1] == 127 else (0.0, 20.0, 1e4))
        ),
        *over(
            emulated(REGIMES, "warp", "cluster_2", "kept_1"),
            *([(4, 1), (4, 2), (4, 127)], (0.0, 0.5, 2.0), cases.MARGINS),
        ),
        *over(
            emulated(PIXELS, "shared_classes", "kept_alone", "single_alone"),
            *([(1, 1, 8), (1, 2, 8), (1, 30, 8)], (0.0, 0.5, 2.0), cases.MARGINS),
        ),
        *over(GPU, [(6, 2), (6, 127), (6, 5000), (6, 50257)], cases.GAMMAS, cases.MARGINS),
    ],
)
def test_margins(kernels: Kernels, shape: tuple[int, ...], gamma: float, margin: float) -> None:
    rows, target = cases.margin_case(margin, shape[1], rows=shape[-1] if len(shape) == 3 else shape[0])
    options = {"focal_gamma": gamma, "complement_gamma": -1.0}
    check(SoftmaxBatch(kernels, (shaped(rows, shape), target), options))


VECTORS_APART = [("whole_vectors_apart", "contiguous")]
SINGLE_APART = [("offset", "offset"), ("contiguous", "offset")]


@pytest.mark.parametrize(
    ("kernels", "shape", "dtype", "layouts"),
    [
        *over(CPU, [(9, 64), (9, 1003)], cases.DTYPES, [("row_stride",), ("offset",)]),
        *over(CPU, [(2, 19, 33)], cases.DTYPES, [("inside_8",), ("inside_3",), ("class_stride",), ("offset",)]),
        *over(TRITON, [(3, 64), (3, 1000), (3, 4104), (3, 4099)], FLOATS[:2], [("row_stride",), ("offset",)]),
        *over(TRITON, [(2, 6, 32)], FLOATS[:2], [("inside_8",), ("inside_3",)]),
        *over(TRITON, [(2, 70, 32)], FLOATS[:1], [("inside_8",), ("inside_3",)]),
        *over(
            emulated(REGIMES, "block", "cluster_4", "kept_1", "kept_2"),
            *([(9, n) for n in (5, 64, 127, 1000, 1003)], STORAGES, [("row_stride",), ("offset",)]),
        ),
        *over(
            emulated(REGIMES, "single_elements_wide"),
            *([(9, n) for n in (5, 64, 127, 1000, 1003)], STORAGES),
            [("row_stride", "contiguous"), ("offset", "contiguous")],
        ),
        *over(
            emulated(REGIMES, "warp"),
            *([(9, n) for n in (5, 64, 127)], STORAGES, [("row_stride", "contiguous"), ("offset", "contiguous")]),
        ),
        *over(emulated(PIXELS, "shared_classes", "kept"), [(2, 6, 16), (3, 70, 24)], STORAGES, VECTORS_APART),
        *over(emulated(PIXELS, "single", "single_kept"), [(2, 6, 16), (3, 70, 24)], STORAGES, SINGLE_APART),
        *over(emulated(PIXELS, "single", "single_kept"), [(2, 9, 21)], STORAGES, VECTORS_APART + SINGLE_APART),
        *over(GPU, [(9, 64), (9, 1000), (9, 4099), (9, 50257)], FLOATS, [("row_stride",), ("offset",)]),
    ],
)
def test_layouts(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, layouts: tuple[str, ...]) -> None:
    """Rows and pixels that begin anywhere within 16 bytes, with the gradient's alike, and otherwise."""
    how = dict(zip(("layout", "grad_layout"), layouts, strict=False))
    check(batch(kernels, shape, "mixed_tail", dtype, **how))


@pytest.mark.parametrize(
    ("kernels", "shape", "layouts"),
    [
        *over(
            emulated(REGIMES, "warp_of_vectors", "warp", "block", "single_elements_wide", "kept_2"),
            *([(2, 64)], [("far_apart", "contiguous"), ("contiguous", "far_apart")]),
        ),
        *over(
            emulated(PIXELS, "shared_classes", "kept_alone", "single"),
            *([(2, 5, 16)], [("far_apart", "contiguous"), ("contiguous", "far_apart")]),
        ),
    ],
)
def test_offsets_of_64_bits(kernels: Kernels, shape: tuple[int, ...], layouts: tuple[str, str]) -> None:
    case = random_case(shape, torch.float16, ignore=False)
    options = {"label_smoothing": 0.1} if kernels == PIXELS["single"] else {}
    check(SoftmaxBatch(kernels, case, options, layout=layouts[0], grad_layout=layouts[1]))


@pytest.mark.parametrize(
    ("kernels", "shape"),
    [
        *over(CPU, [(5, 128), (5, 1001), (2, 19, 16)]),
        *over(TRITON, [(5, 128), (5, 1001), (2, 19, 16)]),
        *over(lanes(5, 128), [(5, 128)]),
        *over(emulated(REGIMES, "cluster_2", "kept_1"), [(5, 128), (5, 1001)]),
        *over(emulated(PIXELS, "shared_classes", "single"), [(2, 19, 16)]),
    ],
)
def test_class_vectors_anywhere(kernels: Kernels, shape: tuple[int, ...]) -> None:
    """Vectors that begin at no 16-byte boundary: all of them, and each among others that do."""
    case = random_case(shape)
    options = cases.options("mixed_tail", shape[1], case[1])
    moved = {name: cases.LAYOUTS["offset"](options[name]) for name in SOFTMAX_VECTORS if name != "sample_weight"}
    for some in (moved, *({name: vector} for name, vector in moved.items())):
        check(SoftmaxBatch(kernels, case, options | some))


@pytest.mark.parametrize("upstream", ["stride0", "strided"])
@pytest.mark.parametrize(
    ("kernels", "shape"),
    [
        *over(CPU, [(6, 127), (2, 19, 16)]),
        *over(TRITON, [(4, 127), (2, 4099), (2, 19, 16)]),
        *over(emulated(REGIMES, "block", "cluster_2", "kept_2", "warp_of_vectors"), [(6, 1000)]),
        *over(emulated(PIXELS, "alone", "kept", "single"), [(2, 19, 16)]),
    ],
)
def test_strides_of_upstream_and_target(kernels: Kernels, shape: tuple[int, ...], upstream: str) -> None:
    logits, target = random_case(shape)
    up = cases.upstreams(target.shape, torch.float32)[upstream]
    options = {"focal_gamma": 2.0, "label_smoothing": 0.1}
    check(SoftmaxBatch(kernels, (logits, target.repeat_interleave(3)[::3]), options, up))


@pytest.mark.parametrize(
    ("kernels", "shape"),
    [
        *over(CPU, [(0, 5), (3, 5), (1, 1000), (0, 5, 8), (2, 5, 8)]),
        *over(TRITON, [(0, 5), (0, 5000), (3, 5), (3, 5000), (0, 5, 8), (2, 5, 8)]),
        *over(
            emulated(REGIMES, "block", "cluster_2", "kept_2", "single_elements"),
            [(0, 5), (0, 1000), (3, 0), (3, 5), (1, 1000)],
        ),
        *over(emulated(REGIMES, "warp"), [(0, 5), (3, 5)]),
        *over(emulated(REGIMES, "warp_of_vectors"), [(0, 1000), (3, 0), (1, 1000)]),
        *over(emulated(PIXELS), [(0, 5, 8), (2, 5, 8), (1, 0, 8), (1, 300, 8)]),
    ],
)
def test_nothing_counted(kernels: Kernels, shape: tuple[int, ...]) -> None:
    rows = shape[0] * (shape[2] if len(shape) == 3 else 1)
    case = torch.full(shape, torch.nan), torch.full((rows,), cases.IGNORE)
    check(SoftmaxBatch(kernels, case, {"complement_gamma": -1.0}))


@pytest.mark.parametrize(
    ("kernels", "shape"),
    [
        *over(CPU, [(8, 7), (8, 259), (1, 7, 8), (1, 70, 8)]),
        *over(TRITON, [(8, 7), (8, 4099), (1, 6, 8), (1, 70, 8)]),
        *over(emulated(REGIMES, "block", "cluster_4", "kept_2", "single_elements", "warp"), [(8, 7), (8, 259)]),
        *over(emulated(PIXELS), [(1, 7, 8), (1, 70, 8)]),
    ],
)
def test_infinite_and_undefined_logits(kernels: Kernels, shape: tuple[int, ...]) -> None:
    rows, target = cases.random_case(8, shape[1], ignore=False)
    target[:] = torch.arange(8) % 5
    rows[0] = -torch.inf
    rows[0, 0] = 1.0  # the target alone has mass
    rows[1, 2:] = -torch.inf  # one other class does
    rows[2, 2] = -torch.inf  # the target has none
    rows[3, 5] = torch.nan
    rows[4, 4] = torch.nan
    rows[5, 3] = torch.inf
    rows[6, 1] = torch.inf  # of the target
    mitigation = torch.linspace(0.0, 1.0, shape[1])
    mitigation[:3] = -torch.inf  # of classes that nobody has counted, targets among them
    seesaw = {"class_mitigation": mitigation, "compensation": 2.0}
    for options in ({}, {"focal_gamma": 2.0, "complement_gamma": -1.0}, seesaw):
        one = SoftmaxBatch(kernels, (shaped(rows, shape), target), options)
        check(one, factor=2)
        assert one.losses[0][2] == torch.inf
        assert all(grad.movedim(1, -1).reshape(8, -1)[2].isfinite().all() for grad in one.grads)
