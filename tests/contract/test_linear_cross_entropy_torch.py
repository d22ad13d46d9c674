"""Promise: with torch's arguments, what `F.linear_cross_entropy` gives: values, gradients, shapes, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from tolerances import assert_close

pytestmark = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no such function")

# name -> shapes of input, weight and target; targets of floats are class probabilities
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]] = {
    "row": ((6,), (5, 6), (), False),
    "rows": ((9, 6), (5, 6), (9,), False),
    "k1": ((9, 6), (5, 4, 6), (9, 4), False),
    "k2": ((3, 6), (5, 4, 2, 6), (3, 4, 2), False),
    "row_probabilities": ((6,), (5, 6), (5,), True),
    "probabilities": ((9, 6), (5, 6), (9, 5), True),
    "k2_probabilities": ((3, 6), (5, 4, 2, 6), (3, 5, 4, 2), True),
}


def data_of(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, weight_shape, target_shape, probabilities = SHAPES[name]
    g = cases.generator(0)
    x, weight, bias = (torch.randn(s, generator=g).to(dtype) for s in (shape, weight_shape, weight_shape[:-1]))
    if probabilities:
        target = torch.rand(target_shape, generator=g).softmax(-1 if len(target_shape) == 1 else 1).to(dtype)
    else:
        target = torch.randint(5, target_shape, generator=g)
    return x, weight, bias, target


ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": torch.tensor([0.5, 1.0, 2.0, 0.1, 1.5])},
    "smoothing": {"label_smoothing": 0.2},
    "smoothing_weight": {"label_smoothing": 0.2, "weight": torch.tensor([0.5, 1.0, 2.0, 0.1, 1.5])},
    "ignore_index": {"ignore_index": 2},
}


# Torch refuses an ignore_index with class probabilities, and so do we.
CASES = [(s, a) for s in SHAPES for a in ARGUMENTS if not (SHAPES[s][3] and a == "ignore_index")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(("shape", "arguments"), CASES)
def test_equals_torch(shape: str, arguments: str, reduction: str, dtype: torch.dtype) -> None:
    data = data_of(shape, dtype)
    options = dict(ARGUMENTS[arguments], reduction=reduction)
    results = {}
    for function, kind in (
        (longtail.linear_cross_entropy, dtype),
        (F.linear_cross_entropy, torch.float64),
        (F.linear_cross_entropy, dtype),
    ):
        weight = options.get("weight")
        exact = options if weight is None else {**options, "weight": weight.to(kind)}
        x, w, b = (t.to(kind).detach().requires_grad_() for t in data[:3])
        target = data[3].to(kind) if data[3].is_floating_point() else data[3]
        loss = function(x, w, target, linear_bias=b, **exact)
        up = torch.randn(loss.shape, generator=cases.generator(5), dtype=torch.float64).to(dtype).to(loss.dtype)
        results[function, kind] = [loss, *torch.autograd.grad(loss, (x, w, b), up)]
    ours = results.pop((longtail.linear_cross_entropy, dtype))
    eager = results.get((F.linear_cross_entropy, dtype))
    true = results[F.linear_cross_entropy, torch.float64]
    for results in zip(ours, true, eager, strict=True):
        assert results[0].shape == results[1].shape
        got, want, same = (t.detach().reshape(1, -1) for t in results)
        # A single row's loss may be right by luck in eager bfloat16.
        assert_close(got, want, same, factor=4 if dtype == torch.bfloat16 else 2)


def test_gradient_of_probabilities() -> None:
    x, weight, _, target = data_of("probabilities", torch.float64)
    grads = [
        torch.autograd.grad(function(x, weight, p), p)[0]
        for function, p in (
            (longtail.linear_cross_entropy, target.clone().requires_grad_()),
            (F.linear_cross_entropy, target.clone().requires_grad_()),
        )
    ]
    assert_close(*grads)


X, W, T = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 4, 2])
P = torch.rand(4, 5).softmax(1)

ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "input_rank": ((torch.randn(2, 4, 3), W, T), {}),
    "input_scalar": ((torch.tensor(1.0), W, T), {}),
    "weight_rank": ((X, torch.randn(3), T), {}),
    "features": ((X, torch.randn(5, 4), T), {}),
    "bias_shape": ((X, W, T), {"linear_bias": torch.randn(4)}),
    "bias_rank": ((X, W, T), {"linear_bias": torch.randn(1, 5)}),
    "probabilities_ignore_index": ((X, W, P), {"ignore_index": 0}),
    "unbatched_k": ((X[0], torch.randn(5, 2, 3), torch.zeros(2, dtype=torch.long)), {}),
    "target_rows": ((X, W, T[:3]), {}),
    "target_rank": ((X, W, T[None]), {}),
    "target_of_k": ((X, torch.randn(5, 2, 3), T), {}),
    "target_bool": ((X, W, T.bool()), {}),
    "target_float": ((X, W, T.float()), {}),
    "target_out_of_bounds": ((X, W, torch.tensor([0, 1, 5, 2])), {}),
    "target_negative": ((X, W, torch.tensor([0, -1, 4, 2])), {"reduction": "none"}),
    "input_integer": ((X.long(), W, T), {}),
    "input_list": ((X.tolist(), W, T), {}),
    "weight_list": ((X, W.tolist(), T), {}),
    "mixed_dtypes": ((X, W.double(), T), {}),
    "bias_dtype": ((X, W, T), {"linear_bias": torch.zeros(5, dtype=torch.float64)}),
    "reduction": ((X, W, T), {"reduction": "average"}),
    "smoothing": ((X, W, T), {"label_smoothing": 1.5}),
    "class_weight_length": ((X, W, T), {"weight": torch.ones(4)}),
    "class_weight_rank": ((X, W, T), {"weight": torch.ones(5, 1)}),
    "ignore_index_string": ((X, W, T), {"ignore_index": "a"}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_same_error_class_as_torch(case: str) -> None:
    args, kwargs = ERRORS[case]
    with pytest.raises(Exception) as torchs:  # noqa: PT011
        F.linear_cross_entropy(*args, **kwargs)
    # For what is no tensor torch happens to raise AttributeError.
    expected = TypeError if torchs.type is AttributeError else torchs.type
    with pytest.raises(expected) as ours:
        longtail.linear_cross_entropy(*args, **kwargs)
    assert len(str(ours.value)) > 10, "an error says what is wrong"


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("grad", [False, True])
def test_out_of_range_target_names_its_row(grad: bool, reduction: str) -> None:
    x, target = torch.randn(40, 3).requires_grad_(grad), torch.zeros(40, dtype=torch.long)
    target[37] = 9
    with pytest.raises(IndexError, match=r"target 9 in row 37\b"):
        longtail.linear_cross_entropy(x, W, target, chunk_size=6, reduction=reduction)


OPTION_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "chunk_size_zero": ({"chunk_size": 0}, ValueError, "chunk_size"),
    "chunk_size_float": ({"chunk_size": 2.0}, TypeError, "chunk_size"),
    "accumulate_narrow": ({"accumulate_dtype": torch.bfloat16}, ValueError, "accumulate_dtype"),
    "accumulate_integer": ({"accumulate_dtype": torch.int64}, ValueError, "accumulate_dtype"),
    "accumulate_string": ({"accumulate_dtype": "float32"}, TypeError, "accumulate_dtype"),
    "gradient": ({"gradient": "sideways"}, ValueError, "sideways"),
    "forward_none": ({"gradient": "forward", "reduction": "none"}, ValueError, "reduction"),
    "focal_negative": ({"focal_gamma": -1.0}, ValueError, "focal_gamma"),
    "class_bias": ({"class_bias": torch.ones(3)}, ValueError, "class_bias"),
    "sample_weight": ({"sample_weight": torch.ones(3)}, ValueError, "sample_weight"),
    "normalizer": ({"normalizer": "count", "reduction": "sum"}, ValueError, "normalizer"),
    "weight_grad": ({"weight": torch.ones(5, requires_grad=True)}, ValueError, "not differentiable"),
}


@pytest.mark.parametrize("case", OPTION_ERRORS)
def test_wrong_option(case: str) -> None:
    options, error, named = OPTION_ERRORS[case]
    with pytest.raises(error, match=named):
        longtail.linear_cross_entropy(X, W, T, **options)


def test_probabilities_refuse_what_needs_one_class() -> None:
    for options in ({"focal_gamma": 2.0}, {"complement_gamma": -1.0}, {"return_stats": True}, {"gradient": "forward"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            longtail.linear_cross_entropy(X, W, P, **options)


def test_options_of_k_dimensional_targets() -> None:
    x, weight, bias, target = data_of("k2", torch.float64)
    options = cases.options("mixed", 5, target, torch.float64)
    loss, stats = longtail.linear_cross_entropy(x, weight, target, linear_bias=bias, return_stats=True, **options)
    logits = F.linear(x, weight.flatten(0, -2), bias.flatten()).reshape(3, 5, 4, 2)
    assert_close(loss, longtail.cross_entropy(logits, target, **options))
    assert stats.lse.shape == target.shape
