"""Promise: wrong input to the sigmoid family raises a plain error that names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cases
import longtail
from tolerances import assert_same

X, T = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 2, 1])
Y = torch.rand(4, 5, generator=torch.Generator().manual_seed(1))

ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "target_shape": ((X, T[:3]), {}, ValueError, "target"),
    "target_bool": ((X, T.bool()), {}, TypeError, "bool"),
    "target_complex": ((X, Y.to(torch.complex64)), {}, TypeError, "complex"),
    "target_requires_grad": ((X, Y.clone().requires_grad_()), {}, RuntimeError, "not differentiable"),
    "target_list": ((X, [0, 1, 2, 3]), {}, TypeError, "target"),
    "logits_integer": ((X.long(), T), {}, TypeError, "input"),
    "out_of_range": ((X, torch.tensor([0, 1, 5, 2])), {}, IndexError, r"5.*row 2"),
    "negative": ((X, torch.tensor([0, -7, 1, 2])), {}, IndexError, r"-7.*row 1"),
    "out_of_range_image": ((torch.zeros(2, 3, 4), torch.full((2, 4), 3)), {}, IndexError, r"3.*row 0"),
    "alpha_above": ((X, Y), {"alpha": 1.5}, ValueError, "alpha"),
    "alpha_tensor": ((X, Y), {"alpha": torch.tensor(0.5)}, TypeError, "alpha"),
    "gamma_negative": ((X, Y), {"gamma": -1.0}, ValueError, "gamma"),
    "reduction": ((X, Y), {"reduction": "average"}, ValueError, "average"),
    "gradient": ((X, Y), {"gradient": "sideways"}, ValueError, "sideways"),
    "normalizer": ((X, Y), {"reduction": "mean", "normalizer": "count"}, ValueError, "count"),
    "normalizer_negative": ((X, Y), {"reduction": "mean", "normalizer": -2.0}, ValueError, "normalizer is -2"),
    "normalizer_with_none": ((X, Y), {"normalizer": "rows"}, ValueError, "normalizer"),
    "weight_shape": ((X, Y), {"weight": torch.ones(4)}, ValueError, "weight"),
    "pos_weight_shape": ((X, T), {"pos_weight": torch.ones(1, 5)}, ValueError, "pos_weight"),
    "pos_weight_elements": ((X, Y), {"pos_weight": torch.ones(2, 5)}, ValueError, "pos_weight has shape"),
    "alpha_values": ((X, Y), {"alpha": torch.tensor([0.5, 0.5, 1.5, 0.5, 0.5])}, ValueError, "alpha is 1.5 at index 2"),
    "gamma_values": ((X, Y), {"gamma": torch.tensor([0.0, -1, 1, 1, 1])}, ValueError, "gamma is -1 at index 1"),
    "gamma_shape": ((X, Y), {"gamma": torch.ones(4)}, ValueError, r"gamma has shape \[4\], expected \[5\]"),
    "negative_gamma": ((X, Y), {"gamma_negative": -1.0}, ValueError, "gamma_negative"),
    "clip_one": ((X, Y), {"clip": 1.0}, ValueError, "clip"),
    "clip_none": ((X, Y), {"clip": None}, TypeError, "clip"),
    "scale_zero": ((X, Y), {"negative_scale": 0.0}, ValueError, "negative_scale"),
    "smoothing": ((X, Y), {"label_smoothing": 1.1}, ValueError, "label_smoothing"),
    "detach": ((X, Y), {"detach": 1}, TypeError, "detach"),
    "class_bias_shape": ((X, Y), {"class_bias": torch.ones(4)}, ValueError, "class_bias"),
    "sample_weight_shape": ((X, Y), {"sample_weight": torch.ones(4, 5)}, ValueError, "sample_weight"),
    "weight_requires_grad": ((X, Y), {"weight": torch.ones(5).requires_grad_()}, RuntimeError, "not differentiable"),
    "by_target_dense": ((X, Y), {"class_weight_by_target": True, "weight": torch.ones(5)}, ValueError, "by_target"),
    "by_target_alone": ((X, T), {"class_weight_by_target": True}, ValueError, "by_target"),
    "ignore_index": ((X, T), {"ignore_index": 1.5}, TypeError, "ignore_index"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    args, options, error, text = ERRORS[case]
    with pytest.raises(error, match=text):
        longtail.sigmoid_focal_loss(*args, **options)


def test_binary_targets_need_the_inputs_shape() -> None:
    with pytest.raises(ValueError, match="shape"):
        longtail.binary_focal_loss(X, T)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8, torch.float64])
def test_binary_targets_of_any_dtype(dtype: torch.dtype) -> None:
    z, y = torch.randn(5, generator=cases.generator(0)), torch.tensor([1, 0, 0, 1, 1])
    expected = longtail.binary_focal_loss(z, y.float(), alpha=0.25, reduction="none")
    assert_same(longtail.binary_focal_loss(z, y.to(dtype), alpha=0.25, reduction="none"), expected)
