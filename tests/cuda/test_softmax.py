"""Promise: the CUDA kernels compute the family, seen on the host, where no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cases
from emulation import build, harness
from emulation.numerics import REGIMES, Batch, Plans, assert_padding_untouched, check, in_warp, kept, one_thread, swept
from tolerances import assert_same

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
SIZES = {1: 7, 2: 9, 3: 8, 31: 6, 127: 5, 128: 6, 1000: 3, 5000: 2}
FEW = ("plain", "smoothing_weight", "mixed")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def poisoned_case(classes: int, dtype: torch.dtype = torch.float32, rows: int | None = None) -> tuple:
    logits, target = cases.random_case(rows or SIZES[classes], classes, dtype)
    return cases.poison_ignored(logits, target), target


def warps(classes: int, dtype: torch.dtype) -> list[Plans]:
    """The least and the most lanes for single elements, and for vectors if rows are made of them."""
    held = {True: 32, False: 16}
    per_vector = 16 // dtype.itemsize
    plans = []
    for vector in (False, True):
        fitting = [n for n in (1, 2, 4, 8, 16, 32) if n * held[vector] >= classes]
        if fitting and not (vector and classes % per_vector):
            plans += [in_warp(n, vector) for n in {fitting[0], 32}]
    return plans


# Beside the smallest and the largest cluster, which see every size and type.
IN_BETWEEN = {"cluster_4", "cluster_8", "kept_4", "kept_8", "one_warp", "widest"}
REGIME_CASES = [
    (regime, classes, dtype)
    for regime in REGIMES
    for classes in SIZES
    for dtype in harness.STORAGES
    if regime not in IN_BETWEEN or (classes in (31, 1000, 5000) and dtype != torch.float16)
]


@pytest.mark.parametrize(
    ("regime", "classes", "dtype"), REGIME_CASES, ids=lambda x: cases.name(x) if isinstance(x, torch.dtype) else None
)
def test_every_regime(regime: str, classes: int, dtype: torch.dtype) -> None:
    plans = REGIMES[regime]
    case = poisoned_case(classes, dtype, rows=3 if plans.both.cluster > 4 else None)  # many threads are slow
    for option_set in ("plain", "mixed"):
        check(harness.run, Batch(plans, case, cases.options(option_set, classes, case[1], dtype)))


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("classes", [1, 2, 3, 24, 31, 127, 128, 256, 512, 1000, 1024])
def test_rows_in_a_warp(classes: int, dtype: torch.dtype) -> None:
    for rows in (1, 33):
        case = poisoned_case(classes, dtype, rows)
        for option_set in FEW:
            for plans in warps(classes, dtype):
                check(harness.run, Batch(plans, case, cases.options(option_set, classes, case[1], dtype)))


@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
def test_every_option(option_set: str) -> None:
    for classes in (3, 127, 1000):
        case = poisoned_case(classes)
        options = cases.options(option_set, classes, case[1])
        for plans in (*warps(classes, torch.float32)[:1], swept(), swept(2), swept(vector=False), kept(), kept(2)):
            check(harness.run, Batch(plans, case, options))


@pytest.mark.parametrize("option_set", ["weight", "class_bias", "softcap", "mixed_linear"])
@pytest.mark.parametrize("dtype", HALVES, ids=cases.name)
def test_options_of_half_types(dtype: torch.dtype, option_set: str) -> None:
    for classes in (127, 1000):
        case = poisoned_case(classes, dtype)
        options = cases.options(option_set, classes, case[1], dtype)
        for plans in (*warps(classes, dtype)[-1:], swept(2), kept(2)):
            check(harness.run, Batch(plans, case, options))


@pytest.mark.parametrize("margin", cases.MARGINS)
def test_margins(margin: float) -> None:
    for classes in (1, 2, 127):
        case = cases.margin_case(margin, classes, rows=4)
        for gamma in (0.0, 0.5, 2.0):
            for plans in (in_warp(32), swept(2), kept()):
                check(harness.run, Batch(plans, case, {"focal_gamma": gamma, "complement_gamma": -1.0}))


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("layout", ["row_stride", "offset"])
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """Rows that begin anywhere within 16 bytes, with the gradient's rows alike, and otherwise."""
    for classes in (5, 64, 127, 1000, 1003):
        case = poisoned_case(classes, dtype, rows=9)
        options = cases.options("mixed", classes, case[1], dtype)
        for plans in (swept(), swept(4), kept(), kept(2)):
            check(harness.run, Batch(plans, case, options, layout=layout))
        scalar = [swept(2, vector=False), *([in_warp(32)] if classes <= 512 else [])]
        for plans in scalar:
            check(harness.run, Batch(plans, case, options, layout=layout, grad_layout="contiguous"))


@pytest.mark.parametrize("layouts", [("far_apart", "contiguous"), ("contiguous", "far_apart")])
def test_offsets_of_64_bits(layouts: tuple[str, str]) -> None:
    case = cases.random_case(2, 64, torch.float16, ignore=False)
    for plans in (in_warp(32, vector=True), in_warp(32), swept(), swept(2, vector=False), kept(2)):
        check(harness.run, Batch(plans, case, {}, layout=layouts[0], grad_layout=layouts[1]))


def test_class_vectors_anywhere() -> None:
    """Weights and biases that begin at no 16-byte boundary."""
    for classes in (128, 1001):
        case = poisoned_case(classes, rows=5)
        options = cases.options("mixed", classes, case[1])
        for name in ("weight", "class_bias", "class_margin"):
            options[name] = cases.LAYOUTS["offset"](options[name])
        for plans in (*warps(classes, torch.float32)[-1:], swept(2), kept()):
            check(harness.run, Batch(plans, case, options))


@pytest.mark.parametrize("upstream", ["stride0", "strided"])
def test_strides_of_upstream_and_target(upstream: str) -> None:
    logits, target = poisoned_case(1000, rows=6)
    up = cases.upstreams((6,), torch.float32)[upstream]
    options = {"focal_gamma": 2.0, "label_smoothing": 0.1}
    for plans in (swept(), swept(2), kept(2), in_warp(32, vector=True)):
        check(harness.run, Batch(plans, (logits, target.repeat_interleave(3)[::3]), options, up))


@pytest.mark.parametrize("regime", ["block", "cluster_2", "kept_2", "single_elements", "warp"])
@pytest.mark.parametrize(("rows", "classes"), [(0, 5), (0, 1000), (3, 0), (3, 5), (1, 1000)])
def test_nothing_counted(rows: int, classes: int, regime: str) -> None:
    case = torch.full((rows, classes), torch.nan), torch.full((rows,), cases.IGNORE)
    plans = REGIMES.get(regime) or in_warp(32, vector=classes % 4 == 0)
    check(harness.run, Batch(plans, case, {"complement_gamma": -1.0}))


@pytest.mark.parametrize("regime", ["block", "cluster_4", "kept_2", "single_elements", "warp"])
def test_infinite_and_undefined_logits(regime: str) -> None:
    for classes in (7, 259):
        logits, target = cases.random_case(8, classes, ignore=False)
        target[:] = torch.arange(8) % 5
        logits[0] = -torch.inf
        logits[0, 0] = 1.0  # the target alone has mass
        logits[1, 2:] = -torch.inf  # one other class does
        logits[2, 2] = -torch.inf  # the target has none
        logits[3, 5] = torch.nan
        logits[4, 4] = torch.nan
        logits[5, 3] = torch.inf
        logits[6, 1] = torch.inf  # of the target
        for options in ({}, {"focal_gamma": 2.0, "complement_gamma": -1.0}):
            plans = REGIMES.get(regime) or in_warp(32)
            check(harness.run, Batch(plans, (logits, target), options), factor=2)


@pytest.mark.parametrize("regime", ["block", "cluster_2", "kept_2", "single_elements", "warp"])
@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_targets_out_of_range_trip_an_assertion(bad: int, regime: str) -> None:
    logits, target = cases.random_case(4, 50, ignore=False)
    target[2] = bad
    plans = REGIMES.get(regime) or in_warp(32)
    for one in Batch(plans, (logits, target), {}).launches():
        with pytest.raises(harness.LaunchFailed, match=r"device-side assertion: .*target"):
            harness.run([one])


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("classes", [1, 3, 33, 1000, 5003])
def test_scale_grad(classes: int, dtype: torch.dtype) -> None:
    grad = torch.randn(6, classes, generator=cases.generator(3)).to(dtype)
    ups = cases.upstreams((6,), torch.float32)
    ups["some"] = torch.tensor([1.0, -2.0, 1.0, 0.5, 1.0, 1.0])
    for up in ups.values():
        for layout in ("contiguous", "row_stride", "offset"):
            for processors in (1, 132):
                actual, again = cases.LAYOUTS[layout](grad), cases.LAYOUTS[layout](grad)
                harness.run([harness.scaling(actual, up, processors)])
                assert_same(actual, (grad.float() * up[:, None]).to(dtype))
                assert_padding_untouched(actual, "gradient")
                harness.run([harness.scaling(again, up, processors).otherwise()])
                assert_same(again, actual)


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
def test_scale_grad_leaves_ignored_rows_alone(dtype: torch.dtype) -> None:
    for shape in ((12, 1), (12, 33), (12, 5003)):
        for name, grad, up, target, expected in cases.scalings(shape, dtype):
            for layout in ("contiguous", "row_stride", "offset"):
                for processors in (1, 132):
                    actual = cases.LAYOUTS[layout](grad)
                    harness.run([harness.scaling(actual, up, processors, target)])
                    assert_same(actual.clone(), expected, f"{name} {shape} {layout}")
