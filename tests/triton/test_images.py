"""Promise: the Triton kernels walk the classes of images where they lie, seen in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from interpreted import FACTOR, HALVES, interpreted, rerun, starts_it
from longtail.ops import layout, plain
from tolerances import assert_close, assert_same

pytest.importorskip("triton")
ops = torch.ops.longtail
# Pixels of several images in one program; odd and even rows of pixels; classes in registers, and swept in blocks.
SHAPES = ((3, 7, 5), (2, 19, 32), (1, 1, 40), (2, 2, 1), (2, 70, 33), (1, 150, 16))
FEW = ("plain", "smoothing_weight", "mixed")


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may go through rows."""

    def refuse(_x: Tensor) -> Tensor:
        raise AssertionError("an image was transposed")

    monkeypatch.setattr(plain, "to_rows", refuse)


def to_rows(x: Tensor) -> Tensor:
    return x.movedim(1, 2).reshape(-1, x.shape[1])


def check(shape: tuple[int, ...], option_set: str, dtype: torch.dtype) -> None:
    """All four operators against float64 on rows."""
    n, c, p = shape
    rows, target = cases.random_case(n * p, c, dtype)
    logits = layout.to_images(cases.poison_ignored(rows, target), torch.Size(shape))
    options = cases.options(option_set, c, target, dtype)
    up = cases.upstreams((n * p,), torch.float32)["random"]
    x, y = rows.double().requires_grad_(), rows.clone().requires_grad_()
    truth = longtail.reference.softmax_loss(x, target, **cases.to_float64(options))
    eager = longtail.reference.softmax_loss(y, target, **options)
    (true_grad,) = torch.autograd.grad(truth, x, up.double())
    (eager_grad,) = torch.autograd.grad(eager, y, up)
    tail = cases.operator_options(c, options)
    with longtail.use_backend("triton"):
        z = logits.clone()
        one, stats = ops.softmax_loss(z, target, *tail)
        one_grad = ops.softmax_loss_backward(up, z, target, stats, *tail)
        two, two_stats, two_grad = ops.softmax_loss_and_grad(up, z, target, *tail)
        assert_same(z, logits)
        three, three_stats = ops.softmax_loss_and_grad_(up, z, target, *tail)
    assert stats.stride() == two_stats.stride() == layout.stats_like(logits, torch.float32).stride()
    for value in (one, two, three):
        assert_close(value, truth.detach(), eager.detach(), what="loss")
    for value in (two_stats, three_stats):
        assert_close(value, stats.double(), what="stats", factor=4)
    for value in (one_grad, two_grad, z):
        assert value.is_contiguous()
        assert_close(to_rows(value), true_grad, eager_grad, what="gradient", factor=FACTOR[dtype])
    for value in (one, stats, to_rows(z)):
        assert (value[target == cases.IGNORE] == 0).all()


@interpreted
@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
def test_every_option(option_set: str) -> None:
    for shape in SHAPES:
        if shape[1] < 10 or option_set in FEW:
            check(shape, option_set, torch.float32)


@interpreted
@pytest.mark.parametrize("dtype", HALVES, ids=cases.name)
@pytest.mark.parametrize("option_set", FEW)
def test_half_precision(option_set: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[1::4]:
        check(shape, option_set, dtype)


@interpreted
@pytest.mark.parametrize("margin", cases.MARGINS)
@pytest.mark.parametrize(("classes", "gamma"), [(2, 0.0), (30, 0.5), (30, 2.0), (100, 1.5)])
def test_margins(classes: int, gamma: float, margin: float) -> None:
    rows, target = cases.margin_case(margin, classes, rows=8)
    x, y = rows.t()[None].contiguous().requires_grad_(), rows.double().requires_grad_()
    options = {"focal_gamma": gamma, "complement_gamma": -1.0}
    up = torch.randn(8, generator=cases.generator(1))
    with longtail.use_backend("triton"):
        loss = longtail.cross_entropy(x, target[None], reduction="none", **options)[0]
        (grad,) = torch.autograd.grad(loss, x, up)
    truth = longtail.reference.softmax_loss(y, target, **options)
    assert_close(loss, truth.detach(), factor=2)
    assert_close(grad[0].t(), torch.autograd.grad(truth, y, up.double())[0], factor=2)


@interpreted
@pytest.mark.parametrize("classes", [6, 70])
def test_infinite_and_undefined_logits(classes: int) -> None:
    rows, target = cases.random_case(8, classes, ignore=False)
    target[:] = torch.arange(8) % 5
    rows[0] = -torch.inf
    rows[0, 0] = 1.0
    rows[1, 2:] = -torch.inf
    rows[2, 2] = -torch.inf
    rows[3, 5] = torch.nan
    up = torch.randn(8, generator=cases.generator(1))
    for options in ({}, {"focal_gamma": 2.0, "complement_gamma": -1.0}):
        tail = cases.operator_options(classes, options)
        with longtail.use_backend("reference"):
            expected = ops.softmax_loss_and_grad(up.double(), rows.double(), target, *tail)
        with longtail.use_backend("triton"):
            loss, stats, grad = ops.softmax_loss_and_grad(up, rows.t()[None].contiguous(), target, *tail)
        for value, truth in zip((loss, stats, grad[0].t()), expected, strict=True):
            assert_close(value, truth, factor=2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("classes", [6, 70])
def test_part_of_a_larger_image(classes: int, dtype: torch.dtype) -> None:
    rows, target = cases.random_case(64, classes, dtype)
    logits = layout.to_images(rows, torch.Size((2, classes, 32)))
    tail = cases.operator_options(classes, cases.options("mixed", classes, target))
    up = torch.randn(64, generator=cases.generator(1))
    with longtail.use_backend("triton"):
        expected = ops.softmax_loss_and_grad(up, logits, target, *tail)
        for first in (8, 3):
            wide = torch.full((2, classes + 2, 48), torch.nan, dtype=dtype)
            z = wide[:, 1:-1, first : first + 32]
            z.copy_(logits)
            actual = ops.softmax_loss_and_grad(up, z, target, *tail)
            ops.softmax_loss_and_grad_(up, z, target, *tail)
            for value, want in zip((*actual, z), (*expected, expected[2]), strict=True):
                assert_close(value, want.double(), factor=2 * FACTOR[dtype])
            z.fill_(torch.nan)
            assert wide.isnan().all(), "nothing is written around an image"


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=cases.name)
@pytest.mark.parametrize("shape", [(2, 5, 32), (3, 70, 7)])
def test_scale_grad(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    grad = torch.randn(shape, generator=cases.generator(3)).to(dtype)
    rows = shape[0] * shape[2]
    for up in cases.upstreams((rows,), torch.float32).values():
        actual = grad.clone()
        with longtail.use_backend("triton"):
            ops.scale_grad_(actual, up, None, -100)
        assert_close(actual, grad.double() * up.double().reshape(shape[0], 1, -1), factor=FACTOR[dtype])
    with longtail.use_backend("triton"):
        ops.scale_grad_(actual := grad.clone(), torch.ones(()).expand(rows), None, -100)
    assert_same(actual, grad)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=cases.name)
def test_scale_grad_leaves_ignored_rows_alone(dtype: torch.dtype) -> None:
    for shape in ((2, 5, 32), (3, 70, 7)):
        for name, grad, up, target, expected in cases.scalings(shape, dtype):
            with longtail.use_backend("triton"):
                ops.scale_grad_(grad, up, target, cases.IGNORE)
            assert_close(grad, expected.double(), what=f"{name} {shape}", factor=FACTOR[dtype])


@interpreted
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_autograd(reduction: str, mode: str) -> None:
    logits = torch.randn(2, 9, 3, 4, generator=cases.generator(1))
    target = torch.randint(9, (2, 3, 4), generator=cases.generator(2))
    target[0, 1] = cases.IGNORE
    options: dict[str, Any] = {"focal_gamma": 2.0, "complement_gamma": -1.0, "reduction": reduction}
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with longtail.use_backend("triton"):
        loss, stats = longtail.cross_entropy(x * 1.0, target, gradient=mode, return_stats=True, **options)
        up = torch.randn(loss.shape, generator=cases.generator(3))
        loss.backward(up)
    truth = longtail.reference.cross_entropy(y, target, **options)
    truth.backward(up.double())
    assert_close(loss, truth.detach(), factor=2)
    assert_close(x.grad, y.grad, factor=3)
    assert stats.lse.shape == target.shape


@interpreted
def test_an_image_target_out_of_range_is_named() -> None:
    target = torch.tensor([[0, 5, 1]])
    with longtail.use_backend("triton"), pytest.raises(IndexError, match="target 5 in row 1"):
        longtail.cross_entropy(torch.zeros(1, 5, 3), target)


@starts_it
def test_in_a_process_of_its_own() -> None:
    rerun(__file__)
