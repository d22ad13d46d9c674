"""Promise: losses over contiguous images walk the class dimension where it lies: right, and without a copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from allocations import peak_while
from longtail.ops.layout import to_images, to_rows
from tolerances import assert_close, assert_same

ops = torch.ops.longtail
SHAPES = ((3, 7, 5), (2, 19, 33), (1, 1, 40), (2, 2, 1), (1, 1030, 17), (2, 70, 300))


def arguments(shape: tuple[int, ...], option_set: str, dtype: torch.dtype) -> tuple[Tensor, list[Any], Tensor]:
    """Images [N, C, P] with poisoned ignored pixels, the operators' trailing arguments, an upstream gradient."""
    n, c, p = shape
    logits, target = cases.random_case(n * p, c, dtype)
    logits = to_images(cases.poison_ignored(logits, target), torch.Size(shape))
    tail = cases.operator_options(c, cases.options(option_set, c, target, dtype))
    return logits, [target, *tail], cases.upstreams((n * p,), cases.vector_dtype(dtype))["random"]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
def test_softmax_equals_rows(option_set: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        logits, tail, up = arguments(shape, option_set, dtype)
        rows = to_rows(logits)
        options = cases.to_float64(cases.options(option_set, shape[1], tail[0], dtype))
        x = rows.double().requires_grad_()
        truth = longtail.reference.softmax_loss(x, tail[0], **options)
        (true_grad,) = torch.autograd.grad(truth, x, up.double())
        loss, stats = ops.softmax_loss(logits, *tail)
        grad = ops.softmax_loss_backward(up, logits, tail[0], stats, *tail[1:])
        both = ops.softmax_loss_and_grad(up, logits, *tail)
        written = logits.clone()
        inplace = ops.softmax_loss_and_grad_(up, written, *tail)
        row_loss, row_stats = ops.softmax_loss(rows, *tail)
        for value in (loss, both[0], inplace[0]):
            assert_close(value, truth.detach(), row_loss, what=f"loss {shape}", factor=2)
        for value in (stats, both[1], inplace[1]):
            # U, a sum of both signs, is seen in the loss.
            assert_close(value[:, :4], row_stats[:, :4].double(), what=f"stats {shape}", factor=4)
        for value in (grad, both[2], written):
            assert value.is_contiguous()
            assert_close(to_rows(value), true_grad, what=f"gradient {shape}", factor=2)


@pytest.mark.parametrize("margin", cases.MARGINS)
@pytest.mark.parametrize("gamma", cases.GAMMAS)
def test_softmax_saturation(gamma: float, margin: float) -> None:
    for dtype in (torch.float32, torch.float64):
        logits, target = cases.margin_case(margin, 30, dtype, rows=40)
        x, y = logits.t()[None].contiguous().requires_grad_(), logits.double().requires_grad_()
        options = {"focal_gamma": gamma, "complement_gamma": -1.0}
        loss = longtail.cross_entropy(x, target[None], reduction="none", **options)[0]
        truth = longtail.reference.softmax_loss(y, target, **options)
        up = torch.randn(40, generator=cases.generator(1), dtype=torch.float64)
        assert_close(loss, truth.detach(), factor=2)
        (grad,) = torch.autograd.grad(loss, x, up.to(dtype))
        assert_close(grad[0].t(), torch.autograd.grad(truth, y, up)[0], factor=2)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same (N, C, H, W) values laid out otherwise."""
    wide = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2] + 1, x.shape[3]), torch.nan, dtype=x.dtype)
    wide[:, 1:-1, 1:] = x
    narrow = torch.full((*x.shape[:3], x.shape[3] + 3), torch.nan, dtype=x.dtype)
    narrow[..., :-3] = x
    return {
        "contiguous": x.clone(memory_format=torch.contiguous_format),
        "channels_last": x.clone(memory_format=torch.channels_last),
        "part_of_larger": wide[:, 1:-1, 1:],
        "columns_of_larger": narrow[..., :-3],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch_inside": x.transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("family", ["softmax", "sigmoid", "sigmoid_dense"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "part_of_larger", "columns_of_larger",
                                    "transposed", "batch_inside"])  # fmt: skip
def test_layouts(layout: str, family: str, mode: str) -> None:
    values = torch.randn(2, 6, 4, 5, generator=cases.generator(0))
    target = torch.randint(6, (2, 4, 5), generator=cases.generator(1))
    target[0, 1] = cases.IGNORE
    dense = torch.rand(2, 6, 4, 5, generator=cases.generator(2))

    def loss(x: Tensor, gradient: str) -> Tensor:
        if family == "softmax":
            return longtail.focal_loss(x, target, reduction="none", gradient=gradient)
        y = layouts(dense)[layout] if family == "sigmoid_dense" else target
        return longtail.sigmoid_focal_loss(x, y, reduction="rows", gradient=gradient)

    up = torch.randn(2, 4, 5, generator=cases.generator(3))
    rows = values.movedim(1, -1).reshape(-1, 6).requires_grad_()
    y = dense.movedim(1, -1).reshape(-1, 6) if family == "sigmoid_dense" else target.flatten()
    if family == "softmax":
        expected = longtail.focal_loss(rows, y, reduction="none")
    else:
        expected = longtail.sigmoid_focal_loss(rows, y, reduction="rows")
    (true_grad,) = torch.autograd.grad(expected, rows, up.flatten())
    leaf = layouts(values)[layout].requires_grad_()
    x = leaf if mode == "backward" else layouts(leaf * 1.0)[layout]
    actual = loss(x, mode)
    (grad,) = torch.autograd.grad(actual, leaf, up)
    assert_close(actual.flatten(), expected.detach().double(), factor=2)
    assert_close(grad.movedim(1, -1).reshape(-1, 6), true_grad.double(), factor=3)


@pytest.mark.parametrize("family", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gradient", cases.MODES)
def test_rows_of_images_change_with_no_thread(family: str, gradient: str) -> None:
    logits = torch.randn(3, 21, 40, 51, generator=cases.generator(0))
    target = torch.randint(21, (3, 40, 51), generator=cases.generator(1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            x = logits.clone().requires_grad_()
            if family == "softmax":
                loss = longtail.focal_loss(x * 1.0, target, reduction="none", gradient=gradient)
            else:
                loss = longtail.sigmoid_focal_loss(x * 1.0, target, reduction="rows", gradient=gradient)
            up = torch.randn(loss.shape, generator=cases.generator(2))
            results.append((loss.detach(), torch.autograd.grad(loss, x, up)[0]))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert_same(loss, results[0][0])
        assert_same(grad, results[0][1])


@pytest.mark.parametrize("gradient", ["backward", "forward"])
@pytest.mark.parametrize("family", ["softmax", "sigmoid", "sigmoid_dense"])
def test_peak_extra_memory_is_the_gradient(family: str, gradient: str) -> None:
    logits = torch.randn(2, 64, 128, 128).requires_grad_()
    target = torch.zeros(logits.shape) if family == "sigmoid_dense" else torch.randint(64, (2, 128, 128))

    def step() -> None:
        if family == "softmax":
            loss = longtail.focal_loss(logits, target, gradient=gradient)
        else:
            loss = longtail.sigmoid_focal_loss(logits, target, reduction="mean", gradient=gradient)
        loss.backward()

    peak, _ = peak_while(step)
    # Losses, statistics and targets of the pixels are 4 * 8 / 256 of the gradient.
    assert logits.nbytes <= peak < logits.nbytes * 1.25
