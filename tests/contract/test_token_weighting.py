"""Promise: weights of tokens are the papers' formulas of a record, whatever it is of, and constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from tolerances import assert_close, assert_same

KINDS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "dft": ({}, lambda p, _: p),  # Wu et al. 2025, eq. 9
    "eaft": ({}, lambda _, h: (h / math.log(20)).clamp(max=1)),  # Diao et al. 2026, eq. 3
    "eaft_all": ({"num_classes": 40, "alpha": 2.0}, lambda _, h: (h / math.log(40)) ** 2),
    "mile": ({}, lambda _, h: (1 + h) / (1 + h).mean()),  # its authors' code, over the counted rows
    "mile_power": ({"gamma": 0.5, "sigma": 2.0, "normalize": False}, lambda _, h: (2 + h) ** 0.5),
    "dft_normalized": ({"normalize": True}, lambda p, _: p / p.mean()),
}


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_tokens(dtype: torch.dtype, which: str) -> None:
    given, formula = KINDS[which]
    logits, target = cases.random_case(11, 40, dtype, spread=2.0)
    logits[0] = 0.1  # above log 20
    counted = target != cases.IGNORE
    p = logits.double().softmax(1)
    expected = torch.zeros(11, dtype=torch.float64)
    picked = p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    expected[counted] = formula(picked[counted], -(p * p.log()).sum(1)[counted])
    x = cases.poison_ignored(logits, target).requires_grad_()
    statistics = longtail.row_statistics(x, target)
    weight = longtail.token_weighting(statistics, which.split("_")[0], **given)
    assert not weight.requires_grad
    assert weight.dtype == cases.vector_dtype(dtype)
    assert_close(weight, expected, factor=4)
    # A loss of them has the gradient of cross-entropy with these weights, held constant.
    (grad,) = torch.autograd.grad(-(weight * statistics.log_prob).sum(), x)
    plain = logits.detach().requires_grad_()
    loss = longtail.cross_entropy(plain, target, sample_weight=weight, reduction="sum")
    assert_close(grad, torch.autograd.grad(loss, plain)[0].double(), factor=4)


def test_weights_of_tokens_at_the_limits() -> None:
    logits, target = cases.margin_case(100.0, 7)
    statistics = longtail.row_statistics(logits, target)
    for kind in ("dft", "eaft", "mile"):
        weight = longtail.token_weighting(statistics, kind)
        assert weight.isfinite().all()
        assert (weight >= 0).all()
    assert_close(longtail.token_weighting(statistics, "dft"), statistics.log_prob.double().exp(), factor=4)
    assert_same(longtail.token_weighting(statistics, "eaft", alpha=0.0), torch.ones(6))
    nothing = longtail.row_statistics(logits, torch.full((6,), cases.IGNORE))
    for kind in ("dft", "eaft", "mile"):
        assert_same(longtail.token_weighting(nothing, kind, normalize=True), torch.zeros(6))
    lone = longtail.row_statistics(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    assert_same(longtail.token_weighting(lone, "dft"), torch.ones(2))
    broken = longtail.row_statistics(torch.full((1, 3), torch.nan), torch.tensor([0]))
    assert longtail.token_weighting(broken, "mile").isnan().all()


def test_weights_of_tokens_of_other_records() -> None:
    logits, target = cases.random_case(8, 5)
    own = longtail.token_weighting(longtail.row_statistics(logits, target), "dft")
    _, statistics = longtail.cross_entropy(logits, target, return_stats=True)
    assert_same(longtail.token_weighting(statistics, "dft"), own)
    hidden, head = torch.randn(8, 3), torch.randn(5, 3)
    _, statistics = longtail.linear_cross_entropy(hidden, head, target, return_stats=True)
    want = longtail.token_weighting(longtail.row_statistics(hidden @ head.T, target), "eaft")
    assert_close(longtail.token_weighting(statistics, "eaft"), want.double(), factor=10)
    shaped = longtail.row_statistics(logits.view(2, 4, 5).movedim(1, 2), target.view(2, 4))
    assert_same(longtail.token_weighting(shaped, "dft"), own.view(2, 4))


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"kind": "focal"}, ValueError, "kind is 'focal', expected one of 'dft', 'eaft', 'mile'"),
        ({"statistics": torch.ones(3)}, TypeError, "statistics is a Tensor, expected a RowStatistics"),
        ({"kind": "eaft", "num_classes": 1}, ValueError, "num_classes is 1"),
        ({"kind": "eaft", "num_classes": 2.5}, TypeError, "num_classes is a float"),
        ({"kind": "eaft", "alpha": -1.0}, ValueError, "alpha is -1.0"),
        ({"kind": "mile", "gamma": math.nan}, ValueError, "gamma is nan"),
        ({"kind": "mile", "sigma": "1"}, TypeError, "sigma is a str"),
        ({"normalize": 1}, TypeError, "normalize is a int, expected a bool or None"),
    ],
)
def test_wrong_weightings(given: dict[str, Any], error: type[Exception], text: str) -> None:
    statistics = longtail.row_statistics(*cases.random_case(6, 5))
    with pytest.raises(error, match=text):
        longtail.token_weighting(**{"statistics": statistics, "kind": "dft", **given})
