"""Promise: the class-balanced losses of Cui et al. 2019, with the paper's weights, normalisation and sign."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from tolerances import assert_close, assert_same

LOSSES = ("softmax", "sigmoid", "focal", "softmax_focal")
SAMPLES = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
PAPER = [0.0506, 0.0769, 0.1211, 0.195, 0.3188, 0.5246, 0.8683, 1.4426, 2.4092, 3.9927]
LOGITS, TARGET = cases.random_case(12, 10, torch.float64)


def paper(logits: Tensor, target: Tensor, weight: Tensor, loss: str, gamma: float) -> Tensor:
    """Row losses: the target's weight times cross-entropy, or times the sum of C binary losses."""
    g = target.clamp(min=0)
    log_p = F.log_softmax(logits, 1).gather(1, g[:, None])[:, 0]
    z = torch.where(F.one_hot(g, logits.shape[1]).bool(), logits, -logits)
    p_t = torch.sigmoid(z)
    rows = {
        "softmax": -log_p,
        "softmax_focal": -((1 - log_p.exp()) ** gamma) * log_p,
        "sigmoid": -p_t.log().sum(1),
        "focal": -((1 - p_t) ** gamma * p_t.log()).sum(1),
    }[loss]
    return torch.where(target == cases.IGNORE, 0, weight[g] * rows)


def test_the_papers_weights() -> None:
    weight = longtail.effective_number_weight(SAMPLES, 0.9999)
    assert weight.tolist() == pytest.approx(PAPER, abs=6e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients(loss: str, beta: float, gamma: float) -> None:
    weight = longtail.effective_number_weight(SAMPLES, beta, dtype=torch.float64)
    counted = (TARGET != cases.IGNORE).sum()
    for reduction in ("mean", "sum", "none"):
        x, y = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
        actual = longtail.class_balanced_loss(x, TARGET, SAMPLES, beta, loss, gamma, reduction=reduction)
        rows = paper(y, TARGET, weight, loss, gamma)
        truth = {"mean": rows.sum() / counted, "sum": rows.sum(), "none": rows}[reduction]
        assert actual.shape == truth.shape
        up = torch.randn(truth.shape, generator=cases.generator(1), dtype=torch.float64)
        torch.testing.assert_close(actual, truth, rtol=1e-6, atol=1e-7)  # the weights are float32
        grads = [torch.autograd.grad(a, b, up)[0] for a, b in ((actual, x), (truth, y))]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_beta_zero_is_the_unweighted_loss(loss: str) -> None:
    actual = longtail.class_balanced_loss(LOGITS, TARGET, SAMPLES, 0.0, loss)
    expected = {
        "softmax": lambda: longtail.cross_entropy(LOGITS, TARGET),
        "softmax_focal": lambda: longtail.focal_loss(LOGITS, TARGET),
        "sigmoid": lambda: longtail.sigmoid_focal_loss(LOGITS, TARGET, None, 0.0, "mean", normalizer="positives"),
        "focal": lambda: longtail.sigmoid_focal_loss(LOGITS, TARGET, None, 2.0, "mean", normalizer="positives"),
    }[loss]()
    assert_same(actual, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_module(loss: str) -> None:
    module = longtail.ClassBalancedLoss(SAMPLES, 0.999, loss, gamma=1.5)
    images = torch.randn(2, 10, 3, 4, generator=cases.generator(3))
    target = torch.randint(10, (2, 3, 4), generator=cases.generator(4))
    expected = longtail.class_balanced_loss(images, target, SAMPLES, 0.999, loss, 1.5)
    assert_same(module(images, target), expected)
    flat = longtail.class_balanced_loss(
        images.movedim(1, -1).reshape(-1, 10), target.flatten(), SAMPLES, 0.999, loss, 1.5
    )
    assert_close(expected, flat.double())
    assert set(module.state_dict()) == {"weight"}
    assert f"loss={loss!r}" in repr(module)
    v = torch.rand(2, 3, 4)
    assert module(images, target, sample_weight=v).item() != expected.item()


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_counted_gives_zero(loss: str) -> None:
    target = torch.full((12,), cases.IGNORE)
    assert longtail.class_balanced_loss(LOGITS, target, SAMPLES, 0.99, loss).item() == 0.0


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="hinge"):
        longtail.class_balanced_loss(LOGITS, TARGET, SAMPLES, 0.9, "hinge")
    with pytest.raises(ValueError, match="rows"):
        longtail.class_balanced_loss(LOGITS, TARGET, SAMPLES, 0.9, "focal", reduction="rows")
    with pytest.raises(TypeError, match="class_weight_by_target"):
        longtail.ClassBalancedLoss(SAMPLES, 0.9, "focal", class_weight_by_target=False)


@pytest.mark.parametrize(
    ("loss", "write", "text"),
    [
        ("focal", {"z_loss": 0.1}, "no option z_loss with loss='focal'"),
        ("focal", {"class_weight_by_target": False}, "no option class_weight_by_target with"),
        ("softmax", {"alpha": 0.5}, "no option alpha with loss='softmax'"),
        ("softmax", {"focal_gamma": 0.5}, "no option focal_gamma with loss='softmax'"),
        ("softmax", {"weight": None}, "weight is None, expected a Tensor"),
        ("focal", {"weight": None}, "weight is None, expected a Tensor"),
    ],
)
def test_options_of_other_losses_are_refused(loss: str, write: dict[str, Any], text: str) -> None:
    module = longtail.ClassBalancedLoss(SAMPLES, 0.9, loss)
    before = module(LOGITS, TARGET)
    ((name, value),) = write.items()
    with pytest.raises(TypeError, match=text):
        setattr(module, name, value)
    assert_same(module(LOGITS, TARGET), before)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["samples_per_class", "beta", "volume", "empty", "weight"])
def test_what_makes_the_weights_is_refused_at_the_call(loss: str, name: str) -> None:
    text = "weight is None, expected a Tensor" if name == "weight" else f"{name} makes the weights, once: write it to"
    with pytest.raises(TypeError, match=text):
        longtail.ClassBalancedLoss(SAMPLES, 0.9, loss)(LOGITS, TARGET, **{name: None})


class WritesFirst(longtail.ClassBalancedLoss):
    def __init__(self) -> None:
        self.samples_per_class, self.beta, self.loss = [1, 2], 0.5, "softmax"
        super().__init__(SAMPLES, 0.9, "focal")


def test_a_subclass_that_writes_before_it_is_initialised() -> None:
    module = WritesFirst()
    assert (module.beta, module.loss, module.samples_per_class) == (0.9, "focal", SAMPLES)
    assert_same(module(LOGITS, TARGET), longtail.ClassBalancedLoss(SAMPLES, 0.9, "focal")(LOGITS, TARGET))
    module.beta = 0.5
    assert_same(module.weight, longtail.effective_number_weight(SAMPLES, 0.5))
