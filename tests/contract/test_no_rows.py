"""Promise: nothing to count (no rows, images without pixels) is a loss of 0 with gradients of 0, never an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from interpreted import INTERPRETED

SHAPES = ((0, 4), (0, 4, 3, 2), (2, 4, 0), (2, 4, 0, 3))
CLASS_BALANCED = ("softmax", "softmax_focal", "sigmoid", "focal")
BACKENDS = ("triton",) if INTERPRETED else ("cpu", "reference")
Call = Callable[..., Tensor]


def indices(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(logits.shape[:1] + logits.shape[2:], dtype=dtype)


def elements(logits: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.empty(logits.shape, dtype=dtype or logits.dtype)


def vectors(logits: Tensor) -> dict[str, Tensor]:
    """A weight of each class and of each row."""
    dtype = cases.vector_dtype(logits.dtype)
    return {"weight": torch.rand(4, dtype=dtype), "sample_weight": indices(logits, dtype)}


def softmax(function: Call, dtype: torch.dtype, logits: Tensor, **options: Any) -> Tensor:
    return function(logits, indices(logits, dtype), **options)


def softmax_mixed(logits: Tensor, **options: Any) -> Tensor:
    options |= {"label_smoothing": 0.1, "focal_gamma": 2.0, "z_loss": 1e-3, "softcap": 30.0, "return_stats": True}
    loss, stats = longtail.cross_entropy(logits, indices(logits, torch.int64), **vectors(logits), **options)
    assert all(value.shape == indices(logits, torch.int64).shape for value in stats)
    return loss


def probabilities(logits: Tensor, **options: Any) -> Tensor:
    options["gradient"] = "backward"  # the only one
    return longtail.cross_entropy(logits, elements(logits, None), class_bias=torch.rand(4).to(logits.dtype), **options)


def sigmoid(function: Call, kind: Callable[..., Tensor], dtype: torch.dtype | None, logits: Tensor, **o: Any) -> Tensor:
    if "normalizer" in o:
        o["normalizer"] = "rows"
    return function(logits, kind(logits, dtype), **o)


def sigmoid_weighted(logits: Tensor, **options: Any) -> Tensor:
    options |= {"weight": vectors(logits)["weight"], "pos_weight": torch.rand(4), "class_weight_by_target": True}
    return sigmoid(longtail.sigmoid_focal_loss, indices, torch.int64, logits, **options)


def element_weighted(logits: Tensor, **options: Any) -> Tensor:
    weight = torch.rand(logits.shape[:1] + (1,) * (logits.dim() - 1))
    return sigmoid(longtail.sigmoid_cross_entropy, elements, None, logits, weight=weight, ignore_index=-1, **options)


def class_balanced(loss: str, logits: Tensor, **options: Any) -> Tensor:
    options.pop("normalizer", None)  # "rows" is the default
    return longtail.class_balanced_loss(logits, indices(logits, torch.int64), [4, 3, 2, 1], 0.9, loss, **options)


CALLS: dict[str, Call] = {
    "cross_entropy": partial(softmax, longtail.cross_entropy, torch.int64),
    "cross_entropy, uint8": partial(softmax, longtail.cross_entropy, torch.uint8),
    "cross_entropy, everything": softmax_mixed,
    "cross_entropy, probabilities": probabilities,
    "focal": partial(softmax, longtail.focal_loss, torch.int64),
    "complement_cross_entropy": partial(softmax, longtail.complement_cross_entropy, torch.int64),
    "complement_entropy": partial(softmax, longtail.complement_entropy, torch.int64),
    "zlpr": partial(softmax, longtail.zlpr_loss, torch.int64),
    "two_way": partial(softmax, longtail.two_way_loss, torch.int64),
    "sigmoid_focal, classes": partial(sigmoid, longtail.sigmoid_focal_loss, indices, torch.int64),
    "sigmoid_focal, uint8": partial(sigmoid, longtail.sigmoid_focal_loss, indices, torch.uint8),
    "sigmoid_focal, elements": partial(sigmoid, longtail.sigmoid_focal_loss, elements, None),
    "sigmoid_focal, bool": partial(sigmoid, longtail.sigmoid_focal_loss, elements, torch.bool),
    "sigmoid_focal, int64 elements": partial(sigmoid, longtail.sigmoid_focal_loss, elements, torch.int64),
    "sigmoid_focal, weighted by class": sigmoid_weighted,
    "sigmoid_cross_entropy": partial(sigmoid, longtail.sigmoid_cross_entropy, elements, None),
    "sigmoid_cross_entropy, weighted": element_weighted,
    "binary_focal": partial(sigmoid, longtail.binary_focal_loss, elements, None),
    **{f"class_balanced, {loss}": partial(class_balanced, loss) for loss in CLASS_BALANCED},
}


def check(call: Call, dtype: torch.dtype, shape: tuple[int, ...], options: dict[str, Any], zero: bool) -> None:
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    loss = call(x * 1.0, **options)
    assert loss.dtype == cases.vector_dtype(dtype)
    if options["reduction"] == "none":
        assert loss.numel() == 0
    else:
        assert loss.item() == 0 if zero else loss.isnan()
    loss.backward(torch.full_like(loss, 0.7))
    assert (x.grad.shape, x.grad.dtype) == (x.shape, dtype)
    with torch.no_grad():
        assert torch.equal(call(x, **options).isnan(), loss.isnan())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_to_count(name: str, mode: str, backend: str) -> None:
    with longtail.use_backend(backend):
        for dtype in cases.DTYPES:
            for shape in SHAPES:
                for reduction in ("none", "sum", "mean"):
                    zero = reduction == "sum" or name.startswith("class_balanced")
                    check(CALLS[name], dtype, shape, {"gradient": mode, "reduction": reduction}, zero)
                check(CALLS[name], dtype, shape, {"gradient": mode, "reduction": "mean", "normalizer": "count"}, True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [(4,), (4, 3)])
@pytest.mark.parametrize("mode", ["auto", *cases.MODES])
def test_linear(mode: str, classes: tuple[int, ...], backend: str) -> None:
    for dtype in cases.DTYPES:
        for options in ({"reduction": "sum"}, {"normalizer": "count"}, {"normalizer": 3.0}, {"reduction": "none"}):
            if mode in ("forward", "inplace") and options.get("reduction") == "none":
                continue
            shapes = ((0, 5), (*classes, 5), classes)
            data = [torch.rand(shape, dtype=dtype, requires_grad=True) for shape in shapes]
            target = torch.empty(0, *classes[1:], dtype=torch.int64)
            with longtail.use_backend(backend):
                loss = longtail.linear_cross_entropy(
                    *(data[0], data[1], target), linear_bias=data[2], gradient=mode, **options
                )
                loss.sum().backward()
            assert loss.sum() == 0
            for tensor in data:
                assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", BACKENDS)
def test_neither_rows_nor_classes(backend: str) -> None:
    x, none = torch.empty(0, 0, requires_grad=True), torch.empty(0, dtype=torch.int64)
    with longtail.use_backend(backend):
        assert longtail.cross_entropy(x, none, torch.empty(0), reduction="sum") == 0
        for by_target in (False, True):
            options: dict[str, Any] = {"weight": torch.empty(0), "class_weight_by_target": by_target}
            assert longtail.sigmoid_focal_loss(x, none, reduction="sum", **options) == 0


def test_the_module_of_a_rank_without_rows() -> None:
    """Under DDP an error on one rank hangs the others."""
    for loss in CLASS_BALANCED:
        x = torch.empty(0, 4, requires_grad=True)
        value = longtail.ClassBalancedLoss([4, 3, 2, 1], 0.9, loss)(x, torch.empty(0, dtype=torch.int64))
        value.backward()
        assert value == 0
