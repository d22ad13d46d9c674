"""Promise: the CUDA kernels compute the softmax family over images [N, C, P] where they lie, seen on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import cases
from emulation import build, harness
from emulation.harness import BACKWARD, LOSS, LOSS_AND_GRAD, SHARED, SWEEP, Device, Plan, Problem
from emulation.image_layouts import LAYOUTS
from emulation.image_numerics import ImageBatch, over_pixels
from emulation.numerics import assert_padding_untouched, check, one_thread
from tolerances import assert_close, assert_same

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
HALVES = (torch.bfloat16, torch.float16)
# Pixels of several images in one block; classes that are whole groups, less than one, and more than one and a part.
WHOLE = ((3, 7, 16), (2, 19, 40), (1, 8, 136), (2, 1, 8), (1, 2, 8), (1, 150, 16))
RAGGED = ((3, 7, 5), (2, 19, 33), (1, 1, 40), (2, 2, 1), (1, 16, 9), (1, 150, 17))
PLANS = {
    "alone": over_pixels(32, 32),
    "shared_classes": over_pixels(8, 64),
    "kept": over_pixels(16, 64, kept=True),
    "kept_alone": over_pixels(32, 32, kept=True),
}
SINGLE = {
    "single_alone": over_pixels(64, 64, vector=False),
    "single": over_pixels(32, 128, vector=False),
    "single_kept": over_pixels(32, 64, vector=False, kept=True),
}
EVERY = {**PLANS, **SINGLE}
H200 = Device(90, 132, 227 * 1024, 228 * 1024)
DEVICES = [Device(80, 108, 163 * 1024, 164 * 1024), H200, Device(120, 170, 99 * 1024, 100 * 1024)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def poisoned_case(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple:
    n, c, p = shape
    logits, target = cases.random_case(n * p, c, dtype)
    return cases.poison_ignored(logits, target), target


def shapes_of(name: str) -> tuple[tuple[int, int, int], ...]:
    return RAGGED if name in SINGLE else WHOLE


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("name", EVERY)
def test_every_plan(name: str, dtype: torch.dtype) -> None:
    for shape in shapes_of(name):
        case = poisoned_case(shape, dtype)
        for option_set in ("plain", "mixed"):
            options = cases.options(option_set, shape[1], case[1], dtype)
            check(harness.run, ImageBatch(EVERY[name], case, options, shape))


@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
def test_every_option(option_set: str) -> None:
    for name, shape in (("shared_classes", (2, 19, 16)), ("kept_alone", (1, 7, 24)), ("single", (3, 30, 5))):
        case = poisoned_case(shape)
        check(harness.run, ImageBatch(EVERY[name], case, cases.options(option_set, shape[1], case[1]), shape))


@pytest.mark.parametrize("option_set", ["smoothing_weight", "class_bias", "softcap", "mixed_linear"])
@pytest.mark.parametrize("dtype", HALVES, ids=cases.name)
def test_options_of_half_types(dtype: torch.dtype, option_set: str) -> None:
    for name, shape in (("shared_classes", (2, 19, 16)), ("kept", (1, 127, 8)), ("single", (3, 30, 5))):
        case = poisoned_case(shape, dtype)
        check(harness.run, ImageBatch(EVERY[name], case, cases.options(option_set, shape[1], case[1], dtype), shape))


@pytest.mark.parametrize("margin", cases.MARGINS)
def test_margins(margin: float) -> None:
    for classes in (1, 2, 30):
        case = cases.margin_case(margin, classes, rows=8)
        for gamma in (0.0, 0.5, 2.0):
            for name in ("shared_classes", "kept_alone", "single_alone"):
                options = {"focal_gamma": gamma, "complement_gamma": -1.0}
                check(harness.run, ImageBatch(EVERY[name], case, options, (1, classes, 8)))


@pytest.mark.parametrize("name", ["alone", "shared_classes", "single_alone"])
def test_more_classes_than_one_sum_holds(name: str) -> None:
    """Terms that round the same way each time: one running sum would be off by thousands of roundings."""
    classes = 150_001
    logits = torch.full((8, classes), -0.1)
    logits[:, 7] = 0.0
    target = torch.arange(8) * 11_111
    run = ImageBatch(EVERY[name], (logits, target), {"complement_gamma": -1.0}, (1, classes, 8))
    harness.run(run.launches()[:2])
    terms = torch.exp(logits.double() - 0.0)
    terms[torch.arange(8), target] = 0.0
    assert_close(run.stats[0][:, 1], terms.sum(1), what="d", factor=2)


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize(
    ("layout", "grad_layout"), [("whole_vectors_apart", "contiguous"), ("offset", "offset"), ("contiguous", "offset")]
)
def test_part_of_a_larger_image(layout: str, grad_layout: str, dtype: torch.dtype) -> None:
    for shape in ((2, 6, 16), (3, 70, 24), (2, 9, 21)):
        case = poisoned_case(shape, dtype)
        options = cases.options("mixed", shape[1], case[1], dtype)
        run = ImageBatch(EVERY["single"], case, options, shape, layout=layout, grad_layout=grad_layout)
        aligned = harness.describe(run.launches()[1]).aligned
        assert aligned == (shape[2] % 8 == 0 and "offset" not in (layout, grad_layout))
        for name in ("shared_classes", "kept") if aligned else ("single", "single_kept"):
            run.plans = EVERY[name]
            check(harness.run, run)


@pytest.mark.parametrize("layouts", [("far_apart", "contiguous"), ("contiguous", "far_apart")])
def test_offsets_of_64_bits(layouts: tuple[str, str]) -> None:
    shape = (2, 5, 16)
    case = cases.random_case(32, 5, torch.float16, ignore=False)
    for name in ("shared_classes", "kept_alone", "single"):
        options = {"label_smoothing": 0.1} if name == "single" else {}
        run = ImageBatch(EVERY[name], case, options, shape, layout=layouts[0], grad_layout=layouts[1])
        check(harness.run, run)


def test_class_vectors_anywhere() -> None:
    """Weights and biases that begin at no 16-byte boundary."""
    case = poisoned_case((2, 19, 16))
    options = cases.options("mixed", 19, case[1])
    for name in ("weight", "class_bias", "class_margin"):
        options[name] = cases.LAYOUTS["offset"](options[name])
    for name in ("shared_classes", "single"):
        check(harness.run, ImageBatch(EVERY[name], case, options, (2, 19, 16)))


@pytest.mark.parametrize("upstream", ["stride0", "strided"])
def test_strides_of_upstream_target_and_stats(upstream: str) -> None:
    logits, target = poisoned_case((2, 19, 16))
    up = cases.upstreams((32,), torch.float32)[upstream]
    options = {"focal_gamma": 2.0, "label_smoothing": 0.1}
    for name in ("alone", "kept", "single"):
        run = ImageBatch(EVERY[name], (logits, target.repeat_interleave(3)[::3]), options, (2, 19, 16), up)
        check(harness.run, run)
        loss, backward = run.launches()[:2]
        harness.run([loss])
        by_pixel = run.stats[0].contiguous()
        backward.fields.update(stats=by_pixel, stats_stride=5, stats_column_stride=1)
        harness.run([backward])
        grad = run.grads[0].clone()
        harness.run(run.launches()[:2])
        assert_same(grad, run.grads[0])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 5, 8), (1, 0, 8), (1, 300, 8)])
def test_nothing_counted(shape: tuple[int, int, int], name: str) -> None:
    n, c, p = shape
    case = torch.full((n * p, c), torch.nan), torch.full((n * p,), cases.IGNORE)
    check(harness.run, ImageBatch(EVERY[name], case, {"complement_gamma": -1.0}, shape))


@pytest.mark.parametrize("name", EVERY)
def test_infinite_and_undefined_logits(name: str) -> None:
    for classes in (7, 70):
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
            check(harness.run, ImageBatch(EVERY[name], (logits, target), options, (1, classes, 8)), factor=2)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_targets_out_of_range_trip_an_assertion(bad: int, name: str) -> None:
    logits, target = cases.random_case(16, 50, ignore=False)
    target[2] = bad
    for one in ImageBatch(EVERY[name], (logits, target), {}, (2, 50, 8)).launches():
        with pytest.raises(harness.LaunchFailed, match=r"device-side assertion: .*target"):
            harness.run([one])


def problems() -> Iterator[Any]:
    for pass_ in (LOSS, BACKWARD, LOSS_AND_GRAD):
        for classes in (0, 1, 2, 5, 19, 21, 80, 150, 1203, 5000, 128256, 2**24 - 1):
            for rows in (1, 64, 4096, 2**20, 2**33):
                for size, aligned in ((2, True), (4, True), (2, False), (4, False)):
                    yield Problem(pass_, size, rows, classes, aligned, aligned, False, True)


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"sm_{d.capability}")
def test_every_plan_can_run(device: Any) -> None:
    for problem in problems():
        plan = harness.plan_of(problem, device)
        said = f"{plan} for {[getattr(problem, name) for name, _ in Problem._fields_]}"
        assert plan.vector == problem.aligned, said
        assert plan.threads in (32, 64, 128, 256), said
        assert plan.threads <= (128 if plan.vector and problem.element_size == 2 else 256), said
        assert plan.lanes in (8, 16, 32, 64, 128, 256), said
        assert plan.lanes <= plan.threads, said
        assert plan.lanes >= (8 if plan.vector else 32), said
        assert harness.shared_bytes(plan, problem) <= device.shared_per_block, said
        assert plan.regime == SWEEP or (plan.regime == SHARED and problem.pass_ == LOSS_AND_GRAD), said


@pytest.mark.parametrize(
    ("classes", "rows", "expected"),
    [
        (21, 2**21, Plan(SHARED, True, 128, 128)),
        (1203, 2**22, Plan(SHARED, True, 128, 8)),
        (5000, 2**22, Plan(SWEEP, True, 128, 8)),
        (1203, 512, Plan(SHARED, True, 128, 8)),
    ],
)
def test_logits_stay_on_chip_as_long_as_they_fit(classes: int, rows: int, expected: Plan) -> None:
    assert harness.plan_of(Problem(LOSS_AND_GRAD, 2, rows, classes, True, True, False, True), H200) == expected
    once = harness.plan_of(Problem(LOSS, 2, rows, classes, True, True, False, True), H200)
    assert once.regime == SWEEP
    assert (once.lanes < once.threads) == (rows < 2**16), "few pixels share their classes' threads"


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"sm_{d.capability}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
def test_chosen_plans_give_right_results(dtype: torch.dtype, device: Any) -> None:
    for shape in ((2, 21, 16), (1, 100, 9), (1, 1203, 8)):
        case = poisoned_case(shape, dtype)
        options = cases.options("mixed", shape[1], case[1], dtype)
        run = ImageBatch(EVERY["single"], case, options, shape)
        harness.run([harness.planned(one, device) for one in run.launches()])
        run.check()


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("shape", [(2, 5, 32), (3, 70, 7), (1, 1, 8), (2, 1030, 16)])
def test_scale_grad(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, _, p = shape
    grad = torch.randn(shape, generator=cases.generator(3)).to(dtype)
    ups = cases.upstreams((n * p,), torch.float32)
    ups["some"] = torch.where(torch.arange(n * p) % 16 < 8, 1.0, -2.0)
    for up in ups.values():
        expected = (grad.float() * up.reshape(n, 1, p)).to(dtype)
        for layout in ("contiguous", "whole_vectors_apart", "offset"):
            for processors in (1, 132):
                actual = LAYOUTS[layout](grad)
                harness.run([harness.scaling(actual, up, processors)])
                assert_same(actual.clone(), expected)
                assert_padding_untouched(actual, "gradient")
    ones = torch.ones(()).expand(n * p)
    harness.run([harness.scaling(actual := grad.clone(), ones, 132)])
    assert_same(actual, grad)


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
def test_scale_grad_leaves_ignored_rows_alone(dtype: torch.dtype) -> None:
    for shape in ((2, 5, 32), (3, 70, 7), (1, 1, 24)):
        for name, grad, up, target, expected in cases.scalings(shape, dtype):
            for layout in ("contiguous", "whole_vectors_apart", "offset"):
                for processors in (1, 132):
                    actual = LAYOUTS[layout](grad)
                    harness.run([harness.scaling(actual, up, processors, target)])
                    assert_same(actual.clone(), expected, f"{name} {shape} {layout}")


def test_how_images_lie_is_seen() -> None:
    def aligned(shape: tuple[int, int, int], **strides: int) -> bool:
        rows = shape[0] * shape[2]
        one = ImageBatch(EVERY["alone"], cases.random_case(rows, shape[1]), {}, shape).launches()[1]
        one.fields.update(strides)
        return bool(harness.describe(one).aligned)

    assert aligned((2, 5, 16))
    assert not aligned((2, 5, 15), logits_stride=80, logits_class_stride=16, grad_stride=80, grad_class_stride=16)
    for side in ("logits", "grad"):
        assert not aligned((2, 5, 16), **{f"{side}_stride": 82})
        assert not aligned((2, 5, 16), **{f"{side}_class_stride": 18})
        assert aligned((1, 1, 16), **{f"{side}_stride": 82, f"{side}_class_stride": 18}), "strides that nothing uses"
