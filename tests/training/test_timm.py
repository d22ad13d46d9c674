"""timm's loss factory with our modules: the values of the formulas, and of timm's own modules where it is installed."""

from __future__ import annotations

import inspect
import sys
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import longtail
from longtail.integrations.timm import create_classification_loss

N, C = 6, 5
WEIGHT = [0.5, 1.0, 2.0, 1.5, 0.1]
POSITIVE = [3.0, 1.0, 0.5, 2.0, 4.0]
COUNTS = [9, 0, 4, 20, 1]


class Rows(NamedTuple):
    """Logits (N, C), and targets of every kind: classes, several labels, and what Mixup makes of both."""

    logits: Tensor
    classes: Tensor
    labels: Tensor
    mixed: Tensor
    mixed_labels: Tensor


def rows(scale: float) -> Rows:
    torch.manual_seed(0)
    labels = (torch.rand(N, C) < 0.4).float()
    labels[0] = 0
    mixed = torch.rand(N, C).softmax(1)
    return Rows(scale * torch.randn(N, C), torch.randint(C, (N,)), labels, mixed, 0.3 * labels + 0.7 * labels.flip(0))


def smoothed(target: Tensor, e: float, share: float) -> Tensor:
    return (1 - e) * target + e * share


def hot(classes: Tensor) -> Tensor:
    return F.one_hot(classes, C).double()


def softmax_ce(z: Tensor, t: Tensor) -> Tensor:
    return -(t * z.log_softmax(1)).sum(1).mean()


def bce(z: Tensor, t: Tensor, weight: Any = 1.0, pos_weight: Any = 1.0) -> Tensor:
    weight, pos_weight = (torch.as_tensor(x).double() for x in (weight, pos_weight))
    return weight * (pos_weight * t * F.softplus(-z) + (1 - t) * F.softplus(z))


def asymmetric(z: Tensor, t: Tensor, clip: float, weight: Any = 1.0, pos_weight: Any = 1.0) -> Tensor:
    """gamma 1.5 of positives, 4 of negatives."""
    weight, pos_weight = (torch.as_tensor(x).double() for x in (weight, pos_weight))
    shifted = (z.sigmoid() - clip).clamp(min=0)
    log_miss = F.logsigmoid(-z) if clip == 0 else torch.log1p(-shifted)
    factor = (t * (-z).sigmoid() + (1 - t) * shifted) ** (1.5 * t + 4 * (1 - t))
    return -weight * factor * (pos_weight * t * F.logsigmoid(z) + (1 - t) * log_miss)


def poly(z: Tensor, t: Tensor, epsilon: float) -> Tensor:
    return softmax_ce(z, t) + epsilon * (1 - (t * z.softmax(1)).sum(1)).mean()


def balanced(z: Tensor, t: Tensor, gamma: float, e: float, kappa: float = 0.05, scale: float = 2.0) -> Tensor:
    """Of 20 rows with COUNTS of each label."""
    counts = torch.tensor(COUNTS).double().clamp(1, 19)
    ratio = 1 / counts / (t / counts).sum(1, keepdim=True)  # inf of a row without labels
    weight = 0.1 + (10 * (ratio - 0.2)).sigmoid()
    u = z - kappa / scale * (20 / counts - 1).log()
    t = smoothed(t, e, 0.5)
    positive, negative = (
        F.softplus(-u) * (-u).sigmoid() ** gamma,
        F.softplus(scale * u) * (scale * u).sigmoid() ** gamma,
    )
    return (2 if gamma else 1) * (weight * (t * positive + (1 - t) * negative / scale)).mean()


ASL = {"loss_type": "asl", "multi_label": True, "asl_gamma_pos": 1.5}


def zlpr(z: Tensor, t: Tensor) -> Tensor:
    zero = torch.full_like(z[:, :1], 0.0)
    sides = z.masked_fill(t > 0.5, -torch.inf), (-z).masked_fill(t <= 0.5, -torch.inf)
    return sum((torch.cat([side, zero], 1).logsumexp(1) for side in sides), torch.zeros(N)).mean()


DB = {"loss_type": "db", "multi_label": True, "class_counts": COUNTS, "num_samples": 20}
WEIGHTED = {"class_weight": WEIGHT, "pos_weight": POSITIVE}
# Name: arguments, the kind of target, the float64 formula of logits and target.
CASES: dict[str, tuple[dict[str, Any], str, Any]] = {
    "ce": ({}, "classes", lambda z, y: softmax_ce(z, hot(y))),
    "ce smoothed": ({"smoothing": 0.1}, "classes", lambda z, y: softmax_ce(z, smoothed(hot(y), 0.1, 1 / C))),
    "ce soft": ({"smoothing": 0.1, "soft_targets": True}, "mixed", softmax_ce),
    "bce": ({"loss_type": "bce"}, "classes", lambda z, y: bce(z, hot(y)).mean()),
    "bce numbers": (
        {"loss_type": "bce", "smoothing": 0.1, "class_weight": 2.0, "pos_weight": torch.tensor([3.0])},
        "classes",
        lambda z, y: bce(z, smoothed(hot(y), 0.1, 1 / C), 2.0, 3.0).mean(),
    ),
    "bce numbers, indices": (
        {"loss_type": "bce", "class_weight": 2, "pos_weight": 3.0}, "classes",
        lambda z, y: bce(z, hot(y), 2.0, 3.0).mean(),
    ),
    "bce threshold": (
        {"loss_type": "bce", "smoothing": 0.1, "bce_target_thresh": 0.2, "bce_sum": True, **WEIGHTED}, "classes",
        lambda z, y: bce(z, hot(y), WEIGHT, POSITIVE).sum(1).mean(),
    ),
    "bce all above": (
        {"loss_type": "bce", "smoothing": 0.1, "bce_target_thresh": 0.01}, "classes",
        lambda z, _: bce(z, torch.ones(N, C)).mean(),
    ),
    "bce soft": (
        {"loss_type": "bce", "smoothing": 0.1, "soft_targets": True, "bce_target_thresh": 0.2}, "mixed",
        lambda z, t: bce(z, (t > 0.2).double()).mean(),
    ),
    "labels": (
        {"multi_label": True, "smoothing": 0.1, **WEIGHTED}, "labels",
        lambda z, t: bce(z, smoothed(t, 0.1, 0.5), WEIGHT, POSITIVE).mean(),
    ),
    "labels threshold": (  # 0.05 is above
        {"multi_label": True, "smoothing": 0.1, "bce_target_thresh": 0.04}, "labels",
        lambda z, _: bce(z, torch.ones(N, C)).mean(),
    ),
    "asl": (ASL, "labels", lambda z, t: asymmetric(z, t, 0.05).sum(1).mean()),
    "asl smoothed": (
        {**ASL, "smoothing": 0.1, **WEIGHTED, "asl_reduction": "mean"}, "labels",
        lambda z, t: asymmetric(z, smoothed(t, 0.1, 0.5), 0.05, WEIGHT, POSITIVE).mean(),
    ),
    "asl unclipped": (
        {**ASL, "asl_clip": None, "asl_reduction": "sum", "pos_weight": 3.0}, "labels",
        lambda z, t: asymmetric(z, t, 0.0, 1.0, 3.0).sum(),
    ),
    "asl soft": (
        {**ASL, "smoothing": 0.1, "soft_targets": True}, "mixed_labels",
        lambda z, t: asymmetric(z, t, 0.05).sum(1).mean(),
    ),
    "asl of one label": (
        {"loss_type": "asl", "asl_gamma_pos": 2.0}, "classes",
        lambda z, y: -(hot(y) * (1 - z.softmax(1)) ** 2 * z.log_softmax(1)).sum(1).mean(),
    ),
    "poly": ({"loss_type": "poly"}, "classes", lambda z, y: poly(z, hot(y), 2.0)),
    "poly smoothed": (
        {"loss_type": "poly", "poly_epsilon": -1.0, "smoothing": 0.1}, "classes",
        lambda z, y: poly(z, smoothed(hot(y), 0.1, 1 / C), -1.0),
    ),
    "zlpr": ({"loss_type": "zlpr", "multi_label": True}, "labels", zlpr),
    "zlpr of what is above a half": ({"loss_type": "zlpr", "multi_label": True}, "mixed_labels", zlpr),
    "db": (DB, "labels", lambda z, t: balanced(z, t, 2.0, 0.0)),
    "db not focal": (
        {**DB, "db_focal_gamma": 0.0, "smoothing": 0.1, "db_init_bias": 0.1, "db_neg_scale": 3.0}, "labels",
        lambda z, t: balanced(z, t, 0.0, 0.1, 0.1, 3.0),
    ),
    "db soft": (
        {**DB, "db_focal_gamma": 0.0, "soft_targets": True}, "mixed_labels", lambda z, t: balanced(z, t, 0.0, 0.0)
    ),
}  # fmt: skip


def gradient_of(loss: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    found = loss(logits, target)
    (found * -1.7).backward()
    assert logits.grad is not None
    return found.detach(), logits.grad


@pytest.mark.parametrize("scale", [2.0, 60.0])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_formula(name: str, scale: float) -> None:
    arguments, kind, formula = CASES[name]
    data = rows(scale)
    target = getattr(data, kind)
    found = gradient_of(create_classification_loss(**arguments), data.logits, target)
    exact = target.double() if target.is_floating_point() else target
    expected = gradient_of(formula, data.logits.double(), exact)
    torch.testing.assert_close(found, tuple(x.float() for x in expected), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_timms(name: str) -> None:
    theirs = pytest.importorskip("timm.loss").create_classification_loss
    arguments, kind, _ = CASES[name]
    data = rows(2.0)
    found, expected = (
        gradient_of(make(**arguments), data.logits, getattr(data, kind))
        for make in (create_classification_loss, theirs)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


OF_TIMM: list[dict[str, Any]] = [
    {"loss_type": "jsd", "jsd_splits": 2, "smoothing": 0.1},
    {"loss_type": "twoway", "multi_label": True, "twoway_tp": 2.0},
    {"loss_type": "asl", "smoothing": 0.1},
    {"loss_type": "poly", "soft_targets": True},
    {"loss_type": "poly", "multi_label": True, "poly_gamma": 1.0},
    {**DB, "smoothing": 0.1},
    {**DB, "soft_targets": True},
]


def without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "timm.loss"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("arguments", OF_TIMM, ids=str)
def test_what_is_timms_own_needs_timm(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    without_timm(monkeypatch)
    with pytest.raises(ImportError, match=rf"'{arguments['loss_type']}' .* needs pip install 'timm>=1.0.31'$"):
        create_classification_loss(**arguments)


@pytest.mark.parametrize("arguments", OF_TIMM, ids=str)
def test_what_is_timms_own_is_made_by_timm(arguments: dict[str, Any]) -> None:
    theirs = pytest.importorskip("timm.loss").create_classification_loss(**arguments)
    ours = create_classification_loss(**arguments)
    assert type(ours) is type(theirs)
    shown = [{k: v for k, v in vars(x).items() if isinstance(v, float | int | str)} for x in (ours, theirs)]
    assert shown[0] == shown[1]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"loss_type": "focal"}, "'focal', expected one of 'ce', 'bce', 'asl', 'poly', 'jsd', 'twoway', 'zlpr', 'db'"),
    ({"loss_type": "ce", "multi_label": True}, "'ce' with multi_label=True, expected one of .*'bce'"),
    ({"loss_type": "zlpr"}, "'zlpr' with multi_label=False, expected one of .*'ce'"),
    ({"loss_type": "zlpr", "multi_label": True, "smoothing": 0.1}, "'zlpr' .* no smoothing"),
    ({"loss_type": "twoway", "multi_label": True, "soft_targets": True}, "'twoway' .* no soft_targets"),
    ({"class_weight": WEIGHT}, "'ce' .* no class_weight"),
    ({"loss_type": "asl", "pos_weight": 2.0}, "'asl' .* no pos_weight"),
    ({"bce_target_thresh": 0.0}, "'ce' .* no bce_target_thresh"),
    ({**ASL, "bce_sum": True}, "'asl' .* no bce_sum"),
    ({"multi_label": True, "num_samples": 20}, "'bce' .* no num_samples"),
    ({**DB, "num_samples": None}, "'db' .* class_counts and num_samples"),
    ({"loss_type": "asl", "soft_targets": True}, "'asl' .* soft_targets=False"),
    ({"loss_type": "asl", "asl_reduction": "sum"}, "'asl' .* asl_reduction='batchmean'"),
    ({**ASL, "asl_reduction": "rows"}, "asl_reduction is 'rows', expected one of 'batchmean', 'mean', 'sum', 'none'"),
    ({"loss_type": "poly", "poly_alpha": 0.0}, "'poly' .* no poly_alpha"),
    ({**DB, "class_counts": [21, 1]}, r"samples_per_class\[0\] is 21"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=str)
def test_what_timm_refuses_is_refused_without_it(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_classification_loss(**arguments)


def test_timm_refuses_the_same() -> None:
    theirs = pytest.importorskip("timm.loss").create_classification_loss
    for arguments, _ in REFUSED:
        with pytest.raises(ValueError):  # noqa: PT011
            theirs(**arguments)


def test_smoothing_is_at_most_1() -> None:
    with pytest.raises(ValueError, match=r"smoothing is 1.1, expected a finite number in \[0.0, 1.0\]"):
        create_classification_loss("bce", smoothing=1.1)


def test_the_signature_is_timms() -> None:
    theirs = inspect.signature(pytest.importorskip("timm.loss").create_classification_loss).parameters.values()
    ours = inspect.signature(create_classification_loss).parameters.values()
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]


def test_modules_are_ours_and_made_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    without_timm(monkeypatch)
    for arguments, _, _ in CASES.values():
        assert type(create_classification_loss(**arguments)).__module__.startswith("longtail.")


def test_weights_are_buffers_and_shown() -> None:
    loss = create_classification_loss("bce", class_weight=2.0, pos_weight=POSITIVE, smoothing=0.1)
    assert {name: x.shape for name, x in loss.state_dict().items()} == {"weight": (), "pos_weight": (C,)}
    assert "smoothing=0.1, smooth_dense=False, target_threshold=None, weight=tensor(2.), pos_weight=[5]" in repr(loss)
    assert "epsilon=2.0, smoothing=0.1" in repr(create_classification_loss("poly", smoothing=0.1))


def test_half_precision_logits_have_a_float32_loss() -> None:
    data = rows(2.0)
    for name, (arguments, kind, formula) in CASES.items():
        z, target = data.logits.bfloat16(), getattr(data, kind)
        loss = create_classification_loss(**arguments)(z, target)
        assert loss.dtype == torch.float32, name
        exact = target.double() if target.is_floating_point() else target
        torch.testing.assert_close(loss, formula(z.double(), exact).float(), rtol=1e-4, atol=1e-5, msg=name)


def test_plain_losses_are_public_modules() -> None:
    made = [create_classification_loss(**CASES[name][0]) for name in ("ce", "ce smoothed", "asl of one label", "poly")]
    public = [longtail.CrossEntropyLoss, longtail.CrossEntropyLoss, longtail.FocalLoss, longtail.PolyCrossEntropyLoss]
    assert [type(x) for x in made] == public
