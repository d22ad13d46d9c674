"""Promise: DistributionBalancedLoss is its function with what was written last; the class vectors follow."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import longtail
from multi_label_cases import data
from tolerances import assert_same

ROWS = 1000
COUNTS = [700, 40, 300, 3, 90, 1, 12]


def balanced(x: Tensor, y: Tensor, counts: Any = COUNTS, rows: int = ROWS, **options: Any) -> Tensor:
    return longtail.distribution_balanced_loss(x, y, counts, rows, **options)


def module_case() -> tuple[longtail.DistributionBalancedLoss, Tensor, Tensor]:
    return longtail.DistributionBalancedLoss(COUNTS, ROWS), *data((6, 7), "hard", torch.float32)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("samples_per_class", [9, 8, 7, 6, 5, 4, 3]), ("num_samples", 800), ("kappa", 0.5), ("negative_scale", 3.0)),
        *(("gamma", 1.0), ("gamma", torch.linspace(0, 2, 7)), ("rebalance_mu", 0.3), ("clip", 0.1), ("detach", True)),
        *(("weight", torch.rand(7)), ("pos_weight", torch.rand(6, 1)), ("alpha", torch.rand(7)), ("empty", "clamp")),
        *(("label_smoothing", 0.1), ("reduction", "rows"), ("gradient", "inplace"), ("normalizer", 2.0)),
    ],
)
def test_what_is_written_to_a_module(option: str, value: Any) -> None:
    """Given, written or overridden, in every copy: as the function has it."""
    module, z, y = module_case()
    given = {"counts": value} if option == "samples_per_class" else {"rows": value} if option == "num_samples" else {}
    expected = balanced(z, y, **(given or {option: value}))
    own = {} if given else {option: value}
    counts, rows = given.get("counts", COUNTS), given.get("rows", ROWS)
    assert_same(longtail.DistributionBalancedLoss(counts, rows, **own)(z * 1, y), expected)
    before = module(z * 1, y)
    assert_same(module(z * 1, y, **{option: value}), expected)
    assert_same(module(z * 1, y), before)
    setattr(module, option, value)
    for again in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(again(z * 1, y), expected)
        assert (
            getattr(again, option) is value or not isinstance(value, Tensor) or (getattr(again, option) == value).all()
        )


def test_what_a_module_refuses_changes_nothing() -> None:
    module, z, y = module_case()
    for option, wrong in (
        *(("samples_per_class", [0] * 7), ("num_samples", 600), ("kappa", "small"), ("negative_scale", 0.0)),
        *(("empty", "zero"), ("gamma", -1.0), ("class_bias", 3.0), ("rebalance_beta", -1.0)),
    ):
        with pytest.raises((TypeError, ValueError), match=option):
            setattr(module, option, wrong)
        with pytest.raises((TypeError, ValueError), match=option):
            module(z, y, **{option: wrong})
    with pytest.raises(TypeError, match="unexpected keyword argument 'kapa'"):
        module(z, y, kapa=0.1)
    assert_same(module(z, y), balanced(z, y))
    with pytest.raises(TypeError, match="makes class_bias itself"):
        longtail.DistributionBalancedLoss(COUNTS, ROWS, class_bias=torch.zeros(7))


def test_the_class_vectors_are_buffers() -> None:
    module, z, y = module_case()
    assert repr(module) == (
        "DistributionBalancedLoss(num_samples=1000, kappa=0.05, class_bias=[7], inverse_counts=[7], gamma=2.0, "
        "negative_scale=2.0)"
    )
    assert list(module.state_dict()) == ["class_bias", "inverse_counts"]
    other = longtail.DistributionBalancedLoss([1] * 7, ROWS)
    other.load_state_dict(module.state_dict())
    assert_same(other(z, y), module(z, y))
    module.double()
    module.kappa = 0.5
    assert module.class_bias.dtype == torch.float64
    assert_same(module(z.double(), y.double()), balanced(z.double(), y.double(), kappa=0.5))
    for dtype in (torch.float16, torch.bfloat16):
        module.to(dtype).kappa = 0.25
        assert module.class_bias.dtype == module.inverse_counts.dtype == dtype
        torch.testing.assert_close(module(z, y), balanced(z, y, kappa=0.25), rtol=2e-2, atol=0)
    module.persistent = False
    module.kappa = 0.1
    assert not module.state_dict()
    assert {"class_bias", "inverse_counts"} == set(dict(module.named_buffers()))
    assert longtail.DistributionBalancedLoss(COUNTS, ROWS, persistent=False).state_dict() == {}
    module.to("meta")
    module.num_samples = 2000
    assert module.class_bias.device.type == "meta"
