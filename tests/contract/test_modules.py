"""The modules: same numbers as the functions, vectors as buffers, options in the repr."""

import pickle

import pytest
import torch
from torch import nn

import longtail

LOGITS = torch.randn(6, 5, generator=torch.Generator().manual_seed(3)) * 3
TARGET = torch.tensor([0, 1, 4, -100, 2, 2])
WEIGHT = torch.tensor([0.2, 1.5, 1.0, 0.7, 3.0])
BIAS = torch.tensor([0.1, -0.5, 0.0, 1.0, -2.0])
MARGIN = torch.tensor([0.5, 0.1, 0.0, 0.2, 0.3])
SHARED = {
    "class_bias": BIAS,
    "class_margin": MARGIN,
    "scale": 1.2,
    "softcap": 20.0,
    "class_scale": MARGIN + 0.8,
    "target_scale": 1.2 - MARGIN,
    "class_mitigation": BIAS,
    "compensation": 0.5,
}

PAIRS = {
    "cross_entropy": (
        longtail.CrossEntropyLoss(WEIGHT, label_smoothing=0.1, focal_gamma=1.5, z_loss=1e-3, **SHARED),
        lambda x, t, **k: longtail.cross_entropy(
            x, t, WEIGHT, label_smoothing=0.1, focal_gamma=1.5, z_loss=1e-3, **SHARED, **k
        ),
    ),
    "focal": (
        longtail.FocalLoss(WEIGHT, 3.0, reduction="sum", **SHARED),
        lambda x, t, **k: longtail.focal_loss(x, t, WEIGHT, 3.0, reduction="sum", **SHARED, **k),
    ),
    "complement_entropy": (
        longtail.ComplementEntropyLoss(True, weight=WEIGHT, reduction="none", **SHARED),
        lambda x, t, **k: longtail.complement_entropy(x, t, True, weight=WEIGHT, reduction="none", **SHARED, **k),
    ),
    "complement_cross_entropy": (
        longtail.ComplementCrossEntropyLoss(gamma=-2.0, label_smoothing=0.2, **SHARED),
        lambda x, t, **k: longtail.complement_cross_entropy(x, t, gamma=-2.0, label_smoothing=0.2, **SHARED, **k),
    ),
    "poly": (
        longtail.PolyCrossEntropyLoss(2.0, WEIGHT, normalizer="count", temperature=1.5, **SHARED),
        lambda x, t, **k: longtail.poly_cross_entropy(
            x, t, 2.0, WEIGHT, normalizer="count", temperature=1.5, **SHARED, **k
        ),
    ),
    "generalized": (
        longtail.GeneralizedCrossEntropyLoss(0.5, WEIGHT, reduction="none", **SHARED),
        lambda x, t, **k: longtail.generalized_cross_entropy(x, t, 0.5, WEIGHT, reduction="none", **SHARED, **k),
    ),
    "sigmoid_focal": (
        longtail.SigmoidFocalLoss(0.6, 1.5, "rows", weight=WEIGHT, pos_weight=MARGIN, class_weight_by_target=True),
        lambda x, t, **k: longtail.sigmoid_focal_loss(
            x, t, 0.6, 1.5, "rows", weight=WEIGHT, pos_weight=MARGIN, class_weight_by_target=True, **k
        ),
    ),
    "sigmoid_cross_entropy": (
        longtail.SigmoidCrossEntropyLoss(WEIGHT, pos_weight=MARGIN, normalizer="rows"),
        lambda x, t, **k: longtail.sigmoid_cross_entropy(x, t, WEIGHT, pos_weight=MARGIN, normalizer="rows", **k),
    ),
    "class_balanced_focal": (
        longtail.ClassBalancedLoss([50, 20, 10, 5, 1], 0.99, "focal", 1.5),
        lambda x, t, **k: longtail.class_balanced_loss(x, t, [50, 20, 10, 5, 1], 0.99, "focal", 1.5, **k),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_module_equals_function(name):
    module, function = PAIRS[name]
    sample_weight = torch.rand(6, generator=torch.Generator().manual_seed(1))
    for extra in ({}, {"sample_weight": sample_weight}):
        gradients = []
        for call in (module, function):
            x = LOGITS.clone().requires_grad_()
            loss = call(x, TARGET, **extra)
            (loss * torch.linspace(0.5, 2.0, loss.numel()).reshape(loss.shape)).sum().backward()
            gradients.append((loss.detach(), x.grad))
        assert torch.equal(gradients[0][0], gradients[1][0])
        assert torch.equal(gradients[0][1], gradients[1][1])
        assert gradients[0][1].abs().sum() > 0


def test_vectors_are_buffers_that_follow_the_module():
    of_classes = ("class_bias", "class_scale", "target_scale", "class_mitigation")
    module = longtail.CrossEntropyLoss(WEIGHT, **dict.fromkeys(of_classes, BIAS))
    assert list(module.parameters()) == []
    assert set(module.state_dict()) == {"weight", *of_classes}
    assert module.to(torch.float64).weight.dtype == torch.float64
    module.to("meta")
    assert {getattr(module, name).device.type for name in of_classes} == {"meta"}


def test_state_dict_brings_the_weights_back():
    saved = longtail.ClassBalancedLoss([100, 10, 1], beta=0.99).state_dict()
    other = longtail.ClassBalancedLoss([7, 7, 7], beta=0.5)
    other.load_state_dict(saved)
    assert torch.equal(other.weight, longtail.effective_number_weight([100, 10, 1], 0.99))


@pytest.mark.parametrize("name", PAIRS)
def test_modules_pickle_and_deep_copy(name):
    module, _ = PAIRS[name]
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(LOGITS, TARGET), module(LOGITS, TARGET))


def test_repr_shows_the_options():
    assert repr(longtail.FocalLoss(WEIGHT, 3.0, reduction="sum", scale=2.0)) == (
        "FocalLoss(weight=[5], gamma=3.0, ignore_index=-100, reduction='sum', label_smoothing=0.0, scale=2.0)"
    )
    assert "beta=0.9" in repr(longtail.ClassBalancedLoss([3, 2], beta=0.9))


def test_drop_in_for_torch():
    ours = longtail.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)(LOGITS, TARGET)
    torchs = nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)(LOGITS, TARGET)
    torch.testing.assert_close(ours, torchs)


def test_class_balanced_divides_by_the_rows():
    counts, counted = [50, 20, 10, 5, 1], TARGET != -100
    weight = longtail.effective_number_weight(counts, 0.99)
    rows = nn.functional.cross_entropy(LOGITS, TARGET, reduction="none")
    expected = (rows * weight[TARGET.clamp(min=0)])[counted].sum() / counted.sum()
    torch.testing.assert_close(longtail.ClassBalancedLoss(counts, 0.99)(LOGITS, TARGET), expected)


def test_class_balanced_softmax_focal():
    counts = [50, 20, 10, 5, 1]
    module = longtail.ClassBalancedLoss(counts, 0.99, loss="softmax_focal", gamma=0.5)
    weight = longtail.effective_number_weight(counts, 0.99)
    p = LOGITS.softmax(1).gather(1, TARGET.clamp(min=0)[:, None])[:, 0]
    rows = -weight[TARGET.clamp(min=0)] * (1 - p) ** 0.5 * p.log()
    counted = TARGET != -100
    torch.testing.assert_close(module(LOGITS, TARGET), rows[counted].sum() / counted.sum())


def test_class_balanced_beta_zero_is_unweighted():
    module = longtail.ClassBalancedLoss([9, 4, 2, 1, 1], beta=0.0)
    assert torch.equal(module(LOGITS, TARGET), longtail.cross_entropy(LOGITS, TARGET))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"loss": "hinge"}, ValueError, "hinge"),
        ({"weight": WEIGHT}, TypeError, "weight"),
        ({"focal_gamma": 1.0}, TypeError, "focal_gamma"),
        ({"beta": 1.5}, ValueError, "beta"),
    ],
)
def test_class_balanced_refuses(arguments, error, text):
    with pytest.raises(error, match=text):
        longtail.ClassBalancedLoss(**{"samples_per_class": [3, 2, 1, 1, 1], "beta": 0.9, **arguments})


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="focus"):
        longtail.CrossEntropyLoss(focus=2.0)


def test_binary_focal_module():
    z, y = LOGITS[0], torch.tensor([0, 1, 1, 0, 1])
    module = longtail.BinaryFocalLoss(0.25, gamma=1.0, normalizer="positives")
    assert torch.equal(module(z, y), longtail.binary_focal_loss(z, y, 0.25, 1.0, normalizer="positives"))
    assert repr(module) == "BinaryFocalLoss(alpha=0.25, gamma=1.0, reduction='mean', normalizer='positives')"
