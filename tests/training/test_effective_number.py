"""Promise: a beta, or a volume, of each class: the effective number as Cui et al. 2019 define it in section 3."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cases
import longtail
from longtail.training import DeferredReweighting, StreamingClassFrequency
from tolerances import assert_same

SAMPLES = [5000, 387, 83, 2, 1]
BETAS = [0.9999, 0.5, 0.0, 1.0, 0.99]
VOLUMES = [10_000, 37.5, 1, math.inf, 2]
LOGITS, TARGET = cases.random_case(12, 5, torch.float64)
volumes = st.one_of(st.integers(1, 10**12), st.fractions(1, 10**6, max_denominator=1000))


def paper(n: int, beta: Fraction) -> Fraction:
    """Proposition 1, in exact arithmetic."""
    return Fraction(n) if beta == 1 else (1 - beta**n) / (1 - beta)


def paper_weights(samples: Sequence[int], betas: Sequence[float]) -> Tensor:
    """Section 4: inversely proportional to the effective numbers, and C in sum."""
    inverse = [1 / float(paper(n, Fraction(beta))) for n, beta in zip(samples, betas, strict=True)]
    return torch.tensor([x * len(inverse) / sum(inverse) for x in inverse], dtype=torch.float64)


def schedule(samples: Any, beta: Any = None, *, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return DeferredReweighting(samples, beta, 1, dtype=dtype, **options)(1)


def streaming(samples: Any, beta: Any = None, **options: Any) -> Tensor:
    stats = StreamingClassFrequency(len(samples), decay=1.0)
    stats.update(torch.arange(len(samples)).repeat_interleave(torch.tensor(samples)))
    return stats.effective_number_weight(beta, **options)


def balanced(loss: str) -> Callable[..., Tensor]:
    def function(samples: Any, beta: Any = None, **options: Any) -> Tensor:
        return longtail.class_balanced_loss(LOGITS, TARGET, samples, beta, loss, reduction="none", **options)

    return function


def module(samples: Any, beta: Any = None, **options: Any) -> Tensor:
    return longtail.ClassBalancedLoss(samples, beta, **options).weight


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "effective_number": longtail.effective_number,
    "effective_number_weight": longtail.effective_number_weight,
    "class_balanced_loss, softmax": balanced("softmax"),
    "class_balanced_loss, focal": balanced("focal"),
    "ClassBalancedLoss": module,
    "DeferredReweighting": schedule,
    "StreamingClassFrequency": streaming,
}


@given(data=st.data(), size=st.integers(1, 9))
def test_effective_numbers_of_the_paper(data: st.DataObject, size: int) -> None:
    samples = data.draw(st.lists(st.integers(1, 500), min_size=size, max_size=size))
    chosen = data.draw(st.lists(volumes, min_size=size, max_size=size))
    exact = [float(paper(n, (Fraction(N) - 1) / Fraction(N))) for n, N in zip(samples, chosen, strict=True)]
    actual = longtail.effective_number(samples, volume=[float(N) for N in chosen], dtype=torch.float64)
    torch.testing.assert_close(actual, torch.tensor(exact, dtype=torch.float64), rtol=1e-13, atol=0)
    betas = data.draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))
    exact = [float(paper(n, Fraction(beta))) for n, beta in zip(samples, betas, strict=True)]
    actual = longtail.effective_number(samples, betas, dtype=torch.float64)
    torch.testing.assert_close(actual, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["effective_number_weight", "DeferredReweighting"])
def test_weights_of_the_paper(name: str) -> None:
    actual = FUNCTIONS[name](SAMPLES, BETAS, dtype=torch.float64)
    torch.testing.assert_close(actual, paper_weights(SAMPLES, BETAS), rtol=1e-12, atol=0)
    betas = [1.0 if math.isinf(N) else 1 - 1 / N for N in VOLUMES]
    actual = FUNCTIONS[name](SAMPLES, volume=VOLUMES, dtype=torch.float64)
    torch.testing.assert_close(actual, paper_weights(SAMPLES, betas), rtol=1e-11, atol=0)


@pytest.mark.parametrize("loss", ["softmax", "softmax_focal", "sigmoid", "focal"])
def test_losses_take_these_weights(loss: str) -> None:
    for given_by in ({"beta": BETAS}, {"volume": VOLUMES}):
        weight = longtail.effective_number_weight(SAMPLES, **given_by).double()
        plain = longtail.class_balanced_loss(LOGITS, TARGET, SAMPLES, 0.0, loss, reduction="none")
        expected = torch.where(TARGET < 0, 0, weight[TARGET.clamp(min=0)]) * plain
        for actual in (
            longtail.class_balanced_loss(LOGITS, TARGET, SAMPLES, loss=loss, reduction="none", **given_by),
            longtail.ClassBalancedLoss(SAMPLES, loss=loss, reduction="none", **given_by)(LOGITS, TARGET),
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("option", ["beta", "volume"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equal_entries_are_the_number_bit_for_bit(name: str, option: str) -> None:
    for value in (0.0, 0.3, 0.9999, 1 - 2.0**-50, 1.0) if option == "beta" else (1, 1.5, 100, 1e17, math.inf):
        expected = FUNCTIONS[name](SAMPLES, **{option: value})
        same = [value] * 5
        for vector in (
            same,
            tuple(same),
            torch.tensor(same, dtype=torch.float64),
            np.array(same),
            np.array(same)[::-1],
        ):
            assert_same(FUNCTIONS[name](SAMPLES, **{option: vector}), expected)
        for number in (np.float64(value), np.array(value), torch.tensor(value, dtype=torch.float64)):
            assert_same(FUNCTIONS[name](SAMPLES, **{option: number}), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_volume_one_and_infinity_are_beta_zero_and_one(name: str) -> None:
    assert_same(
        FUNCTIONS[name](SAMPLES, volume=[1, math.inf, 1, math.inf, 1]), FUNCTIONS[name](SAMPLES, [0, 1, 0, 1, 0])
    )
    assert longtail.effective_number([7, 7, 0, 0], [0, 1, 0, 1]).tolist() == [1, 7, 0, 0]
    for volume in ([1e300, 10**400], 10**400):
        assert longtail.effective_number([7, 0], volume=volume, dtype=torch.float64).tolist() == [7, 0]


@pytest.mark.parametrize("option", ["beta", "volume"])
@pytest.mark.parametrize(
    "name", [name for name in FUNCTIONS if name not in ("effective_number", "StreamingClassFrequency")]
)
def test_empty_classes(name: str, option: str) -> None:
    function, values = FUNCTIONS[name], BETAS if option == "beta" else VOLUMES
    empty = [5000, 0, 83, 0, 1]
    with pytest.raises(ValueError, match=r"is 0 for class 1, 3; .*empty="):
        function(empty, **{option: values})
    clamped = function([max(n, 1) for n in empty], **{option: values})
    assert_same(function(empty, empty="clamp", **{option: values}), clamped)
    if not name.startswith("class_balanced_loss"):
        weight = function(empty, empty="zero", **{option: values})
        assert weight[[1, 3]].tolist() == [0, 0]
        assert_same(weight[[0, 2, 4]], function([5000, 83, 1], **{option: [values[c] for c in (0, 2, 4)]}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_values(name: str) -> None:
    function = FUNCTIONS[name]
    number = "expected a number, tensor, sequence or array"
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, TypeError, "exactly one of beta and volume, got neither"),
        ({"beta": 0.9, "volume": 10}, TypeError, "exactly one of beta and volume, got both"),
        ({"beta": [0.9] * 4}, ValueError, r"beta has shape \[4\], expected a number or \[5\]"),
        ({"volume": torch.ones(5, 1)}, ValueError, r"volume has shape \[5, 1\], expected a number or \[5\]"),
        ({"beta": [0.9, 0.9, 1.5, 0, 0]}, ValueError, r"beta\[2\] is 1\.5, expected a number in \[0, 1\]"),
        ({"beta": [0.9, -0.1, 1, 0, 0]}, ValueError, r"beta\[1\] is -0\.1, expected a number in \[0, 1\]"),
        ({"beta": [0.9, math.nan, 1, 0, 0]}, ValueError, r"beta\[1\] is nan, expected"),
        ({"volume": [9, 9, 9, 9, 0.5]}, ValueError, r"volume\[4\] is 0\.5, expected a number in \[1, inf\]"),
        ({"volume": [9, 9, 9, 9, math.nan]}, ValueError, r"volume\[4\] is nan, expected"),
        ({"volume": 0.5}, ValueError, r"volume is 0\.5, expected a number in \[1\.0, inf\]"),
        ({"volume": -math.inf}, ValueError, r"volume is -inf, expected a number in \[1\.0, inf\]"),
        ({"volume": -(10**400)}, ValueError, r"^volume is -inf, expected a number in \[1\.0, inf\]$"),
        ({"beta": 10**400}, ValueError, r"^beta is inf, expected a finite number in \[0\.0, 1\.0\]$"),
        ({"beta": torch.tensor(1.5)}, ValueError, r"beta is 1\.5, expected a finite number in"),
        ({"beta": torch.tensor(0.9, requires_grad=True)}, ValueError, r"beta requires grad, .*pass beta\.detach\(\)"),
        ({"volume": torch.ones(5, requires_grad=True)}, ValueError, "volume requires grad"),
        ({"beta": np.array("0.9")}, TypeError, "beta is a str, expected a number"),
        ({"beta": torch.tensor(True)}, TypeError, r"beta has dtype torch\.bool, expected real numbers"),
        ({"volume": math.nan}, ValueError, "volume is nan"),
        ({"beta": "0.9"}, TypeError, f"beta is a str, {number}"),
        ({"volume": {0: 1}}, TypeError, f"volume is a dict, {number}"),
        ({"beta": [True] * 5}, TypeError, r"beta\[0\] is True, expected a real number"),
        ({"beta": torch.ones(5, dtype=torch.bool)}, TypeError, r"beta has dtype torch\.bool, expected real numbers"),
    ]
    for options, error, text in wrong:
        with pytest.raises(error, match=text):
            function(SAMPLES, **options)
