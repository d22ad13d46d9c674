"""Promise: wrong input raises what `F.cross_entropy` raises for it, or a plain error that names the value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import cases
import longtail
from longtail.options import SOFTMAX_VECTORS

X, T = cases.random_case(4, 5, ignore=False)
P = X.softmax(1)

TORCH_ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "reduction": ((X, T), {"reduction": "average"}),
    "reduction_none_object": ((X, T), {"reduction": None}),
    "batch": ((X, T[:3]), {}),
    "rank": ((X[None], T), {}),
    "spatial": ((torch.randn(2, 5, 3), torch.zeros(2, 4, dtype=torch.long)), {}),
    "spatial_rank": ((torch.randn(2, 5, 3, 2), torch.zeros(2, 3, dtype=torch.long)), {}),
    "scalar_logits": ((torch.tensor(1.0), torch.tensor(0)), {}),
    "target_bool": ((X, T.bool()), {}),
    "target_float_indices": ((X, T.float()), {}),
    "target_integer_probabilities": ((X, torch.zeros(4, 5, dtype=torch.long)), {}),
    "target_list": ((X, T.tolist()), {}),
    "logits_list": ((X.tolist(), T), {}),
    "logits_integer": ((X.long(), T), {}),
    "logits_float8": ((X.to(torch.float8_e4m3fn), T), {}),
    "logits_complex": ((X.to(torch.complex64), T), {}),
    "target_too_large": ((X, torch.tensor([0, 1, 5, 2])), {}),
    "target_negative": ((X, torch.tensor([0, 1, -1, 2])), {}),
    "target_no_class": ((torch.zeros(4, 0), T), {"reduction": "none"}),
    "single_row_target": ((X[0], torch.tensor(9)), {}),
    "smoothing_above_one": ((X, T), {"label_smoothing": 1.5}),
    "smoothing_string": ((X, T), {"label_smoothing": "a"}),
    "weight_length": ((X, T), {"weight": torch.ones(4)}),
    "weight_rank": ((X, T), {"weight": torch.ones(1, 5)}),
    "weight_list": ((X, T), {"weight": [1.0] * 5}),
    "weight_requires_grad": ((X.clone().requires_grad_(), T), {"weight": torch.ones(5, requires_grad=True)}),
    "ignore_index_string": ((X, T), {"ignore_index": "a"}),
    "ignore_index_float": ((X, T), {"ignore_index": 1.5}),
    "probabilities_weight_length": ((X, P), {"weight": torch.ones(3)}),
    "probabilities_ignore_index": ((X, P), {"ignore_index": 2}),
}


@pytest.mark.parametrize("case", TORCH_ERRORS)
def test_same_error_class_as_torch(case: str) -> None:
    args, kwargs = TORCH_ERRORS[case]
    with pytest.raises(Exception) as torchs:  # noqa: PT011
        F.cross_entropy(*args, **kwargs)
    with pytest.raises(torchs.type) as ours:
        longtail.cross_entropy(*args, **kwargs)
    assert len(str(ours.value)) > 10, "an error says what is wrong"


@pytest.mark.parametrize("value", [-1, 5, 77])
@pytest.mark.parametrize("gradient", cases.MODES)
@pytest.mark.parametrize("rows", [4, 3000])
def test_out_of_range_target_names_row_and_value(value: int, gradient: str, rows: int) -> None:
    logits, target = cases.random_case(rows, 5, ignore=False)
    target[rows - 2] = value
    x = logits.clone().requires_grad_() * 1.0
    with pytest.raises(IndexError, match=rf"(?s)(?=.*\b{rows - 2}\b)(?=.*(?<!\d){value}\b)"):
        longtail.cross_entropy(x, target, gradient=gradient)
    with pytest.raises(IndexError):
        longtail.cross_entropy(x.detach(), target, weight=torch.ones(5), gradient=gradient)


OPTION_ERRORS: dict[str, tuple[dict[str, Any], type[Exception] | tuple[type[Exception], ...], str]] = {
    "smoothing_negative": ({"label_smoothing": -0.1}, (ValueError, RuntimeError), "label_smoothing"),
    "focal_negative": ({"focal_gamma": -1.0}, ValueError, "focal_gamma"),
    "focal_nan": ({"focal_gamma": float("nan")}, ValueError, "focal_gamma"),
    "softcap_zero": ({"softcap": 0.0}, ValueError, "softcap"),
    "softcap_negative": ({"softcap": -3.0}, ValueError, "softcap"),
    "gradient": ({"gradient": "sideways"}, ValueError, "sideways"),
    "normalizer_name": ({"normalizer": "tokens"}, ValueError, "tokens.*'count', a number, a 0-d tensor"),
    "normalizer_negative": ({"normalizer": -1}, ValueError, "normalizer is -1"),
    "normalizer_with_sum": ({"normalizer": "count", "reduction": "sum"}, ValueError, "normalizer"),
    "normalizer_with_none": ({"normalizer": 3.0, "reduction": "none"}, ValueError, "normalizer"),
    "normalizer_vector": ({"normalizer": torch.ones(2)}, ValueError, "normalizer"),
    "class_bias_length": ({"class_bias": torch.ones(4)}, (ValueError, RuntimeError), "class_bias"),
    "class_bias_list": ({"class_bias": [0.0] * 5}, TypeError, "class_bias"),
    "class_margin_rank": ({"class_margin": torch.ones(5, 1)}, (ValueError, RuntimeError), "class_margin"),
    "class_margin_integer": ({"class_margin": torch.ones(5, dtype=torch.long)}, TypeError, "class_margin"),
    "class_scale_length": ({"class_scale": torch.ones(4)}, ValueError, r"class_scale has shape \[4\], expected \[5\]"),
    "class_scale_list": ({"class_scale": [1.0] * 5}, TypeError, "class_scale"),
    "target_scale_rank": ({"target_scale": torch.ones(5, 1)}, ValueError, "target_scale"),
    "target_scale_of_rows": ({"target_scale": torch.ones(1)}, ValueError, "target_scale"),
    "class_mitigation_integer": ({"class_mitigation": torch.ones(5, dtype=torch.long)}, TypeError, "class_mitigation"),
    "class_mitigation_length": ({"class_mitigation": torch.ones(6)}, ValueError, "class_mitigation"),
    "compensation_negative": ({"compensation": -0.5}, ValueError, "compensation is -0.5, expected"),
    "compensation_nan": ({"compensation": float("nan")}, ValueError, "compensation is nan"),
    "compensation_tensor": ({"compensation": torch.tensor(1.0)}, TypeError, "compensation is a Tensor"),
    "sample_weight_length": ({"sample_weight": torch.ones(3)}, (ValueError, RuntimeError), "sample_weight"),
    "sample_weight_integer": ({"sample_weight": torch.ones(4, dtype=torch.long)}, TypeError, "sample_weight"),
    "scale_string": ({"scale": "big"}, TypeError, "scale"),
    "z_loss_string": ({"z_loss": "a"}, TypeError, "z_loss"),
    "focal_string": ({"focal_gamma": "2"}, TypeError, "focal_gamma"),
}


@pytest.mark.parametrize("case", OPTION_ERRORS)
def test_wrong_option(case: str) -> None:
    options, error, named = OPTION_ERRORS[case]
    with pytest.raises(error, match=named):
        longtail.cross_entropy(X, T, **options)


@pytest.mark.parametrize("option", SOFTMAX_VECTORS)
@pytest.mark.parametrize("gradient", cases.MODES)
def test_constants_that_require_grad_are_refused(option: str, gradient: str) -> None:
    vector = torch.ones(4 if option == "sample_weight" else 5, requires_grad=True)
    x = X.clone().requires_grad_() * 1.0
    with pytest.raises(RuntimeError, match=rf"(?s)(?=.*{option})(?=.*not differentiable)"):
        longtail.cross_entropy(x, T, gradient=gradient, **{option: vector})


@pytest.mark.parametrize(
    "options",
    [
        {"focal_gamma": 2.0},
        {"complement_gamma": -1.0},
        {"class_margin": torch.ones(5)},
        {"target_scale": torch.ones(5)},
        {"class_mitigation": torch.ones(5)},
        {"compensation": 2.0},
        {"return_stats": True},
        {"gradient": "forward"},
        {"gradient": "inplace"},
    ],
    ids=lambda o: "_".join(str(x) for x in next(iter(o.items())) if not isinstance(x, torch.Tensor)),
)
def test_probability_targets_refuse_what_needs_one_class(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        longtail.cross_entropy(X, P, **options)


def test_zero_sized_classes_with_rows_never_crash() -> None:
    with pytest.raises(IndexError):
        longtail.cross_entropy(torch.zeros(3, 0), torch.zeros(3, dtype=torch.long))
    ignored = torch.full((3,), -100)
    assert torch.equal(longtail.cross_entropy(torch.zeros(3, 0), ignored, reduction="none"), torch.zeros(3))
