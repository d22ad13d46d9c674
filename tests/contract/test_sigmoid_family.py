"""Promise: the sigmoid family equals torch, torchvision's formula and hand-derived values, saturation included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
import sigmoid_cases
from tolerances import assert_close

SHAPES = {"n": (9,), "nc": (6, 5), "n1": (7, 1), "ncd": (3, 5, 4), "ncdd": (2, 5, 3, 2), "n1dd": (2, 1, 3, 2), "": ()}


def value_and_grad(loss: Tensor, x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, x, up)[0]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_torchvision(reduction: str, shape: str, soft: bool, dtype: torch.dtype) -> None:
    g = cases.generator(1)
    logits = torch.randn(SHAPES[shape], generator=g).to(dtype)
    y = torch.rand(SHAPES[shape], generator=g)
    y = (y if soft else y.round()).to(dtype)
    for alpha, gamma in ((0.25, 2.0), (-1, 2.0), (0.6, 1.0), (-1, 0.0)):
        x, w = logits.clone().requires_grad_(), logits.double().requires_grad_()
        loss = longtail.sigmoid_focal_loss(x, y, alpha, gamma, reduction)
        truth = sigmoid_cases.torchvision_focal(w, y.double(), alpha, gamma)
        truth = truth if reduction == "none" else getattr(truth, reduction)()
        up = torch.randn(truth.shape, generator=g, dtype=torch.float64)
        assert loss.dtype == cases.vector_dtype(dtype)
        assert_close(loss, truth.detach(), what="loss", factor=2)
        assert_close(*(torch.autograd.grad(a, b, up.to(a.dtype))[0] for a, b in ((loss, x), (truth, w))), factor=2)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("vectors", [(), ("weight",), ("pos_weight",), ("weight", "pos_weight")])
def test_binary_cross_entropy_with_logits(vectors: tuple[str, ...], reduction: str, soft: bool) -> None:
    g = cases.generator(2)
    logits = torch.randn(6, 5, generator=g, dtype=torch.float64) * 3
    y = torch.rand(6, 5, generator=g, dtype=torch.float64)
    y = y if soft else y.round()
    given = {name: torch.rand(5, generator=g, dtype=torch.float64) * 2 for name in vectors}
    x, w = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = longtail.sigmoid_cross_entropy(x, y, reduction=reduction, **given)
    truth = F.binary_cross_entropy_with_logits(w, y, reduction=reduction, **given)
    up = torch.randn(truth.shape, generator=g, dtype=torch.float64)
    for ours, torchs in zip(value_and_grad(loss, x, up), value_and_grad(truth, w, up), strict=True):
        assert_close(ours, torchs)


BROADCAST = [
    ((6, 5), (6, 5)), ((6, 5), (6, 1)), ((6, 5), (1, 5)), ((6, 5), (1,)), ((6, 5), ()), ((7,), (7,)), ((7,), ()),
    ((), ()), ((2, 5, 3, 4), (5, 1, 1)), ((2, 5, 3, 4), (2, 1, 3, 4)), ((2, 5, 3, 4), (4,)), ((2, 5, 3), (1, 5, 1)),
]  # fmt: skip


@pytest.mark.parametrize("gradient", cases.MODES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("shape", "weight_shape"), BROADCAST, ids=str)
def test_weights_broadcast_as_in_torch(
    shape: tuple[int, ...], weight_shape: tuple[int, ...], reduction: str, gradient: str
) -> None:
    g = cases.generator(3)
    logits, y = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    given = {"weight": torch.rand(weight_shape, generator=g, dtype=torch.float64)}
    along = shape[1:2] == (5,) and len(weight_shape) < 2
    pos_shape = (5, *(1 for _ in shape[2:])) if along else weight_shape
    given["pos_weight"] = torch.rand(pos_shape, generator=g, dtype=torch.float64)
    x, w = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = longtail.sigmoid_cross_entropy(x * 1.0, y.sigmoid(), reduction=reduction, gradient=gradient, **given)
    truth = F.binary_cross_entropy_with_logits(w, y.sigmoid(), reduction=reduction, **given)
    assert loss.shape == truth.shape
    up = torch.randn(truth.shape, generator=g, dtype=torch.float64)
    for ours, torchs in zip(value_and_grad(loss, x, up), value_and_grad(truth, w, up), strict=True):
        assert_close(ours, torchs)


def test_weights_that_do_not_broadcast() -> None:
    x, y = torch.randn(6, 5), torch.rand(6, 5)
    for weight in (torch.rand(4), torch.rand(5, 5), torch.rand(1, 6, 5), torch.rand(6, 1, 5)):
        with pytest.raises(ValueError, match="weight has shape"):
            longtail.sigmoid_cross_entropy(x, y, weight)
        with pytest.raises(ValueError, match="pos_weight has shape"):
            longtail.sigmoid_cross_entropy(x, y, pos_weight=weight)
    with pytest.raises(ValueError, match="requires grad"):
        longtail.sigmoid_cross_entropy(x, y, torch.rand(6, 5, requires_grad=True))
    with pytest.raises(ValueError, match="expected \\[5\\]"):
        longtail.sigmoid_cross_entropy(x, torch.tensor([0] * 6), torch.rand(6, 5))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("reduction", ["none", "rows"])
@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
def test_every_option(kind: str, reduction: str, dtype: torch.dtype) -> None:
    for option_set in sigmoid_cases.sets_for(kind):
        for shape in ((7, 19), (3, 6, 5)):
            logits, target = sigmoid_cases.random_case(shape, kind, dtype)
            options = sigmoid_cases.options(option_set, logits)
            x, w = logits.clone().requires_grad_(), logits.double().requires_grad_()
            loss = longtail.sigmoid_focal_loss(x, target, reduction=reduction, **options)
            wide = target if kind == "class" else target.double()
            truth = sigmoid_cases.naive(w, wide, reduction == "none", **cases.to_float64(options))
            up = torch.randn(truth.shape, generator=cases.generator(3), dtype=torch.float64)
            ours, true = value_and_grad(loss, x, up.to(loss.dtype)), value_and_grad(truth, w, up)
            assert_close(ours[0], true[0], what=f"loss {option_set} {shape}", factor=3)
            assert_close(ours[1], true[1], what=f"gradient {option_set} {shape}", factor=3)


@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
def test_weights_of_the_distribution_balanced_loss(kind: str) -> None:
    """Of the operators, and a row without labels: its weights are alpha + 1."""
    for shape in ((7, 19), (3, 6, 5)):
        logits, target = sigmoid_cases.random_case(shape, kind, torch.float64)
        if kind != "class":
            target[0] = 0.0
        options = sigmoid_cases.options("balanced", logits)
        w = logits.clone().requires_grad_()
        truth = sigmoid_cases.naive(w, target, True, **options)
        up = torch.randn(shape, generator=cases.generator(3), dtype=torch.float64)
        flat = target.flatten() if kind == "class" else target
        tail = sigmoid_cases.operator_options(options)
        loss, grad = torch.ops.longtail.sigmoid_loss_and_grad(up, logits, flat, *tail, True)
        assert_close(loss, truth.detach(), what="loss", factor=3)
        assert_close(grad, torch.autograd.grad(truth, w, up)[0], what="gradient", factor=3)


def test_by_hand() -> None:
    """z = log 3: p = 3/4."""
    z = torch.tensor([math.log(3.0)])
    one, zero = torch.tensor([1.0]), torch.tensor([0])
    for y, alpha, gamma, expected in (
        (one, None, 0.0, -math.log(0.75)),
        (zero, None, 0.0, -math.log(0.25)),
        (one, 0.25, 2.0, -0.25 * 0.25**2 * math.log(0.75)),
        (zero, 0.25, 2.0, -0.75 * 0.75**2 * math.log(0.25)),
        (one, 0.9, 0.5, -0.9 * 0.25**0.5 * math.log(0.75)),
        (torch.tensor([0.25]), None, 0.0, -0.25 * math.log(0.75) - 0.75 * math.log(0.25)),
    ):
        assert longtail.binary_focal_loss(z, y, alpha, gamma).item() == pytest.approx(expected, rel=1e-6)


def test_one_line_uses() -> None:
    z = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=torch.float64)
    y = torch.tensor([1, 0, 0, 1])
    p_t = torch.where(y == 1, z.sigmoid(), 1 - z.sigmoid())
    alpha_t = torch.where(y == 1, 0.25, 0.75)
    for options, expected in (
        ({"gamma": 0}, -p_t.log()),
        ({"alpha": 0.25, "gamma": 0}, -alpha_t * p_t.log()),
        ({}, -((1 - p_t) ** 2) * p_t.log()),
        ({"alpha": 0.25}, -alpha_t * (1 - p_t) ** 2 * p_t.log()),
    ):
        assert_close(longtail.binary_focal_loss(z, y, **options), expected.mean())


def exact(z: float, y: int, gamma: float) -> tuple[float, float]:
    """Loss and dloss/dz in Python floats, each term from the exponential that does not overflow."""
    x = z if y else -z

    def softplus(a: float) -> float:
        return max(a, 0.0) + math.log1p(math.exp(-abs(a)))

    def sigmoid(a: float) -> float:
        return 1 / (1 + math.exp(-a)) if a >= 0 else math.exp(max(a, -745.0)) / (1 + math.exp(a))

    cost, focal = softplus(-x), math.exp(-gamma * softplus(x))
    slope = -focal * (gamma * sigmoid(x) * cost + sigmoid(-x))
    return focal * cost, slope if y else -slope


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("gamma", cases.GAMMAS)
@pytest.mark.parametrize("layout", ["class", "dense", "binary", "images"])
def test_saturation(layout: str, gamma: float, dtype: torch.dtype) -> None:
    values = [s * z for z in (17.0, 20.0, 89.0, 1e4, 3.0) for s in (1, -1)]
    z = torch.tensor(values).to(dtype)
    for y in (0, 1):
        want = torch.tensor([exact(v, y, gamma) for v in z.tolist()], dtype=torch.float64)
        x = z.clone().requires_grad_()
        options: dict[str, Any] = {"alpha": None, "gamma": gamma}
        if layout == "binary":
            loss = longtail.sigmoid_focal_loss(x, torch.full((10,), y), **options)
        elif layout == "images":
            target = torch.full((1, 1, 2, 5), float(y))
            loss = longtail.sigmoid_focal_loss(x.reshape(1, 1, 2, 5), target, **options).flatten()
        elif layout == "dense":
            loss = longtail.sigmoid_focal_loss(x.reshape(2, 5), torch.full((2, 5), float(y)), **options).flatten()
        else:  # the saturated logit in column 1 of two, which is the target's or not
            pairs = torch.stack([torch.zeros_like(x), x], 1)
            loss = longtail.sigmoid_focal_loss(pairs, torch.full((10,), y), **options)[:, 1]
        up = torch.randn(10, generator=cases.generator(0), dtype=torch.float64)
        (grad,) = torch.autograd.grad(loss, x, up.to(loss.dtype))
        assert_close(loss, want[:, 0], what=f"loss, y = {y}", factor=2)
        assert_close(grad, want[:, 1] * up, what=f"gradient, y = {y}", factor=2)


def test_a_confident_mistake_costs_its_logit() -> None:
    """17.0 where log(max(1 - p, FLT_MIN)) would be 87.34 and 1 - p in float32 is 0 or rounded."""
    for z in (17.0, 20.0, 89.0, 1e4, 3e38):
        loss = longtail.sigmoid_focal_loss(torch.tensor([z]), torch.tensor([0]), alpha=None, gamma=0.0)
        assert loss.item() == pytest.approx(z, rel=1e-6)
        assert torch.equal(loss, longtail.sigmoid_focal_loss(torch.tensor([-z]), torch.tensor([1.0]), None, 0.0))


@pytest.mark.parametrize("gamma", cases.GAMMAS)
def test_infinite_logits(gamma: float) -> None:
    """A class masked by -inf costs nothing as a negative, everything as a positive."""
    x = torch.tensor([[-torch.inf, 1.0, -torch.inf], [torch.inf, -torch.inf, 0.5]], requires_grad=True)
    loss = longtail.sigmoid_focal_loss(x, torch.tensor([1, 1]), None, gamma)
    assert loss[0, [0, 2]].tolist() == [0.0, 0.0]
    assert loss[1, :2].tolist() == [torch.inf, torch.inf]
    (grad,) = torch.autograd.grad(loss, x, torch.full_like(x, 0.5))
    assert grad[0, [0, 2]].tolist() == [0.0, 0.0]
    assert not grad.isnan().any()


@pytest.mark.parametrize("gamma", cases.GAMMAS)
def test_infinite_logits_of_soft_targets(gamma: float) -> None:
    """They cost everything, and the gradient is the limit: no 0 * inf."""
    x = torch.tensor([[-torch.inf, torch.inf, 0.5]], requires_grad=True)
    loss = longtail.sigmoid_focal_loss(x, torch.full((1, 3), 0.3), None, gamma)
    assert loss[0, :2].tolist() == [torch.inf, torch.inf]
    (grad,) = torch.autograd.grad(loss, x, torch.full_like(x, 0.5))
    limits = [-0.5 * 0.3 ** (gamma + 1), 0.5 * 0.7 ** (gamma + 1)]
    assert grad[0, :2].tolist() == pytest.approx(limits, rel=1e-5)


@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
def test_nan_stays_where_it_is(kind: str) -> None:
    logits, target = sigmoid_cases.random_case((4, 33), kind)
    target.masked_fill_(target == cases.IGNORE, 0)
    logits[2, 7] = torch.nan
    x = logits.requires_grad_()
    loss = longtail.sigmoid_focal_loss(x, target)
    (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, 0.3))
    for value in (loss, grad):
        assert value.isnan().nonzero().tolist() == [[2, 7]]
    rows = longtail.sigmoid_focal_loss(x, target, reduction="rows")
    assert rows.isnan().tolist() == [False, False, True, False]
