"""Promise: the Triton kernels compute the sigmoid family, over rows and images, seen in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
import sigmoid_cases
from interpreted import FACTOR, HALVES, interpreted, rerun, starts_it
from longtail.ops.layout import to_rows
from tolerances import assert_close, assert_same

pytest.importorskip("triton")
ops = torch.ops.longtail
# Short rows; rows whose ends are not aligned; more than one block; pixels of several images in one program.
SHAPES = ((9, 1), (7, 11), (3, 127), (2, 4100), (3, 7, 5), (2, 19, 32))
MARGINS = (17.0, 20.0, 89.0, 1e4)


def as_rows(x: Tensor) -> Tensor:
    return to_rows(x) if x.dim() == 3 else x


def numerics(logits: Tensor, target: Tensor, options: dict[str, Any], up: Tensor) -> list[list[Tensor]]:
    """[losses, gradient], both [rows, C], in float64, and by plain PyTorch in the logits' dtype."""
    results = []
    rows = {k: v.flatten() if k == "sample_weight" else v for k, v in options.items()}
    for wide in (True, False):
        z = as_rows(logits).double() if wide else as_rows(logits).clone()
        z.requires_grad_()
        y = as_rows(target) if target.is_floating_point() else target.flatten()
        loss = longtail.reference.sigmoid_loss(z, y, elementwise=True, **(cases.to_float64(rows) if wide else rows))
        (grad,) = torch.autograd.grad(loss, z, as_rows(up).to(loss.dtype).expand_as(loss))
        results.append([loss.detach(), grad])
    return results


def check_operators(logits: Tensor, target: Tensor, options: dict[str, Any], elementwise: bool) -> None:
    """All four operators on one case."""
    rows = logits.numel() // logits.shape[1]
    up = torch.randn(logits.shape if elementwise else (rows, 1), generator=cases.generator(5))
    (loss, grad), (eager_loss, eager_grad) = numerics(logits, target, options, up)
    if not elementwise:
        loss, eager_loss, up = loss.sum(1), eager_loss.sum(1), up[:, 0]
    y = target if target.is_floating_point() else target.flatten()
    tail = sigmoid_cases.operator_options(options)
    with longtail.use_backend("triton"):
        z = logits.clone()
        one = ops.sigmoid_loss(z, y, *tail, elementwise)
        one_grad = ops.sigmoid_loss_backward(up, z, y, *tail)
        two, two_grad = ops.sigmoid_loss_and_grad(up, z, y, *tail, elementwise)
        assert_same(z, logits, "logits")
        three = ops.sigmoid_loss_and_grad_(up, z, y, *tail, elementwise)
    for value in (one, two, three):
        assert_close(as_rows(value) if elementwise else value, loss, eager_loss, what="loss")
    ignored = (as_rows(y) if y.is_floating_point() else y[:, None].expand(rows, logits.shape[1])) == cases.IGNORE
    for value in (one_grad, two_grad, z):
        assert value.dtype == logits.dtype
        assert_close(as_rows(value), grad, eager_grad, what="gradient", factor=FACTOR[logits.dtype])
        assert (as_rows(value)[ignored] == 0).all()


def poisoned(logits: Tensor, target: Tensor) -> Tensor:
    """Ignored rows or elements hold NaN."""
    ignored = target == cases.IGNORE
    return logits.masked_fill(ignored if target.shape == logits.shape else ignored.unsqueeze(1), torch.nan)


@interpreted
@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_option(shape: tuple[int, ...], kind: str) -> None:
    for i, name in enumerate(sigmoid_cases.sets_for(kind)):
        if shape[1] > 1000 and name not in ("plain", "mixed", "by_target"):
            continue
        logits, target = sigmoid_cases.random_case(shape, kind)
        check_operators(poisoned(logits, target), target, sigmoid_cases.options(name, logits), i % 2 == 0)


@interpreted
@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize("dtype", HALVES, ids=cases.name)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_half_precision(shape: tuple[int, ...], dtype: torch.dtype, kind: str, elementwise: bool) -> None:
    logits, target = sigmoid_cases.random_case(shape, kind, dtype)
    options = sigmoid_cases.options("mixed_square" if elementwise else "mixed", logits)
    check_operators(poisoned(logits, target), target, options, elementwise)
    if kind == "soft":
        check_operators(logits, target.to(dtype), options, elementwise)


@interpreted
@pytest.mark.parametrize(("alpha", "gamma"), [(None, 0.0), (None, 0.5), (0.25, 2.0)])
def test_infinite_logits_and_nan_targets(alpha: float | None, gamma: float) -> None:
    """Surely right: 0. Surely wrong, or soft: inf, with a finite gradient. A target of NaN: NaN."""
    inf = torch.inf
    z = torch.tensor([[inf, -inf, inf, -inf], [inf, -inf, 1.0, 0.0]])
    y = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, torch.nan, 0.0]])
    tail = (None, None, None, False, None, alpha, gamma)
    with longtail.use_backend("triton"):
        loss = ops.sigmoid_loss(z, y, *tail, True)
        grad = ops.sigmoid_loss_backward(torch.ones(2, 4), z, y, *tail)
    assert loss[0].tolist() == [0.0, 0.0, inf, inf]
    assert loss[1, :2].tolist() == [inf, inf]
    assert grad[0, :2].tolist() == [0.0, 0.0]
    for found in (loss, grad):
        assert found.isnan().nonzero().tolist() == [[1, 2]]
    assert grad[y.isfinite()].isfinite().all()


@interpreted
@pytest.mark.parametrize("gamma", cases.GAMMAS)
def test_saturation(gamma: float) -> None:
    """Every margin on both sides, for both targets, in value and gradient, with nothing clipped."""
    z = torch.tensor([sign * margin for margin in MARGINS for sign in (1.0, -1.0)])
    logits, y = z.repeat(3, 1), torch.tensor([0.0, 1.0, 0.4])[:, None].expand(3, 8).contiguous()
    for shape in ((3, 8), (1, 3, 8)):
        for alpha in (None, 0.25):
            options = {"alpha": alpha, "gamma": gamma, "ignore_index": cases.IGNORE}
            check_operators(logits.reshape(shape), y.reshape(shape), options, True)
    rows = torch.stack([z, -z], 1)
    for target in (0, 1):
        options = {"alpha": None, "gamma": gamma, "ignore_index": cases.IGNORE}
        check_operators(rows, torch.full((8,), target), options, True)
        check_operators(rows.t()[None].contiguous(), torch.full((1, 8), target), options, True)
    if gamma == 0:
        with longtail.use_backend("triton"):
            loss = longtail.sigmoid_focal_loss(torch.tensor([17.0]), torch.tensor([0.0]), alpha=None, gamma=0.0)
        assert loss.item() == 17.0


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("kind", ["class", "hard"])
@pytest.mark.parametrize("layout", ["row_stride", "offset"])
def test_layouts(layout: str, kind: str, dtype: torch.dtype) -> None:
    for classes in (64, 43, 2505):
        logits, target = sigmoid_cases.random_case((3, classes), kind, dtype)
        tail = sigmoid_cases.operator_options(sigmoid_cases.options("mixed", logits))
        up, laid = torch.randn(3, generator=cases.generator(1)), cases.LAYOUTS[layout]
        with longtail.use_backend("triton"):
            expected = ops.sigmoid_loss_and_grad(up, logits, target, *tail, False)
            z, y = laid(logits), target if kind == "class" else laid(target)
            actual = ops.sigmoid_loss_and_grad(up, z, y, *tail, False)
            written = ops.sigmoid_loss_and_grad_(up, z, y, *tail, False)
        for value, want in zip((*actual, written, z), (*expected, *expected), strict=True):
            assert_close(value, want.double(), factor=2 * FACTOR[dtype])


@interpreted
def test_images_in_a_larger_one() -> None:
    wide = torch.full((2, 9, 40), torch.nan)
    logits, target = sigmoid_cases.random_case((2, 6, 32), "soft")
    wide[:, 1:7, 4:36] = logits
    z = wide[:, 1:7, 4:36]
    tail = sigmoid_cases.operator_options(sigmoid_cases.options("mixed", logits))
    up = torch.randn(64, generator=cases.generator(1))
    with longtail.use_backend("triton"):
        expected = ops.sigmoid_loss_and_grad(up, logits, target, *tail, False)
        actual = ops.sigmoid_loss_and_grad(up, z, target, *tail, False)
        ops.sigmoid_loss_and_grad_(up, z, target, *tail, False)
    for value, want in zip((*actual, z), (*expected, expected[1]), strict=True):
        assert_same(value, want)
    wide[:, 1:7, 4:36] = torch.nan
    assert wide.isnan().all(), "nothing is written around an image"


@interpreted
@pytest.mark.parametrize("kind", ["class", "soft"])
def test_infinite_and_undefined_logits(kind: str) -> None:
    logits, target = sigmoid_cases.random_case((6, 9), kind)
    target = target.clamp(min=0)
    logits[0, 0], logits[1, 3], logits[2, 5] = torch.inf, -torch.inf, torch.nan
    up = torch.randn(6, generator=cases.generator(1))
    for name in ("plain", "focal_half", "focal"):
        tail = sigmoid_cases.operator_options(sigmoid_cases.options(name, logits))
        with longtail.use_backend("reference"):
            wide = target.double() if kind == "soft" else target
            expected = ops.sigmoid_loss_and_grad(up.double(), logits.double(), wide, *tail, True)
        with longtail.use_backend("triton"):
            actual = ops.sigmoid_loss_and_grad(up, logits, target, *tail, True)
        for value, want in zip(actual, expected, strict=True):
            assert_close(value, want, factor=4)


@interpreted
@pytest.mark.parametrize("kind", ["class", "hard"])
def test_infinite_upstream_gradients_of_ignored_elements(kind: str) -> None:
    for shape in ((4, 9), (2, 3, 8)):
        logits, target = sigmoid_cases.random_case(shape, kind)
        ignored = target == cases.IGNORE
        up = torch.ones(shape).masked_fill(ignored if kind == "hard" else ignored.unsqueeze(1), torch.inf)
        tail = sigmoid_cases.operator_options(sigmoid_cases.options("focal", logits))
        with longtail.use_backend("triton"):
            grad = ops.sigmoid_loss_backward(up, logits, target if kind == "hard" else target.flatten(), *tail)
        assert grad.isfinite().all()
        assert (grad[up == torch.inf] == 0).all()


@interpreted
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("reduction", ["none", "rows", "sum", "mean"])
def test_autograd(reduction: str, mode: str) -> None:
    for shape in ((5, 21), (2, 6, 3, 4)):
        logits, target = sigmoid_cases.random_case(shape, "class")
        options = sigmoid_cases.options("by_target", logits) | {"reduction": reduction, "gradient": mode}
        x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
        with longtail.use_backend("triton"):
            loss = longtail.sigmoid_focal_loss(x * 1.0, target, **options)
            up = torch.randn(loss.shape, generator=cases.generator(1))
            loss.backward(up)
        with longtail.use_backend("reference"):
            truth = longtail.sigmoid_focal_loss(y * 1.0, target, **cases.to_float64(options))
            truth.backward(up.double())
        assert_close(loss, truth.detach(), factor=2)
        assert_close(x.grad, y.grad, factor=4)


@interpreted
@pytest.mark.parametrize("mode", cases.MODES)
def test_nothing_there(mode: str) -> None:
    for shape in ((0, 5), (3, 0), (2, 3, 0)):
        x = torch.zeros(shape, requires_grad=True)
        with longtail.use_backend("triton"):
            loss = longtail.sigmoid_focal_loss(x * 1.0, torch.zeros(shape), reduction="sum", gradient=mode)
            loss.backward()
        assert loss == 0
        assert x.grad.shape == shape


@interpreted
def test_float64_is_the_references() -> None:
    for shape in ((5, 9), (2, 3, 4)):
        logits, target = sigmoid_cases.random_case(shape, "soft", torch.float64)
        outcomes = []
        for backend in ("triton", "reference"):
            x = logits.clone().requires_grad_()
            with longtail.use_backend(backend):
                loss = longtail.sigmoid_focal_loss(x, target, reduction="sum", ignore_index=cases.IGNORE)
                outcomes.append((loss.detach(), *torch.autograd.grad(loss, x)))
        for actual, expected in zip(*outcomes, strict=True):
            assert_same(actual, expected)


@interpreted
@pytest.mark.parametrize("shape", [(7, 11), (2, 5, 6)])
def test_wrong_arguments_raise(shape: tuple[int, ...]) -> None:
    n = 7 if len(shape) == 2 else 12
    logits, target, up = torch.zeros(shape), torch.zeros(n, dtype=torch.long), torch.zeros(n)
    c, tail = shape[1], [None, None, None, False, cases.IGNORE, None, 0.0]
    wrong: list[tuple[Any, list[Any]]] = [
        (ops.sigmoid_loss, [logits, target[1:], *tail, False]),
        (ops.sigmoid_loss, [logits, target.int(), *tail, False]),
        (ops.sigmoid_loss, [logits, logits.bfloat16(), *tail, False]),
        (ops.sigmoid_loss, [logits, logits[1:], *tail, False]),
        (ops.sigmoid_loss, [logits, torch.zeros(*shape, 2)[..., 0], *tail, False]),
        (ops.sigmoid_loss, [torch.zeros(*shape, 2)[..., 0], target, *tail, False]),
        (ops.sigmoid_loss, [logits[:1].expand(shape), target, *tail, False]),
        (ops.sigmoid_loss, [logits, target, torch.ones(c - 1), *tail[1:], False]),
        (ops.sigmoid_loss, [logits, target, None, torch.ones(c).double(), *tail[2:], False]),
        (ops.sigmoid_loss, [logits, target, None, None, torch.ones(2 * n)[::2], *tail[3:], False]),
        (ops.sigmoid_loss, [logits, target, None, None, None, True, *tail[4:], False]),
        (ops.sigmoid_loss_backward, [up[1:], logits, target, *tail]),
        (ops.sigmoid_loss_backward, [torch.zeros(*shape, 2)[..., 0], logits, target, *tail]),
        (ops.sigmoid_loss_and_grad_, [up.double(), logits, target, *tail, False]),
    ]
    with longtail.use_backend("triton"):
        for operator, arguments in wrong:
            with pytest.raises(RuntimeError, match="longtail"):
                operator(*arguments)
        target[1] = c
        with pytest.raises(IndexError, match=f"target {c} in row 1"):
            ops.sigmoid_loss(logits, target, *tail, False)


@starts_it
def test_in_a_process_of_its_own() -> None:
    rerun(__file__)
