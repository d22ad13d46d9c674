"""Promise: whatever computes them, the sigmoid operators equal float64, over rows [N, C] and images [N, C, P]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
import sigmoid_cases
from batches import Kernels, SigmoidBatch, check, one_thread
from emulation.harness import STORAGES
from emulation.plans import SIGMOID_PIXELS, SIGMOID_REGIMES, emulated
from interpreted import HALVES
from kernels import CPU, GPU, TRITON, Operators, over
from tolerances import assert_close

KINDS = sigmoid_cases.TARGETS
FLOATS = (torch.float32, *HALVES)
BOTH = (False, True)
CPU_SHAPES = [(7, 11), (2, 1000), (3, 7, 5), (2, 19, 32)]
# Short rows; rows whose ends are not aligned; more than one block; pixels of several images in one program.
TRITON_SHAPES = [(9, 1), (7, 11), (3, 127), (2, 4100), (3, 7, 5), (2, 19, 32)]
# The interpreter is slow: every option once over rows and over images, four of them elsewhere.
TRITON_OPTIONS = [(3, 127), (3, 7, 5)]
EMULATED_ROWS = [(9, 1), (7, 11), (5, 64), (6, 127), (3, 1003), (2, 2100)]
EMULATED_IMAGES = [(3, 7, 35), (2, 19, 64), (1, 1, 96), (2, 70, 40), (5, 3, 1)]
GPU_SHAPES = [(300, 1), (301, 11), (66, 127), (129, 1000), (130, 8192), (40, 50257), (3, 7, 35), (2, 19, 1024),
              (1, 1, 4096), (2, 70, 333), (2, 1203, 512)]  # fmt: skip
ROWS = emulated(SIGMOID_REGIMES, "lanes", "block", "cluster_2", "warp_of_single_elements")
PIXELS = emulated(SIGMOID_PIXELS, "along", "in_a_warp", "single_pixels_spread")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def batch(
    kernels: Kernels,
    shape: tuple[int, ...],
    kind: str,
    option_set: str,
    elementwise: bool,
    dtype: torch.dtype = torch.float32,
    **how: Any,
) -> SigmoidBatch:
    logits, target = sigmoid_cases.random_case(shape, kind, dtype)
    if kind == "class" and len(shape) == 3 and shape[2] >= 16:
        target[0, :16] = cases.IGNORE  # all that a thread has
    case = sigmoid_cases.poisoned(logits, target), target
    return SigmoidBatch(kernels, case, sigmoid_cases.options(option_set, logits), elementwise, **how)


def with_every_option(
    kernels: Mapping[str, Kernels], shapes: list[tuple[int, ...]], at: Iterable[str] = (), alternate: bool = False
) -> Iterator[object]:
    """at: the option sets, if not all that a kind of targets takes; alternate: elementwise or summed in turn."""
    for kind in KINDS:
        for i, name in enumerate(sigmoid_cases.sets_for(kind, inner=True)):
            if not at or name in at:
                yield from over(kernels, shapes, [kind], [name], [i % 2 == 0] if alternate else BOTH)


@pytest.mark.parametrize(
    ("kernels", "shape", "kind", "option_set", "elementwise"),
    [
        *with_every_option(CPU, CPU_SHAPES),
        *with_every_option(TRITON, TRITON_OPTIONS, alternate=True),
        *with_every_option(
            *(TRITON, [x for x in TRITON_SHAPES if x not in TRITON_OPTIONS]),
            at=("plain", "mixed", "by_target", "balanced"),
            alternate=True,
        ),
        *with_every_option(ROWS, [(6, 127)]),
        *with_every_option(PIXELS, [(2, 21, 48)]),
        *with_every_option(GPU, GPU_SHAPES),
    ],
)
def test_every_option(kernels: Kernels, shape: tuple[int, ...], kind: str, option_set: str, elementwise: bool) -> None:
    check(batch(kernels, shape, kind, option_set, elementwise))


SLOW = ("widest", "cluster_16")  # many threads


@pytest.mark.parametrize(
    ("kernels", "shape", "kind", "elementwise"),
    [
        *over(emulated(SIGMOID_REGIMES, *(x for x in SIGMOID_REGIMES if x not in SLOW)), EMULATED_ROWS, KINDS, BOTH),
        *over(emulated(SIGMOID_REGIMES, *SLOW), [(9, 1), (6, 127), (2, 2100)], KINDS, BOTH),
        *over(emulated(SIGMOID_PIXELS), EMULATED_IMAGES, KINDS, BOTH),
    ],
)
def test_every_size(kernels: Kernels, shape: tuple[int, ...], kind: str, elementwise: bool) -> None:
    check(batch(kernels, shape, kind, "mixed", elementwise))


SUMMED_OR_NOT = [("mixed", False), ("mixed_square", True)]


@pytest.mark.parametrize(
    ("kernels", "shape", "dtype", "kind", "options"),
    [
        *over(CPU, CPU_SHAPES, (torch.float64, *HALVES), ("class", "soft"), SUMMED_OR_NOT),
        *over(TRITON, TRITON_SHAPES[1:], HALVES[:1], ("class", "soft"), SUMMED_OR_NOT[:1]),
        *over(TRITON, [(7, 11), (2, 19, 32)], HALVES[1:], ("class", "soft"), SUMMED_OR_NOT),
        *over(ROWS, [(4, 11), (4, 1003)], HALVES, ("class", "soft"), SUMMED_OR_NOT),
        *over(PIXELS, [(2, 19, 64), (3, 7, 35)], HALVES, ("class", "soft"), SUMMED_OR_NOT),
        *over(GPU, GPU_SHAPES, HALVES, ("class", "soft"), [("mixed", False), ("mixed", True)]),
    ],
)
def test_every_type(
    kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, kind: str, options: tuple[str, bool]
) -> None:
    """Soft targets also in the type of the logits."""
    case = batch(kernels, shape, kind, *options, dtype)
    check(case)
    if kind == "soft":
        case.target = case.target.to(dtype)
        check(case)


@pytest.mark.parametrize(
    ("kernels", "shape", "gamma", "alpha"),
    [
        *over(CPU | TRITON | GPU, [(4, 8), (1, 4, 8)], cases.GAMMAS, (None, 0.25)),
        *over(emulated(SIGMOID_REGIMES, "lanes", "lane"), [(4, 8)], cases.GAMMAS, (None, 0.25)),
        *over(emulated(SIGMOID_PIXELS, "along"), [(1, 4, 8)], cases.GAMMAS, (None, 0.25)),
    ],
)
def test_saturation(kernels: Kernels, shape: tuple[int, ...], gamma: float, alpha: float | None) -> None:
    """Every margin on both sides, for both classes, between and a rounding above, in value and gradient, unclipped."""
    z = torch.tensor([sign * margin for margin in (17.0, 20.0, 89.0, 1e4) for sign in (1.0, -1.0)])
    y = torch.tensor([0.0, 1.0, 0.4, 1.0 + 2.0**-23])[:, None].expand(4, 8).contiguous()
    options = {"alpha": alpha, "gamma": gamma, "ignore_index": cases.IGNORE}
    check(SigmoidBatch(kernels, (z.repeat(4, 1).reshape(shape), y.reshape(shape)), options, True))
    rows = torch.stack([z, -z], 1)
    for target in (0, 1):
        chosen = torch.full((8,), target)
        case = (rows, chosen) if len(shape) == 2 else (rows.t()[None].contiguous(), chosen[None])
        check(SigmoidBatch(kernels, case, options, True))
    if gamma == 0 and alpha is None:
        one = SigmoidBatch(kernels, (torch.tensor([[17.0]]), torch.tensor([[0.0]])), options, True)
        one.run()
        assert one.losses[0].item() == 17.0


# Exponents by powers and by multiplication, with a probability shift and without, soft and hard targets.
GENERAL: list[dict[str, Any]] = [
    {"gamma": 0.5, "gamma_negative": 0.0, "clip": 0.05},
    {"gamma": 1.0, "gamma_negative": 4.0, "clip": 0.2, "negative_scale": 2.0, "alpha": 0.3},
    {"gamma": 0.0, "gamma_negative": 0.5, "negative_scale": 0.5},
    {"gamma": 2.0, "gamma_negative": 3.0, "detach": True},
    {"gamma": 2.0, "label_smoothing": 0.1, "clip": 0.05, "negative_scale": 0.5},
]


@pytest.mark.parametrize("options", GENERAL, ids=[f"general{i}" for i in range(len(GENERAL))])
@pytest.mark.parametrize(
    ("kernels", "shape"),
    [
        *over(CPU | TRITON | GPU, [(4, 8), (1, 4, 8)]),
        *over(emulated(SIGMOID_REGIMES, "lanes"), [(4, 8)]),
        *over(emulated(SIGMOID_PIXELS, "along"), [(1, 4, 8)]),
    ],
)
def test_saturation_with_every_option(kernels: Kernels, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    z = torch.tensor([sign * margin for margin in (17.0, 100.0, 1e4, torch.inf) for sign in (1.0, -1.0)])
    y = torch.tensor([0.0, 1.0, 0.4, 1.0 + 2.0**-7])[:, None].expand(4, 8).contiguous()  # a rounding above 1
    check(SigmoidBatch(kernels, (z.repeat(4, 1).reshape(shape), y.reshape(shape)), {"alpha": None} | options, True))
    rows = torch.stack([z, -z], 1)
    chosen = torch.arange(8) % 3 % 2
    case = (rows, chosen) if len(shape) == 2 else (rows.t()[None].contiguous(), chosen[None])
    check(SigmoidBatch(kernels, case, {"alpha": None} | options, True))


@pytest.mark.parametrize("option_set", ["plain", "focal_half", "focal", "balanced"])
@pytest.mark.parametrize(
    ("kernels", "shape", "kind"),
    [
        *over(CPU | TRITON | ROWS, [(6, 9), (6, 70)], ("class", "soft")),
        *over(CPU | TRITON | PIXELS, [(2, 9, 16)], ("class", "soft")),
    ],
)
def test_infinite_and_undefined_logits(kernels: Kernels, shape: tuple[int, ...], kind: str, option_set: str) -> None:
    logits, target = sigmoid_cases.random_case(shape, kind)
    target = target.clamp(min=0)
    if len(shape) == 2:
        logits[0, 0], logits[1, 3], logits[2, 5] = torch.inf, -torch.inf, torch.nan
    else:
        logits[0, 0, 1], logits[1, 3, 4], logits[1, 5, 9] = torch.inf, -torch.inf, torch.nan
    check(SigmoidBatch(kernels, (logits, target), sigmoid_cases.options(option_set, logits), True), factor=2)


@pytest.mark.parametrize("option_set", ["focal", "balanced"])
@pytest.mark.parametrize(
    ("kernels", "shape", "kind", "elementwise"),
    [
        *over(CPU | TRITON, [(4, 9), (2, 3, 8)], ("class", "hard"), BOTH),
        *over(ROWS, [(9, 70)], ("class", "hard"), BOTH),
        *over(PIXELS, [(2, 5, 64)], ("class", "hard"), BOTH),
    ],
)
def test_infinite_upstream_gradients_and_weights_of_what_is_ignored(
    kernels: Kernels, shape: tuple[int, ...], kind: str, elementwise: bool, option_set: str
) -> None:
    logits, target = sigmoid_cases.random_case(shape, kind)
    rows, ignored = (shape[0], *shape[2:]), target == cases.IGNORE
    up = torch.ones(shape if elementwise else rows)
    if elementwise or kind == "class":
        up.masked_fill_(ignored if kind == "hard" else ignored.unsqueeze(1) if elementwise else ignored, torch.inf)
    up = up if elementwise else up.view(-1)
    options = sigmoid_cases.options(option_set, logits)
    one = SigmoidBatch(kernels, (sigmoid_cases.poisoned(logits, target), target), options, elementwise, up)
    check(one)
    assert all(x.isfinite().all() for x in (*one.losses, *one.grads))
    if kind == "class":
        options["sample_weight"] = torch.ones(rows).masked_fill(ignored, torch.nan)
        one = SigmoidBatch(kernels, (sigmoid_cases.poisoned(logits, target), target), options, elementwise, up)
        one.run()
        assert all(x.isfinite().all() for x in (*one.losses, *one.grads))


@pytest.mark.parametrize(
    ("kernels", "shape", "kind"),
    [
        *over(CPU | TRITON, [(3, 70), (1, 3, 64)], ("class", "hard")),
        *over(ROWS, [(3, 70)], ("class", "hard")),
        *over(PIXELS, [(1, 3, 64)], ("class", "hard")),
    ],
)
def test_an_undefined_upstream_gradient_shows_where_the_slope_is_0(
    kernels: Kernels, shape: tuple[int, ...], kind: str
) -> None:
    logits = torch.full(shape, -1e4)
    target = torch.zeros(shape) if kind == "hard" else torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    up = torch.ones(shape)
    up.view(-1, shape[-1])[1, 5:] = torch.nan
    one = SigmoidBatch(kernels, (logits, target), sigmoid_cases.options("plain", logits), True, up)
    one.run()
    for grad in one.grads:
        assert torch.equal(grad.isnan(), up.isnan())


IMAGES = ["contiguous", "whole_vectors_apart", "class_stride", "image_stride", "offset"]


def image_layouts() -> Iterator[object]:
    for (name, kernels), pixels in zip(PIXELS.items(), (64, 40, 37), strict=True):
        for apart in (False, True):
            layouts = [(layout, "contiguous") if apart else (layout,) for layout in IMAGES]
            yield from over({name: kernels}, [(2, 8, pixels)], STORAGES, ("class", "soft"), layouts, [apart])


@pytest.mark.parametrize(
    ("kernels", "shape", "dtype", "kind", "layouts", "elementwise"),
    [
        *over(CPU, [(3, 64), (3, 43)], FLOATS, KINDS, [("row_stride",), ("offset",)], [False]),
        *over(
            TRITON,
            *([(3, 64), (3, 43), (3, 2505)], FLOATS[:2], ("class", "hard"), [("row_stride",), ("offset",)], [False]),
        ),
        *over(
            emulated(SIGMOID_REGIMES, "lanes", "block", "cluster_2"),
            *([(5, 5), (5, 64), (5, 1003)], STORAGES, ("class", "soft"), [("row_stride",), ("offset",)], [False]),
        ),
        *over(
            emulated(SIGMOID_REGIMES, "warp_of_single_elements", "single_elements"),
            *([(5, 5), (5, 64), (5, 1003)], STORAGES, ("class", "soft")),
            *([("row_stride", "contiguous"), ("offset", "contiguous")], [True]),
        ),
        *image_layouts(),
    ],
)
def test_layouts(
    kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, kind: str, layouts: tuple[str, ...], elementwise: bool
) -> None:
    """Rows and pixels that begin anywhere within 16 bytes, the gradient's as the logits' and otherwise."""
    how = dict(zip(("layout", "grad_layout"), layouts, strict=False))
    check(batch(kernels, shape, kind, "mixed", elementwise, dtype, **how))


APART = [("far_apart", "contiguous"), ("contiguous", "far_apart")]


@pytest.mark.parametrize(
    ("kernels", "shape", "kind", "layouts"),
    [*over(ROWS, [(2, 64)], ("class", "soft"), APART), *over(PIXELS, [(2, 3, 16)], ("class", "soft"), APART)],
)
def test_offsets_of_64_bits(kernels: Kernels, shape: tuple[int, ...], kind: str, layouts: tuple[str, str]) -> None:
    check(batch(kernels, shape, kind, "focal", False, layout=layouts[0], grad_layout=layouts[1]))


@pytest.mark.parametrize("upstream", ["stride0", "strided"])
@pytest.mark.parametrize(
    ("kernels", "shape"),
    [*over(CPU | TRITON | ROWS, [(6, 127)]), *over(CPU | TRITON | PIXELS, [(2, 7, 64)])],
)
def test_strides_of_upstream_and_target(kernels: Kernels, shape: tuple[int, ...], upstream: str) -> None:
    rows = shape[0] * (shape[2] if len(shape) == 3 else 1)
    up = cases.upstreams((rows,), torch.float32)[upstream]
    case = batch(kernels, shape, "class", "by_target", False, up=up)
    case.target = case.target.view(-1).repeat_interleave(3)[::3].view(-1)
    check(case)


@pytest.mark.parametrize(
    ("kernels", "shape", "kind"),
    [
        *over(CPU | TRITON | emulated(SIGMOID_REGIMES, "lanes"), [(5, 128)], ("class", "soft")),
        *over(CPU | TRITON | emulated(SIGMOID_PIXELS, "along"), [(2, 19, 16)], ("class", "soft")),
    ],
)
def test_class_vectors_anywhere(kernels: Kernels, shape: tuple[int, ...], kind: str) -> None:
    """Vectors that begin at no 16-byte boundary."""
    logits, target = sigmoid_cases.random_case(shape, kind)
    first, second, third = (sigmoid_cases.options(name, logits) for name in ("mixed", "per_class", "balanced"))
    for options in (first, second | third):
        vectors = {name: x for name, x in options.items() if isinstance(x, Tensor) and name != "sample_weight"}
        moved = {name: cases.LAYOUTS["offset"](x) for name, x in vectors.items()}
        check(SigmoidBatch(kernels, (sigmoid_cases.poisoned(logits, target), target), options | moved, False))


def target_of(shape: tuple[int, ...], fill: int) -> Tensor:
    return torch.full((shape[0], *shape[2:]), fill)


@pytest.mark.parametrize(
    ("kernels", "shape"),
    [*over(CPU | TRITON | ROWS, [(4, 19)]), *over(CPU | TRITON | PIXELS, [(1, 19, 16)])],
)
def test_without_an_ignored_target(kernels: Kernels, shape: tuple[int, ...]) -> None:
    logits, _ = sigmoid_cases.random_case(shape, "class")
    target = (torch.arange(target_of(shape, 0).numel()) * 5 % 19).view(shape[0], *shape[2:])
    one = SigmoidBatch(kernels, (logits, target), {"gamma": 2.0, "ignore_index": None}, False)
    check(one)
    one.target = torch.rand(shape)
    place = 0 if len(shape) == 2 else (0, 0)
    one.target[place], one.logits[place] = float(cases.IGNORE), 0.0  # out of [0, 1], but a number like others
    check(one)


@pytest.mark.parametrize("elementwise", BOTH)
@pytest.mark.parametrize(
    ("kernels", "shape", "kind"),
    [
        *over(CPU | TRITON | ROWS, [(0, 5), (3, 0)], ("class", "soft")),
        *over(CPU | TRITON | PIXELS, [(0, 5, 4), (3, 0, 4), (2, 3, 0)], ("class", "soft")),
    ],
)
def test_nothing_there(kernels: Kernels, shape: tuple[int, ...], kind: str, elementwise: bool) -> None:
    target = torch.zeros(shape) if kind == "soft" else target_of(shape, cases.IGNORE)
    check(SigmoidBatch(kernels, (torch.zeros(shape), target), {"alpha": 0.25, "gamma": 2.0}, elementwise))


@pytest.mark.parametrize(
    ("kernels", "shape"),
    over(CPU | emulated(SIGMOID_PIXELS, "along"), [(1, 5000, 4)]),
)
def test_sums_of_many_classes_are_as_exact_as_of_few(kernels: Kernels, shape: tuple[int, ...]) -> None:
    logits = torch.full(shape, 0.3)  # equal losses: their roundings add up
    for target in (target_of(shape, 0), torch.zeros_like(logits)):
        check(SigmoidBatch(kernels, (logits, target), sigmoid_cases.options("plain", logits), False))


@pytest.mark.parametrize("kernels", over(TRITON))
def test_sums_of_many_classes_where_blocks_are_smallest(kernels: Operators) -> None:
    """The loss of dense targets alone: in the interpreter thousands of classes are slow."""
    logits = torch.full((1, 3000, 4), 0.3)
    logits[0, 7, 1], logits[0, 9, 2] = torch.inf, torch.nan
    tail = sigmoid_cases.operator_options({"ignore_index": None})
    with longtail.use_backend(kernels.backend):
        loss = torch.ops.longtail.sigmoid_loss(logits, torch.zeros_like(logits), *tail, False)
    assert_close(loss, torch.nn.functional.softplus(logits.double()).sum(1).flatten())
