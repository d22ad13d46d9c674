"""Scales, mitigation and adjusted logits from class counts: the papers' formulas, limits, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

import longtail
from longtail import class_balance as cb
from longtail.training import NormalizedLinear, StreamingClassFrequency

COUNTS = [5000, 83, 387, 1]
N = torch.tensor(COUNTS, dtype=torch.float64)
DOUBLE = {"dtype": torch.float64}


@pytest.mark.parametrize("gamma", [0.0, 0.2, 1.0])
def test_cdt_divides_by_the_published_temperatures(gamma):
    temperatures = torch.tensor([(5000 / n) ** gamma for n in COUNTS], dtype=torch.float64)
    torch.testing.assert_close(1 / cb.cdt_scale(COUNTS, gamma, **DOUBLE), temperatures, rtol=1e-13, atol=0)
    assert cb.cdt_scale(COUNTS, gamma).max() == 1


def test_vector_scaling_is_both_adjustments_and_each_alone_at_its_end():
    options = cb.vector_scaling(COUNTS, **DOUBLE)
    torch.testing.assert_close(options["class_scale"], (N / N.max()) ** 0.3, rtol=1e-13, atol=0)
    torch.testing.assert_close(options["class_bias"], (N / N.sum()).log(), rtol=1e-13, atol=0)
    assert cb.vector_scaling(COUNTS, 0.3, 0.0).keys() == {"class_scale"}
    assert cb.vector_scaling(COUNTS, 0.0, 1.0).keys() == {"class_bias"}
    assert cb.vector_scaling(COUNTS, 0.0, 0.0) == {}
    with pytest.raises(ValueError, match="is 0 for class 1"):
        cb.vector_scaling([1, 0], 0.0, 0.0)


@pytest.mark.parametrize(("margin", "power"), [(1.0, 1 / 3), (2.5, 0.5), (0.1, 0.0)])
def test_immax_margins_have_the_mean_asked_for_and_the_least_bound(margin, power):
    rho = 1 / cb.immax_scale(COUNTS, margin, power, **DOUBLE)
    torch.testing.assert_close(rho, margin * N**power / (N**power).mean(), rtol=1e-13, atol=0)
    if power == 1 / 3:
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):  # of margins with the same sum
            other = rho * torch.exp(0.2 * torch.randn(4, generator=generator, dtype=torch.float64))
            other *= rho.sum() / other.sum()
            assert (N / other**2).sum() > (N / rho**2).sum()


def test_seesaw_mitigation_is_the_logarithm_of_the_factor():
    mitigation = cb.seesaw_mitigation(COUNTS, **DOUBLE)
    for g, of_target in enumerate(COUNTS):
        factor = torch.tensor([min(1.0, n / of_target) ** 0.8 for n in COUNTS], dtype=torch.float64)
        difference = (mitigation - mitigation[g]).clamp(max=0)
        torch.testing.assert_close(difference.exp(), factor, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cb.immax_scale([1, 2], 0.0), r"margin is 0\.0, expected a positive number"),
        (lambda: cb.cdt_scale([1, 1e300], 2.0), "cdt_scale of class 0 is 0, expected"),
        (lambda: cb.immax_scale([1, 1e300], 1.0, 2.0), "immax_scale of class 0 is inf, expected"),
        (
            lambda: cb.seesaw_mitigation([1, 2], 1e300),
            r"seesaw_mitigation of class 0 is -6\.93e\+299, expected at most",
        ),
    ],
)
def test_what_a_dtype_does_not_hold_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_adjusted_logits_take_the_prior_off_along_the_classes(shape, dtype):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    adjusted = longtail.adjusted_logits(logits, COUNTS, tau=0.7)
    assert adjusted.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    first = logits.double() if len(shape) == 1 else logits.double().movedim(1, -1)
    expected = first - 0.7 * (N / N.sum()).log()
    expected = expected if len(shape) == 1 else expected.movedim(-1, 1)
    torch.testing.assert_close(adjusted.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.autograd.grad(adjusted.sum(), logits)[0], torch.ones_like(logits))


def test_adjusted_logits_undo_the_bias_of_training():
    logits = torch.randn(5, 4, dtype=torch.float64)
    biased = logits + longtail.logit_adjustment(COUNTS, 1.3, dtype=torch.float64)
    torch.testing.assert_close(longtail.adjusted_logits(biased, COUNTS, 1.3), logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(3, 5), ValueError, r"input has shape \[3, 5\], expected 4 classes in dimension 1"),
        (torch.zeros(5), ValueError, r"input has shape \[5\], expected 4 classes in dimension 0"),
        (torch.zeros(()), ValueError, r"input has shape \[\], expected 4 classes"),
        (torch.zeros(3, 4, dtype=torch.long), TypeError, r"input has dtype torch\.int64, expected floating point"),
        ([[1.0] * 4], TypeError, "input is a list, expected a Tensor"),
    ],
)
def test_adjusted_logits_refuse(logits, error, message):
    with pytest.raises(error, match=message):
        longtail.adjusted_logits(logits, COUNTS)


def test_running_counts_make_the_same_vectors():
    stats = StreamingClassFrequency(4, decay=1.0)
    stats.update(torch.tensor([0, 0, 0, 1, 1, 2]))
    counts = [3, 2, 1, 1]  # a class not seen counts as 1
    torch.testing.assert_close(stats.seesaw_mitigation(0.5), cb.seesaw_mitigation(counts, 0.5))
    torch.testing.assert_close(stats.cdt_scale(0.2), cb.cdt_scale(counts, 0.2))
    torch.testing.assert_close(stats.immax_scale(2.0, power=0.5), cb.immax_scale(counts, 2.0, 0.5))
    loss = longtail.SeesawLoss([1] * 4)
    loss.class_mitigation = stats.seesaw_mitigation()
    logits, target = torch.randn(6, 4), torch.arange(6) % 4
    torch.testing.assert_close(loss(logits, target), longtail.seesaw_loss(logits, target, stats.counts()))


def test_normalized_linear_gives_cosines():
    torch.manual_seed(0)
    layer = NormalizedLinear(6, 4, dtype=torch.float64)
    assert layer.bias is None
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    cosines = torch.nn.functional.cosine_similarity(x[:, :, None], layer.weight, dim=-1)
    torch.testing.assert_close(layer(7 * x), cosines, rtol=1e-12, atol=1e-12)
    assert layer(torch.zeros(1, 6, dtype=torch.float64)).eq(0).all()
    half = NormalizedLinear(6, 4, dtype=torch.float16)
    for features in (0.0, 1e-5, 3e4):  # of which a norm is none of float16's numbers
        input = torch.full((1, 6), features, dtype=torch.float16)
        expected = torch.nn.functional.cosine_similarity(input.float()[:, None], half.weight.float(), dim=-1)
        torch.testing.assert_close(half(input).float(), expected, rtol=5e-3, atol=5e-3)
    linear = torch.nn.Linear(6, 4)
    assert NormalizedLinear.of(linear).weight is linear.weight


def test_seesaw_module_is_the_function_and_says_what_it_sets():
    logits, target = torch.randn(6, 4, requires_grad=True), torch.arange(6) % 4
    loss = longtail.SeesawLoss(COUNTS, 0.5, 1.5, label_smoothing=0.1, reduction="sum")
    expected = longtail.seesaw_loss(logits, target, COUNTS, 0.5, 1.5, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(loss(logits, target), expected)
    assert loss.state_dict().keys() == {"class_mitigation"}
    assert "compensation=1.5" in repr(loss)
    with pytest.raises(TypeError, match="SeesawLoss sets compensation itself"):
        longtail.SeesawLoss(COUNTS, compensation=1.0)
    for call in (lambda: longtail.SeesawLoss(COUNTS, q=-1), lambda: longtail.seesaw_loss(logits, target, COUNTS, q=-1)):
        with pytest.raises(ValueError, match=r"^q is -1.0, expected a finite number in"):
            call()
    double = longtail.cross_entropy(
        logits.double(), target, class_mitigation=cb.seesaw_mitigation(COUNTS, **DOUBLE), compensation=2.0
    )
    assert torch.equal(longtail.seesaw_loss(logits.double(), target, COUNTS), double)
    with pytest.raises(ValueError, match="is 0 for class 1"):
        longtail.seesaw_loss(logits, target, [1, 0, 2, 3])
    assert math.isfinite(longtail.seesaw_loss(logits, target, [1, 0, 2, 3], empty="clamp"))
