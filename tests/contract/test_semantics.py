"""Promise: hand-derived values, the sign of the complement term, normalizers, returned statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import cases
import longtail
import naive
from tolerances import assert_close

COT = torch.tensor([[20.0, 0.5, *[0.0] * 8]])  # the row at which the published code gives 0.755 or NaN


def entropy_of_cot() -> float:
    """H of one logit 0.5 and eight of 0, by hand: log Z - 0.5 e^0.5 / Z."""
    z = math.exp(0.5) + 8
    return math.log(z) - 0.5 * math.exp(0.5) / z


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("lead", [20.0, 500.0, -500.0])
def test_complement_entropy_by_hand(dtype: torch.dtype, lead: float) -> None:
    assert entropy_of_cot() == pytest.approx(2.181, abs=5e-4)
    logits = COT.clone().to(dtype)
    logits[0, 0] = lead  # the target's own logit has no say in H
    target = torch.tensor([0])
    for value, expected in (
        (longtail.complement_entropy(logits, target), entropy_of_cot()),
        (longtail.complement_entropy(logits, target, balanced=True), entropy_of_cot() / 9),
        (longtail.complement_entropy(logits, target, reduction="none")[0], entropy_of_cot()),
    ):
        assert value.item() == pytest.approx(expected, rel=1e-6)


def test_complement_cross_entropy_by_hand() -> None:
    """gamma = -1 in CE + gamma / (C - 1) * H: the entropy is taken off, and divided by C - 1, not C."""
    expected = math.log1p((math.exp(0.5) + 8) * math.exp(-20)) - entropy_of_cot() / 9
    target = torch.tensor([0])
    assert longtail.complement_cross_entropy(COT, target).item() == pytest.approx(expected, rel=1e-6)
    assert longtail.cross_entropy(COT, target, complement_gamma=-1.0).item() == pytest.approx(expected, rel=1e-6)
    assert longtail.complement_cross_entropy(COT, target, gamma=2.0).item() == pytest.approx(
        2 * entropy_of_cot() / 9, rel=1e-6
    )


def test_focal_by_hand() -> None:
    """p = 3/4: (1 - p)^2 * -log p, with a class weight in front."""
    logits = torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.25**2 * -math.log(0.75)
    target = torch.tensor([0])
    assert longtail.focal_loss(logits, target).item() == pytest.approx(expected, rel=1e-6)
    weighted = longtail.focal_loss(logits, target, torch.tensor([0.3, 9.0]), gamma=0.5, reduction="sum")
    assert weighted.item() == pytest.approx(0.3 * 0.25**0.5 * -math.log(0.75), rel=1e-6)


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("margin", [0.0, 30.0, -30.0])
def test_no_complement_entropy_with_fewer_than_three_classes(classes: int, margin: float) -> None:
    logits = torch.tensor([[margin, -0.3][:classes]], requires_grad=True)
    target = torch.tensor([0])
    h = longtail.complement_entropy(logits, target, reduction="none")
    assert h.item() == pytest.approx(0.0, abs=1e-6)
    (grad,) = torch.autograd.grad(h, logits, torch.tensor([2.5]))
    assert grad.abs().max() < 1e-6
    both = longtail.cross_entropy(logits, target, complement_gamma=-1.0)
    assert both.item() == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)


def descend(gamma: float, steps: int = 60) -> float:
    """Complement entropy of the target row after gradient descent on complement cross-entropy."""
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0])
    for _ in range(steps):
        (grad,) = torch.autograd.grad(longtail.complement_cross_entropy(logits, target, gamma=gamma), logits)
        with torch.no_grad():
            logits -= 0.5 * grad
    return naive.complement_entropy(logits.detach(), target).item()


def test_a_negative_gamma_raises_complement_entropy() -> None:
    assert descend(-4.0) > descend(0.0) + 0.02 > descend(4.0) + 0.04


@pytest.mark.parametrize("option_set", ["plain", "weight", "sample_weight", "mixed"])
@pytest.mark.parametrize("mode", cases.MODES)
def test_normalizer(option_set: str, mode: str) -> None:
    """Value and gradient: the sum over rows, divided by what the normalizer says and by nothing else."""
    logits, target = cases.random_case(13, 9, torch.float64)
    options = cases.options(option_set, 9, target, torch.float64)
    counted = target != cases.IGNORE
    weight = options.get("weight", torch.ones(9, dtype=torch.float64))
    up = torch.tensor(-1.7, dtype=torch.float64)
    total, total_grad = naive.rows_and_grad(logits, target, up.expand(13), **options)
    for normalizer, divisor in (
        (None, weight[target[counted]].sum()),
        ("count", counted.sum()),
        (41, 41),
        (2.5, 2.5),
        (torch.tensor(7.5), 7.5),
        (torch.tensor(6), 6),
    ):
        x = logits.clone().requires_grad_()
        loss = longtail.cross_entropy(x * 1.0, target, normalizer=normalizer, gradient=mode, **options)
        (grad,) = torch.autograd.grad(loss, x, up)
        assert_close(loss, total.sum() / divisor, what=f"loss with normalizer={normalizer}")
        assert_close(grad, total_grad / divisor, what=f"gradient with normalizer={normalizer}", factor=10)


@pytest.mark.parametrize("mode", cases.MODES)
def test_count_of_nothing_gives_zero_and_torchs_rule_nan(mode: str) -> None:
    target = torch.full((4,), cases.IGNORE)
    for normalizer in ("count", None):
        x = torch.full((4, 5), torch.nan, requires_grad=True)
        loss = longtail.cross_entropy(x * 1.0, target, normalizer=normalizer, gradient=mode)
        assert loss.item() == 0.0 if normalizer else loss.isnan()
        loss.backward()
        assert torch.equal(x.grad, torch.full((4, 5), torch.nan) if x.grad.isnan().any() else torch.zeros(4, 5))


def test_sample_weight_is_not_in_the_means_denominator() -> None:
    logits, target = cases.random_case(8, 5, ignore=False)
    v = torch.rand(8, generator=cases.generator(0)) * 3
    expected = (v * F.cross_entropy(logits, target, reduction="none")).sum() / 8
    assert_close(longtail.cross_entropy(logits, target, sample_weight=v), expected.double())


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("option_set", ["plain", "class_margin", "mixed"])
@pytest.mark.parametrize("shape", ["c", "nc", "ncd"])
def test_statistics(shape: str, option_set: str, dtype: torch.dtype, mode: str) -> None:
    size = cases.SHAPES[shape]
    logits = (torch.randn(size, generator=cases.generator(2)) * 2).to(dtype)
    rows = () if len(size) == 1 else (size[0], *size[2:])
    target = torch.randint(5, rows, generator=cases.generator(3))
    if target.dim():
        target.view(-1)[::3] = cases.IGNORE
    options = cases.options(option_set, 5, target, dtype)
    x = logits.clone().requires_grad_()
    loss, stats = longtail.cross_entropy(x * 1.0, target, gradient=mode, return_stats=True, **options)
    without = longtail.cross_entropy(logits, target, **options)
    assert_close(loss, without.double(), what="loss")
    effective: dict[str, Any] = {
        k: v for k, v in cases.to_float64(options).items()
        if k in ("class_bias", "class_margin", "scale", "softcap")
    }  # fmt: skip
    u = logits.double().movedim(0 if len(size) == 1 else 1, -1).reshape(-1, 5)
    flat = target.reshape(-1)
    counted = flat != cases.IGNORE
    g = flat.clamp(min=0)
    u = naive.effective_logits(u, g, **effective)
    u_g = u.gather(1, g[:, None])
    others = u.scatter(1, g[:, None], -torch.inf).amax(1, keepdim=True)
    expected = {
        "lse": torch.logsumexp(u, 1),
        "log_prob": torch.log_softmax(u, 1).gather(1, g[:, None])[:, 0],
        "complement_entropy": naive.complement_entropy(u, g),
        "log_miss": u.scatter(1, g[:, None], -torch.inf).logsumexp(1) - u.logsumexp(1),
        "entropy": -(u.softmax(1) * u.log_softmax(1)).sum(1),
        "correct": (u_g > others)[:, 0],
    }
    for name, value in expected.items():
        actual = getattr(stats, name)
        assert not actual.requires_grad
        assert actual.shape == rows
        value = torch.where(counted, value, torch.zeros_like(value)).reshape(rows)
        if name == "correct":
            assert actual.dtype == torch.bool
            assert torch.equal(actual, value)
        else:
            assert actual.dtype == cases.vector_dtype(dtype)
            assert_close(actual, value, what=name, factor=2)
    assert set(stats._fields) == set(expected)


def test_constants_may_be_strided() -> None:
    logits, target = cases.random_case(7, 9)
    for option_set in ("weight", "class_bias", "class_margin", "sample_weight"):
        ((name, vector),) = cases.options(option_set, 9, target).items()
        strided = vector.repeat_interleave(2)[::2]
        loss = longtail.cross_entropy(logits, target, **{name: strided})
        assert loss.item() == longtail.cross_entropy(logits, target, **{name: vector}).item()
        assert loss.item() != longtail.cross_entropy(logits, target).item()


def test_ties_are_not_correct() -> None:
    _, stats = longtail.cross_entropy(torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0]]), torch.tensor([0, 0]),
                                      return_stats=True)  # fmt: skip
    assert stats.correct.tolist() == [False, True]


def test_one_class_is_always_right() -> None:
    loss, stats = longtail.cross_entropy(torch.tensor([[3.0], [-2.0]]), torch.tensor([0, 0]), return_stats=True)
    assert loss.item() == 0.0
    assert stats.lse.tolist() == [3.0, -2.0]
    assert stats.log_prob.tolist() == [0.0, 0.0]
    assert stats.complement_entropy.tolist() == [0.0, 0.0]
    assert stats.correct.tolist() == [True, True]


@pytest.mark.parametrize("option_set", ["weight", "class_bias", "scale", "softcap", "z_loss", "sample_weight"])
def test_options_with_probability_targets(option_set: str) -> None:
    """Against the sum over classes of probability times log-probability, in float64."""
    logits, _ = cases.random_case(6, 5, torch.float64, ignore=False)
    probabilities = torch.rand(6, 5, generator=cases.generator(1), dtype=torch.float64).softmax(1)
    options = cases.options(option_set, 5, torch.zeros(6), torch.float64)
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = longtail.cross_entropy(x, probabilities, reduction="none", **options)
    extra = {k: options[k] for k in ("class_bias", "scale", "softcap") if k in options}
    u = naive.effective_logits(y, torch.zeros(6, dtype=torch.long), **extra)
    weight = options.get("weight", torch.ones(5, dtype=torch.float64))
    expected = options.get("sample_weight", 1.0) * -(weight * probabilities * torch.log_softmax(u, 1)).sum(1)
    expected = expected + options.get("z_loss", 0.0) * torch.logsumexp(u, 1) ** 2
    up = torch.randn(6, generator=cases.generator(2), dtype=torch.float64)
    assert_close(loss, expected.detach())
    assert_close(torch.autograd.grad(loss, x, up)[0], torch.autograd.grad(expected, y, up)[0], what="gradient")
    mean = longtail.cross_entropy(logits, probabilities, normalizer="count", **options)
    assert_close(mean, expected.detach().mean(), what="mean")
