"""Promise: how rows, pixels and statistics lie is seen, so that what is fast where they lie well is right elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import cases
import sigmoid_cases
from batches import ProbabilityBatch, SigmoidBatch, SoftmaxBatch, one_thread, probability_case, random_case
from emulation import build, harness
from emulation.harness import BACKWARD, LOSS
from emulation.plans import PIXELS, SIGMOID_PIXELS, SIGMOID_REGIMES, launches, swept
from tolerances import assert_close, assert_same

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def test_how_rows_lie_is_seen() -> None:
    def lie(classes: int, layout: str, grad_layout: str) -> tuple[bool, bool]:
        batch = SoftmaxBatch(swept(), cases.random_case(3, classes), {}, layout=layout, grad_layout=grad_layout)
        problem = harness.describe(launches(batch)[1])
        return problem.aligned, problem.alike

    assert lie(128, "contiguous", "contiguous") == (True, True)
    assert lie(127, "contiguous", "contiguous") == (False, True)
    assert lie(128, "offset", "offset") == (False, True)
    assert lie(128, "offset", "contiguous") == (False, False)
    assert lie(128, "contiguous", "row_stride") == (False, False)


def image_backward(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, **how: str) -> harness.Launch:
    return launches(SoftmaxBatch(PIXELS["alone"], random_case(shape, dtype), {}, **how))[1]


def test_how_images_lie_is_seen() -> None:
    def aligned(shape: tuple[int, int, int], **strides: int) -> bool:
        one = image_backward(shape)
        return bool(harness.describe(replace(one, fields={**one.fields, **strides})).aligned)

    assert aligned((2, 5, 16))
    assert not aligned((2, 5, 15), logits_stride=80, logits_class_stride=16, grad_stride=80, grad_class_stride=16)
    for side in ("logits", "grad"):
        assert not aligned((2, 5, 16), **{f"{side}_stride": 82})
        assert not aligned((2, 5, 16), **{f"{side}_class_stride": 18})
        assert aligned((1, 1, 16), **{f"{side}_stride": 82, f"{side}_class_stride": 18}), "strides that nothing uses"


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize(
    ("layout", "grad_layout"), [("whole_vectors_apart", "contiguous"), ("offset", "offset"), ("contiguous", "offset")]
)
def test_whole_vectors_of_a_larger_image_are_seen(layout: str, grad_layout: str, dtype: torch.dtype) -> None:
    for shape in ((2, 6, 16), (3, 70, 24), (2, 9, 21)):
        found = harness.describe(image_backward(shape, dtype, layout=layout, grad_layout=grad_layout)).aligned
        assert found == (shape[2] % 8 == 0 and "offset" not in (layout, grad_layout))


def sigmoid(
    plan: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype, elementwise: bool = True, **how: str
) -> list[harness.Launch]:
    plans = SIGMOID_PIXELS if len(shape) == 3 else SIGMOID_REGIMES
    logits, target = sigmoid_cases.random_case(shape, kind, dtype)
    options = sigmoid_cases.options("plain", logits)
    return launches(SigmoidBatch(plans[plan], (logits, target), options, elementwise, **how))


def test_how_matrices_lie_is_seen() -> None:
    def lie(classes: int, kind: str, dtype: torch.dtype, elementwise: bool, **how: str) -> bool:
        return bool(harness.describe(sigmoid("block", (3, classes), kind, dtype, elementwise, **how)[2]).alike)

    for dtype in harness.STORAGES:
        for kind in ("class", "soft"):
            for classes in (64, 127):
                assert lie(classes, kind, dtype, True)
            assert not lie(64, kind, dtype, False, layout="offset", grad_layout="contiguous")
            assert not lie(64, kind, dtype, False, grad_layout="row_stride")
    assert lie(64, "class", torch.bfloat16, False, layout="offset")
    assert not lie(64, "class", torch.bfloat16, True, layout="offset")
    assert lie(64, "soft", torch.bfloat16, False, layout="offset"), "one element past a boundary, each in its type"


def test_how_class_probabilities_lie_is_seen() -> None:
    def lie(dtype: torch.dtype, target_dtype: torch.dtype, pass_: int = 1, **how: str) -> bool:
        case = probability_case((3, 127), dtype, target_dtype)
        return bool(
            harness.describe(launches(ProbabilityBatch(SIGMOID_REGIMES["block"], case, {}, **how))[pass_]).alike
        )

    for dtype in harness.STORAGES:
        for target_dtype in (dtype, torch.float32):
            assert lie(dtype, target_dtype)
            assert not lie(dtype, target_dtype, layout="offset")
            assert not lie(dtype, target_dtype, target_layout="row_stride")
            assert not lie(dtype, target_dtype, grad_layout="offset")
            assert lie(dtype, target_dtype, LOSS, grad_layout="offset"), "not written"
            assert lie(dtype, target_dtype, layout="offset", target_layout="offset"), (
                "one element past a boundary, each in its type"
            )


def test_how_images_of_elements_lie_is_seen() -> None:
    def lie(pixels: int, kind: str, dtype: torch.dtype, pass_: int = 2, **how: str) -> bool:
        return bool(harness.describe(sigmoid("along", (2, 8, pixels), kind, dtype, **how)[pass_]).alike)

    for dtype in harness.STORAGES:
        for kind in ("class", "soft"):
            assert lie(64, kind, dtype)
            assert lie(64, kind, dtype, layout="whole_vectors_apart")
            assert not lie(63, kind, dtype)
            for layout in ("class_stride", "image_stride", "offset"):
                assert not lie(64, kind, dtype, layout=layout)
                assert not lie(64, kind, dtype, grad_layout=layout)
            assert lie(64, kind, dtype, LOSS, grad_layout="offset"), "not written"
            assert not lie(64, kind, dtype, BACKWARD, grad_layout="class_stride")
    assert lie(4, "class", torch.float32)
    assert not lie(4, "class", torch.bfloat16)


@pytest.mark.parametrize("upstream", ["stride0", "strided"])
@pytest.mark.parametrize("name", ["alone", "kept", "single"])
def test_statistics_of_images_by_pixel(name: str, upstream: str) -> None:
    """As by column, which is how the loss writes them."""
    logits, target = random_case((2, 19, 16))
    up = cases.upstreams((32,), torch.float32)[upstream]
    options: dict[str, Any] = {"focal_gamma": 2.0, "label_smoothing": 0.1}
    batch = SoftmaxBatch(PIXELS[name], (logits, target.repeat_interleave(3)[::3]), options, up)
    loss, backward = launches(batch)[:2]
    harness.run([loss])
    by_pixel = batch.stats[0].contiguous()
    backward.fields.update(stats=by_pixel, stats_stride=5, stats_column_stride=1)
    harness.run([backward])
    grad = batch.grads[0].clone()
    harness.run(launches(batch)[:2])
    assert_same(grad, batch.grads[0])


@pytest.mark.parametrize("name", ["alone", "shared_classes", "single_alone"])
def test_more_classes_than_one_sum_holds(name: str) -> None:
    """Terms that round the same way each time: one running sum would be off by thousands of roundings."""
    classes = 150_001
    logits = torch.full((1, classes, 8), -0.1)
    logits[:, 7] = 0.0
    target = torch.arange(8) * 11_111
    batch = SoftmaxBatch(PIXELS[name], (logits, target), {"complement_gamma": -1.0})
    harness.run(launches(batch)[:2])
    terms = torch.exp(logits[0].t().double())
    terms[torch.arange(8), target] = 0.0
    assert_close(batch.stats[0][:, 1], terms.sum(1), what="d", factor=2)
