"""The benchmark's losses of several labels a row: their data, eager forms that are the papers' formulas, timm's."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from pathlib import Path

import pytest
import torch

import longtail
from longtail.functional import multi_label

pytest.importorskip("rich")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ASYMMETRIC = longtail.asymmetric_loss
REBALANCED = multi_label.rebalanced
TWO_WAY = longtail.two_way_loss


@pytest.fixture(autouse=True)
def _bench_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def run(*losses, dtype=torch.float32):
    """Rows of the section for these losses, small."""
    from bench import suite

    small = {"shapes": ((64, 96),), "dtypes": (dtype,), "losses": losses, "rounds": 1, "compiled": False}
    (rows,) = suite.run(dataclasses.replace(suite.MULTI_LABEL, **small), lambda *_: None)
    return rows


def test_rows_have_about_four_labels_of_a_long_tail_and_some_none():
    from bench import contenders, labels

    problem = contenders.Problem.of_labels((2048, 300), torch.bfloat16, CPU)
    classes, hot = problem.labels
    assert hot.dtype == torch.bfloat16
    empty = (hot == 0).all(1)
    assert empty.nonzero().flatten().tolist() == [*range(1, 2048, labels.EMPTY)]
    of_classes = torch.zeros_like(hot).scatter_(1, classes, 1.0)
    assert torch.equal(hot[~empty], of_classes[~empty])
    assert 3.5 < hot[~empty].float().sum(1).mean() < 4.2
    drawn = hot.float().sum(0)
    assert drawn[:30].mean() > 10 * drawn[-30:].mean()
    z = problem.logits.float()
    assert abs(z.mean()) < 0.01, "of an untrained classifier"
    assert abs(z.std() - 1) < 0.01
    assert abs(z[hot > 0].mean()) < 0.05, "which knows nothing of the labels"
    assert 0 < (z.sigmoid() < 0.05).float().mean() < 0.003
    assert torch.equal(problem.index, classes)
    assert (problem.counts < labels.num_samples(problem.counts)).all()


def asymmetric(_problem, z, y):
    p = z.sigmoid()
    shifted = (p - 0.05).clamp(min=0)
    factor = torch.where(y > 0, 1 - p, shifted**4).detach()
    return factor * -torch.where(y > 0, p, 1 - shifted).log()


def distribution_balanced(problem, z, y):
    from bench import labels

    counts = problem.counts.double()
    u = z + 0.05 / 2 * (labels.num_samples(problem.counts) / counts - 1).log() * -1
    rate = torch.stack([sum((1 / counts[c] for c in row.nonzero().flatten()), torch.zeros(())) for row in y])
    weight = 0.1 + (10 * (1 / counts / rate[:, None] - 0.2)).sigmoid()
    positive = -((1 - u.sigmoid()) ** 2) * u.sigmoid().log()
    negative = -((2 * u).sigmoid() ** 2) * (1 - (2 * u).sigmoid()).log() / 2
    return weight * torch.where(y > 0, positive, negative)


def zlpr(_problem, z, y):
    return (1 + ((1 - y) * z.exp()).sum(1)).log() + (1 + (y * (-z).exp()).sum(1)).log()


def two_way(_problem, z, y):
    z, y = z[y.any(1)], y[y.any(1)]
    return (1 + ((1 - y) * z.exp()).sum(1) * (y * (-z / 4).exp()).sum(1) ** 4).log()


@pytest.mark.parametrize("formula", [asymmetric, distribution_balanced, zlpr, two_way])
def test_eager_is_the_formula_and_ours(formula):
    from bench import contenders

    loss = formula.__name__
    problem = contenders.Problem.of_labels((7, 97), torch.float32, CPU)
    eager, *ours = contenders.of_loss(loss, problem, compiled=False)
    z, y = problem.logits.double().requires_grad_(), problem.labels.hot.double()
    assert not y[1].any()
    expected = formula(problem, z, y).mean()
    (grad,) = torch.autograd.grad(expected, z)
    assert [(x.name, x.gradient) for x in ours] == [("longtail", mode) for mode in contenders.GRADIENTS]
    for contender in (eager, *ours):
        x = problem.logits.clone().requires_grad_() * 1.0
        found = contender.forward(x)
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found, x)[0].double(), grad, rtol=2e-5, atol=1e-8)


def without_clip(*arguments, **options):
    return ASYMMETRIC(*arguments, clip=0.0, **options)


def with_the_gradient_of_the_factors(*arguments, **options):
    return ASYMMETRIC(*arguments, detach=False, **options)


def gradient_of_negatives_off(logits, target, **options):
    """By 1 %: they are small beside those of the labels."""
    seen = logits.view_as(logits)
    seen.register_hook(lambda grad: torch.where(grad > 0, grad * 1.01, grad))
    return ASYMMETRIC(seen, target, **options)


@functools.wraps(REBALANCED)
def of_other_numbers(*arguments, **options):
    return REBALANCED(*arguments, **(options | {"rebalance_mu": 0.3}))


def of_other_temperatures(*arguments, **options):
    return TWO_WAY(*arguments, 3.0, **options)


@pytest.mark.parametrize(
    ("module", "name", "wrong", "loss"),
    [
        (longtail, "asymmetric_loss", without_clip, "asymmetric"),
        (longtail, "asymmetric_loss", with_the_gradient_of_the_factors, "asymmetric"),
        (longtail, "asymmetric_loss", gradient_of_negatives_off, "asymmetric"),
        (multi_label, "rebalanced", of_other_numbers, "distribution_balanced"),
        (longtail, "two_way_loss", of_other_temperatures, "two_way"),
    ],
)
def test_a_wrong_loss_is_refused(module, name, wrong, loss, monkeypatch):
    from bench.measure import Mismatch

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(Mismatch, match=rf"{loss} .* of longtail backward is not that of eager"):
        run(loss)


class Timms:
    """Stands in for timm's asymmetric loss."""

    def __init__(self, disable_torch_grad_focal_loss, reduction):
        assert (disable_torch_grad_focal_loss, reduction) == (True, "mean")

    def to(self, device):
        assert device == CPU
        return self

    def __call__(self, x, y):
        return ASYMMETRIC(x, y)


class Wrong(Timms):
    def __call__(self, x, y):
        return 1.1 * super().__call__(x, y)


def older(class_counts, num_samples):
    """Has not every argument."""
    return class_counts, num_samples


def install(monkeypatch, asymmetric):
    stand_in = types.ModuleType("timm.loss")
    stand_in.AsymmetricLossMultiLabel, stand_in.DistributionBalancedLoss = asymmetric, older
    stand_in.ZlprLoss = longtail.ZLPRLoss
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.loss", stand_in)


def test_timm_is_a_contender_where_it_runs(monkeypatch, capsys):
    install(monkeypatch, Timms)
    rows = run("asymmetric", "distribution_balanced", "zlpr", dtype=torch.bfloat16)
    assert [row.loss for row in rows if row.contender == "timm"] == ["asymmetric", "zlpr"]
    assert "timm's DistributionBalancedLoss is left out: TypeError" in capsys.readouterr().err


def test_timm_is_compared_too(monkeypatch):
    from bench.measure import Mismatch

    install(monkeypatch, Wrong)
    with pytest.raises(Mismatch, match="of timm  is not that of eager"):
        run("asymmetric")
