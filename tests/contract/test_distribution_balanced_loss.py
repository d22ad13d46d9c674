"""Promise: the distribution-balanced loss is that of its paper, as its code has it, exact for every logit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from multi_label_cases import KINDS, TWICE, data, dense, reduced, with_grad
from tolerances import assert_close

BACKENDS = ("cpu", "reference")
ROWS = 1000
COUNTS = [700, 40, 300, 3, 90, 1, 12]
# Options of the loss: the default, that of VOC-MLT, each part alone, and none.
SETS: tuple[dict[str, Any], ...] = (
    {},
    {"rebalance_mu": 0.3, "gamma": 1.5},
    {"gamma": 0.0, "kappa": 0.3, "negative_scale": 5.0},
    {"gamma": 0.0, "kappa": 0.0, "negative_scale": 1.0},
    {"rebalance_beta": 0.0, "rebalance_alpha": 0.5, "negative_scale": 0.5, "kappa": -0.2},
)


def formula(
    z: Tensor,
    y: Tensor,
    counts: list[float],
    rows: float,
    gamma: Any = 2.0,
    kappa: float = 0.05,
    negative_scale: float = 2.0,
    rebalance_alpha: float = 0.1,
    rebalance_beta: float = 10.0,
    rebalance_mu: float = 0.2,
) -> Tensor:
    """Of each element of z, y [N, C]. Rows without labels are drawn for no class's sake: their ratio is infinite."""
    n = torch.tensor(counts, dtype=torch.float64)
    share = n / rows
    u = z + kappa / negative_scale * torch.log(share / (1 - share))
    of_class, of_row = 1 / n, (y / n).sum(1, keepdim=True)
    gap = torch.where(of_row > 0, of_class / of_row, torch.inf) - rebalance_mu
    weight = rebalance_alpha + (torch.sigmoid(rebalance_beta * gap) if rebalance_beta else 0.5)
    cost = -y * F.logsigmoid(u) - (1 - y) * F.logsigmoid(-negative_scale * u) / negative_scale
    miss = y * torch.sigmoid(-u) + (1 - y) * torch.sigmoid(negative_scale * u)
    return weight * miss**gamma * cost


def rows_of(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(0, -2)


def truth(z: Tensor, y: Tensor, counts: list[int] = COUNTS, **options: Any) -> Tensor:
    """The formula of rows or images."""
    wide = dense(y, z)
    loss = formula(rows_of(z), rows_of(wide), counts, ROWS, **options)
    return loss.reshape(z.shape[0], *z.shape[2:], z.shape[1]).movedim(-1, 1)


def balanced(x: Tensor, y: Tensor, counts: Any = COUNTS, rows: int = ROWS, **options: Any) -> Tensor:
    return longtail.distribution_balanced_loss(x, y, counts, rows, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(9, 7), (3, 7, 3, 5)], ids=str)
def test_the_papers_formula(shape: tuple[int, ...], kind: str, dtype: torch.dtype, backend: str) -> None:
    z, y = data(shape, kind, dtype)
    for options in SETS:
        with longtail.use_backend(backend):
            found = with_grad(lambda x, o=options: balanced(x, y, reduction="none", **o), z)
        exact = with_grad(lambda x, o=options: truth(x, y, **o), z.double())
        for got, expected in zip(found, exact, strict=True):
            assert_close(got, expected, what=str(options), factor=8 if dtype in cases.DTYPES[:2] else 2)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("kind", ["class", "soft"])
def test_reductions_and_modes(kind: str, mode: str) -> None:
    for shape in ((6, 7), (2, 7, 5)):
        z, y = data(shape, kind)
        for reduction in ("mean", "sum", "rows", "none"):
            found = with_grad(lambda x, y=y, r=reduction: balanced(x, y, reduction=r, gradient=mode), z)
            exact = with_grad(lambda x, y=y, r=reduction: reduced(truth(x, y), r), z)
            for got, expected in zip(found, exact, strict=True):
                assert_close(got, expected, what=f"{shape} {reduction}", factor=8)


def test_weights_and_normalizers() -> None:
    z, y = data((5, 7), "hard")
    g = cases.generator(3)
    weight, pos_weight, rows = (torch.rand(s, generator=g, dtype=torch.float64) for s in ((7,), (5, 7), (5,)))
    total = (truth(z, y) * weight * torch.where(y == 1, pos_weight, 1.0) * rows[:, None]).sum()
    options = {"weight": weight, "pos_weight": pos_weight, "sample_weight": rows}
    for normalizer, divisor in (("rows", 5), ("positives", y.sum()), (None, 35), (2.5, 2.5)):
        assert_close(balanced(z, y, normalizer=normalizer, **options), total / divisor, what=str(normalizer))


def test_values_by_hand() -> None:
    """n = 1 and 3 of 4 rows: of a row with both labels r = 3/4 and 1/4, of one with the second 3 and 1.

    kappa = lambda: the bias is log(n / (N - n)), -log 3 and log 3.
    """
    z = torch.tensor([[math.log(3.0), -math.log(3.0)]] * 3, dtype=torch.float64)  # u is 0
    y = torch.tensor([[1, 1], [0, 1], [0, 0]], dtype=torch.bool)
    options = {"kappa": 2.0, "rebalance_mu": 0.5, "rebalance_beta": 4.0, "reduction": "none"}
    one, three, ten = (1 / (1 + math.exp(-x)) for x in (1.0, 2.0, 10.0))
    weight = 0.1 + torch.tensor([[one, 1 - one], [ten, three], [1.0, 1.0]], dtype=torch.float64)
    for gamma in (0.0, 1.0, 3.0):
        found = with_grad(
            lambda x, g=gamma: balanced(x, y, [1, 3], 4, gamma=g, **options), z, torch.ones(3, 2).double()
        )
        half, log2 = 0.5**gamma, math.log(2.0)
        assert_close(found[0], weight * half * log2 * torch.where(y, 1.0, 0.5))
        # Of log 2 (1 - p)^gamma: -(gamma / 2 log 2 + 1 / 2) (1 - p)^gamma, of negatives lambda times that over lambda.
        assert_close(found[1], weight * half * (gamma / 2 * log2 + 0.5) * torch.where(y, -1.0, 1.0))


def test_rows_without_labels_weigh_most() -> None:
    z = torch.randn(4, 7, generator=cases.generator(0), dtype=torch.float64)
    y = torch.zeros(4, 7)
    for alpha in (0.0, 0.1, 3.0):
        loss = balanced(z, y, reduction="none", rebalance_alpha=alpha)
        plain = balanced(z, y, reduction="none", rebalance_beta=0.0, rebalance_alpha=0.5)  # a weight of 1
        assert_close(loss, (1 + alpha) * plain)


def test_one_class() -> None:
    z, y = data((5, 1), "hard")
    assert_close(balanced(z, y, [30], reduction="none"), formula(z, y, [30], ROWS), factor=8)
    assert_close(balanced(z[:, 0], y[:, 0], [30], reduction="none"), formula(z, y, [30], ROWS)[:, 0], factor=8)
    assert_close(balanced(z, torch.zeros(5).long(), [30]), formula(z, torch.ones(5, 1), [30], ROWS).mean(), factor=8)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("shape", [(0, 7), (0, 7, 3), (2, 7, 0)], ids=str)
def test_nothing_at_all(shape: tuple[int, ...], mode: str) -> None:
    loss, grad = with_grad(
        lambda x: balanced(x, torch.zeros(shape), reduction="sum", gradient=mode), torch.zeros(shape)
    )
    assert (loss.item(), grad.shape) == (0.0, shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 4)], ids=str)
def test_ignored_rows_and_elements(shape: tuple[int, ...], mode: str, backend: str) -> None:
    """Elements that are ignored are no labels of their row: what weighs the others is as if they were 0."""
    z, y = data(shape, "soft", torch.float32)
    y[4, ::2] = y[3] = 255
    ignored = y == 255
    bad = z.masked_fill(ignored, torch.nan)
    with longtail.use_backend(backend):
        found = with_grad(lambda x: balanced(x, y, ignore_index=255, gradient=mode), bad)
        classes = torch.arange(6 * z[0, 0].numel()).reshape(6, *shape[2:]) % 7
        classes[1] = -100
        rows = z.masked_fill((classes == -100).unsqueeze(1), torch.inf)
        of_rows = with_grad(lambda x: balanced(x, classes, gradient=mode), rows)
    exact = truth(z.double(), y.masked_fill(ignored, 0)).masked_fill(ignored, 0.0)
    assert_close(found[0], exact.sum() / (~ignored).sum(), factor=4)
    assert torch.equal(found[1][ignored], torch.zeros(int(ignored.sum())))
    assert (found[1][~ignored].abs() > 0).any()
    kept = [0, 2, 3, 4, 5]
    assert_close(of_rows[0], truth(z[kept].double(), classes[kept]).mean(), factor=4)
    assert torch.equal(of_rows[1][1], torch.zeros(shape[1:]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", cases.DTYPES[:2], ids=cases.name)
def test_saturation(dtype: torch.dtype, backend: str) -> None:
    """Positives cost -u, negatives u: the scale cancels; right ones nothing. Infinite logits likewise."""
    z = torch.tensor([20.0, 100.0, 1e4, torch.inf], dtype=dtype)
    z = torch.stack([z, -z], 1)
    for gamma in (0.0, 0.5, 2.0):
        for y in (torch.ones(4, 2), torch.zeros(4, 2)):
            with longtail.use_backend(backend):
                loss, grad = with_grad(
                    lambda x, y=y, g=gamma: balanced(x, y, [5, 5], 10, gamma=g, reduction="none"), z, torch.ones(4, 2)
                )
            weight = 0.1 + 1 / (1 + math.exp(-3.0)) if y[0, 0] == 1 else 1.1  # r = 1/2 or infinite
            wrong, right = (1, 0) if y[0, 0] == 1 else (0, 1)
            torch.testing.assert_close(loss[:, wrong].double(), weight * z[:, 0].double(), rtol=1e-6, atol=0.0)
            torch.testing.assert_close(
                grad[:, wrong].double().abs(), torch.full((4,), weight).double(), rtol=1e-6, atol=0
            )
            assert (loss[:, right] <= 3e-9).all()
            assert (grad[:, right].abs() <= 3e-9).all()


def test_counts_far_apart() -> None:
    """Billions beside one: ratios that float32 holds only relative to the rarest class."""
    counts, rows = [3_000_000_000, 1, 20_000_000], 4_000_000_000
    z, y = (
        torch.randn(8, 3, generator=cases.generator(0)),
        torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)]),
    )
    assert_close(balanced(z, y, counts, rows, reduction="none"), formula(z.double(), y, counts, rows), factor=8)


def test_the_authors_formula_in_float32() -> None:
    """Its terms in its order; the focal form doubled. Compared where it has no row without labels, and gamma is 2."""
    z, y = data((12, 7), "hard", torch.float32)
    y[1, 3] = 1
    n = torch.tensor(COUNTS, dtype=torch.float32)
    u = z - torch.log(ROWS / n - 1) * 0.05 / 2
    v = u * (1 - y) * 2 + u * y
    rate = (y / n).sum(1, keepdim=True)
    weight = torch.sigmoid(10 * (1 / n / rate - 0.2)) + 0.1
    weight = weight / 2 * (1 - y) + weight * y
    cost = F.binary_cross_entropy_with_logits(v, y, reduction="none")
    theirs = 2 * ((1 - torch.exp(-cost)) ** 2 * weight * cost).mean()
    torch.testing.assert_close(2 * balanced(z, y), theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["class", "soft"])
def test_gradcheck(kind: str) -> None:
    for shape in ((4, 7), (2, 7, 2)):
        z, y = data(shape, kind)
        gammas = torch.linspace(0, 3, 7, dtype=torch.float64)
        for options in ({"gamma": gammas}, {"label_smoothing": 0.2, "clip": 0.1}, {"gamma_negative": 4.0}):
            assert torch.autograd.gradcheck(
                lambda x, y=y, o=options: balanced(x, y, reduction="none", **o), z.clone().requires_grad_()
            )


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(4, 7, requires_grad=True)
    loss = balanced(x, torch.arange(4), reduction="sum")
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(loss, x, torch.ones((), requires_grad=True), create_graph=True)[0].sum().backward()


def test_compiled() -> None:
    torch._dynamo.reset()
    z, y = data((6, 7), "soft", torch.float32)
    module = longtail.DistributionBalancedLoss(COUNTS, ROWS)
    compiled = torch.compile(lambda x: module(x, y), fullgraph=True, backend="eager")
    for got, expected in zip(with_grad(compiled, z), with_grad(lambda x: balanced(x, y), z), strict=True):
        assert_close(got, expected.double())


BAD_COUNTS: dict[str, tuple[Any, Any, str]] = {
    "zero": ([3, 0, 1], 9, r"class 1"),
    "all": ([3, 9, 1], 9, r"samples_per_class\[1\] is 9, expected fewer than num_samples, 9, or empty=\"clamp\""),
    "more": ([3, 10, 1], 9, r"samples_per_class\[1\] is 10, expected fewer than num_samples, 9"),
    "negative": ([3, -1, 1], 9, "samples_per_class"),
    "nan": ([3, math.nan, 1], 9, "samples_per_class"),
    "matrix": ([[3, 2, 1]], 9, "samples_per_class"),
    "length": ([3, 2], 9, r"\[2\], expected \[3\]"),
    "text": ("many", 9, "samples_per_class"),
    "one row": ([0, 0, 1], 1, "num_samples"),
    "far apart": ([1, 1e46, 1], 1e50, "inverse_counts of class 1"),
    "total": ([3, 2, 1], "nine", "num_samples"),
    "bool": ([3, 2, 1], True, "num_samples"),
    "infinite": ([3, 2, 1], math.inf, "num_samples"),
}


@pytest.mark.parametrize("name", BAD_COUNTS)
def test_bad_counts_are_named(name: str) -> None:
    counts, rows, text = BAD_COUNTS[name]
    with pytest.raises((TypeError, ValueError), match=text):
        balanced(torch.zeros(2, 3), torch.zeros(2, 3), counts, rows)
    with pytest.raises((TypeError, ValueError), match=text):
        longtail.DistributionBalancedLoss(counts, rows)(torch.zeros(2, 3), torch.zeros(2, 3))


def test_empty_classes() -> None:
    z, y = data((5, 3), "hard")
    found = balanced(z, y, [0, 9, 4], 9, empty="clamp", reduction="none")
    assert_close(found, formula(z, y, [1, 8, 4], 9), factor=8)
    short = formula(z, y, [1, 8.5, 4], 9)  # of weighted rows
    assert_close(balanced(z, y, [1, 8.5, 4], 9, empty="clamp", reduction="none"), short, factor=8)
    with pytest.raises(ValueError, match=r"samples_per_class\[1\] is 10"):
        balanced(z, y, [0, 10, 4], 9, empty="clamp")
    with pytest.raises(ValueError, match="empty"):
        balanced(z, y, [3, 2, 4], 9, empty="zero")


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        *(("negative_scale", 0.0), ("negative_scale", -1.0), ("negative_scale", math.nan), ("kappa", math.inf)),
        *(("kappa", "small"), ("rebalance_alpha", -0.1), ("rebalance_beta", -1.0), ("rebalance_mu", math.nan)),
        *(("gamma", -1.0), ("class_bias", torch.ones(7)), ("inverse_counts", torch.ones(7)), ("class_gamma", None)),
    ],
)
def test_wrong_options_are_named(option: str, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=option):
        balanced(torch.zeros(2, 7), torch.zeros(2, 7), **{option: wrong})
    with pytest.raises((TypeError, ValueError), match=option):
        longtail.DistributionBalancedLoss(COUNTS, ROWS, **{option: wrong})
