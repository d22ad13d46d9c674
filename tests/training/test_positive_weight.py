"""``pos_weight`` from counts: the ratio of negatives to positives, its power, and classes that have none."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

import longtail
from longtail import positive_weight


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_ratio(power):
    counts, n = [100, 1, 399, 0.25], 400
    expected = [float((n - Fraction(c)) / Fraction(c)) ** power for c in counts]
    actual = positive_weight(counts, n, power, dtype=torch.float64)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    each = positive_weight(counts, torch.tensor([400] * 4), power)
    torch.testing.assert_close(each, actual.float())


def test_positives_weigh_as_much_as_negatives():
    """At logits of 0 the gradients of each class cancel out, of what is known."""
    y = (torch.rand(300, 3, generator=torch.Generator().manual_seed(1)) < torch.tensor([0.3, 0.05, 0.5])).float()
    y[:100, 1] = -1
    counts, totals = longtail.class_counts(y, 3, -1, return_totals=True)
    assert totals.tolist() == [300, 200, 300]
    z = torch.zeros(300, 3, requires_grad=True)
    weight = positive_weight(counts, totals)
    longtail.sigmoid_cross_entropy(z, y, pos_weight=weight, ignore_index=-1, reduction="sum").backward()
    torch.testing.assert_close(z.grad.sum(0), torch.zeros(3), atol=1e-4, rtol=0)
    plain = positive_weight(longtail.class_counts(y[:, ::2].bool(), 2), len(y))
    torch.testing.assert_close(plain, weight[::2])
    loss = longtail.sigmoid_cross_entropy(z[:, ::2], y[:, ::2], pos_weight=plain)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(z[:, ::2], y[:, ::2], pos_weight=plain))


def test_classes_without_positives_or_negatives():
    counts = [0, 4, 8]
    assert positive_weight(counts, 8, empty="zero").tolist() == [0, 1, 0]
    assert positive_weight(counts, 8, empty="clamp").tolist() == [7, 1, 0.125]
    assert positive_weight([7.5], 8, empty="clamp").item() == pytest.approx(0.5 / 7.5)
    assert positive_weight([0, 1], [0, 1], empty="clamp").tolist() == [1, 1]
    with pytest.raises(ValueError, match=r'is 0 for class 0; expected at least 1, or empty="zero" .* or empty="clamp"'):
        positive_weight(counts[:2], 8)
    with pytest.raises(ValueError, match=r"samples_per_class\[1\] is 8 of num_samples = 8, expected fewer, or empty"):
        positive_weight(counts[1:], 8)


@pytest.mark.parametrize(
    ("num_samples", "exception", "message"),
    [
        (2, ValueError, r"samples_per_class\[1\] is 3 of num_samples = 2, expected no more"),
        ([9, 2], ValueError, r"samples_per_class\[1\] is 3 of num_samples = 2, expected no more"),
        (-1, ValueError, "num_samples is -1"),
        (float("inf"), ValueError, "num_samples is inf, expected a finite number"),
        ([9], ValueError, r"num_samples has shape \[1\], expected a number or \[2\]"),
        ("9", TypeError, "num_samples is a str"),
        (None, TypeError, "num_samples is a NoneType"),
        ([1e300, 1e300], ValueError, "positive_weight of class 0 is 1e\\+300, expected"),
        (torch.tensor(9.0, requires_grad=True), ValueError, "num_samples requires grad"),
    ],
)
def test_wrong_totals(num_samples, exception, message):
    with pytest.raises(exception, match=message):
        positive_weight([1, 3], num_samples)
