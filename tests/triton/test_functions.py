"""Promise: the public functions are right over Triton kernels, seen in Triton's interpreter, where no GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cases
import longtail
import sigmoid_cases
from interpreted import interpreted, refuse_copies
from tolerances import assert_close, assert_same

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
loss_math = pytest.importorskip("longtail.triton_kernels.loss_math")
ops = torch.ops.longtail


@interpreted
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6, 33), (2, 9, 3, 4)], ids=str)
def test_softmax(shape: tuple[int, ...], reduction: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = sigmoid_cases.random_case(shape, "class")
    options: dict[str, Any] = {"focal_gamma": 2.0, "complement_gamma": -1.0, "reduction": reduction}
    if len(shape) == 2:
        options |= cases.options("mixed", shape[1], target)
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with monkeypatch.context() as patch, longtail.use_backend("triton"):
        refuse_copies(patch)
        loss, stats = longtail.cross_entropy(x * 1.0, target, gradient=mode, return_stats=True, **options)
        up = cases.upstreams(loss.shape, torch.float32)["random"] + 0.0
        loss.backward(up)
    truth = longtail.reference.cross_entropy(y, target, **cases.to_float64(options))
    truth.backward(up.double())
    assert_close(loss, truth.detach(), what="loss", factor=2)
    assert_close(x.grad, y.grad, what="gradient", factor=3)
    with longtail.use_backend("reference"):
        _, expected = longtail.cross_entropy(y.detach(), target, return_stats=True, **cases.to_float64(options))
    for name in ("lse", "log_prob", "complement_entropy"):
        assert_close(getattr(stats, name), getattr(expected, name), what=name, factor=2)
    assert_same(stats.correct, expected.correct)


@interpreted
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("reduction", ["none", "rows", "sum", "mean"])
def test_sigmoid(reduction: str, mode: str) -> None:
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
def test_images_and_strided_statistics() -> None:
    logits = torch.randn(2, 5, 3, 2, generator=cases.generator(1))
    target = torch.randint(5, (2, 3, 2), generator=cases.generator(2))
    results = []
    for backend in ("triton", "reference"):
        x = logits.clone().requires_grad_()
        with longtail.use_backend(backend):
            loss = longtail.cross_entropy(x, target, complement_gamma=-1.0)
            loss.backward(torch.tensor(1.3))
        results.append((loss.detach(), x.grad))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected.double(), factor=2)


@interpreted
@pytest.mark.parametrize(("family", "shape"), [("softmax", (5, 9)), ("sigmoid", (5, 9)), ("sigmoid", (2, 3, 4))])
def test_float64_is_the_references(family: str, shape: tuple[int, ...]) -> None:
    kind = "class" if family == "softmax" else "soft"
    logits, target = sigmoid_cases.random_case(shape, kind, torch.float64)
    outcomes = []
    for backend in ("triton", "reference"):
        x = logits.clone().requires_grad_()
        with longtail.use_backend(backend):
            if family == "softmax":
                loss = longtail.cross_entropy(x, target, focal_gamma=2.0)
            else:
                loss = longtail.sigmoid_focal_loss(x, target, reduction="sum", ignore_index=cases.IGNORE)
            outcomes.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for actual, expected in zip(*outcomes, strict=True):
        assert_same(actual, expected)


@interpreted
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(("rows", "classes"), [(0, 5), (0, 5000), (3, 5), (3, 5000)])
def test_nothing_counted(rows: int, classes: int, mode: str) -> None:
    x = torch.full((rows, classes), torch.nan, requires_grad=True)
    target = torch.full((rows,), cases.IGNORE)
    with longtail.use_backend("triton"):
        loss = longtail.cross_entropy(x * 1.0, target, normalizer="count", gradient=mode)
        loss.backward()
    assert loss == 0
    assert_same(x.grad, torch.zeros(rows, classes))


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
@pytest.mark.parametrize(
    "options",
    [
        *({"gamma": 0.0}, {"gamma": 0.5}, {"alpha": 0.25, "gamma": 2.0}),
        {"gamma": 1.0, "gamma_negative": 0.5, "negative_scale": 2.0},
    ],
    ids=["cross_entropy", "power", "square", "general"],
)
def test_infinite_logits_and_nan_targets(options: dict[str, float]) -> None:
    """Surely right: 0. Surely wrong, or soft: inf, with a finite gradient. A target of NaN: NaN."""
    inf = torch.inf
    z = torch.tensor([[inf, -inf, inf, -inf], [inf, -inf, 1.0, 0.0]])
    y = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, torch.nan, 0.0]])
    tail = sigmoid_cases.operator_options({"ignore_index": None} | options)
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


@triton.jit
def evaluate(x, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(out + i, loss_math.log1p(value))
    tl.store(out + N + i, loss_math.tanh(value * 20.0 - 10.0))
    tl.store(out + 2 * N + i, loss_math.exp_cut(-value * 87.0)[0])


@interpreted
def test_elementary_functions() -> None:
    """log1p and tanh keep relative precision near 0; exp_cut is 0 where it cuts off, and NaN survives."""
    x = torch.cat([torch.logspace(-40, 0, 1000, dtype=torch.float64), torch.rand(1048).double()]).float()
    out = torch.empty(3, len(x))
    evaluate[(1,)](x, out, N=len(x))
    wide = x.double()
    for row, truth in zip(out, (wide.log1p(), (x * 20 - 10).double().tanh(), (-x * 87).double().exp()), strict=True):
        assert ((row.double() - truth).abs() <= 3e-7 * truth.abs() * (1 + truth.log().abs().nan_to_num(0))).all()
    x = torch.tensor([torch.nan, 1.3, 2.0, torch.inf]).repeat(4)
    out = torch.empty(3, len(x))
    evaluate[(1,)](x, out, N=len(x))
    assert out[:, 0].isnan().all()
    assert (out[2, 2:4] == 0).all()
