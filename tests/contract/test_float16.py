"""Promise: float16 gradients neither overflow nor underflow where those of eager float16 do not, in any mode."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import cases
import longtail
from gradient_modes import gradient, sigmoid, softmax
from tolerances import assert_close, assert_same

COUNTS = torch.tensor([900000.0, 60000.0, 3000.0, 12.0])
TAIL = torch.arange(32) % 4
FOCAL = {"focal_gamma": 2.0, "complement_gamma": -1.0, "label_smoothing": 0.1}
# Options under which a gradient that is not divided by the mean's denominator leaves the range of float16.
EXTREMES: dict[str, dict[str, Any]] = {
    "weights_of_a_tail": {"weight": COUNTS.sum() / COUNTS},
    "weights_and_all_options": {"weight": COUNTS.sum() / COUNTS, **FOCAL},
    "huge_sample_weights": {"sample_weight": torch.linspace(1.0, 3e6, 32), "normalizer": 1e6},
    "tiny_weights": {"weight": torch.full((4,), 1e-9)},
    "scale": {"scale": 3e3, "normalizer": 1e5},
    "z_loss": {"z_loss": 1.0, "normalizer": 1e3},
    "sum": {"weight": torch.full((4,), 1e-6), "reduction": "sum"},
    "weights_at_the_bottom": {"weight": torch.full((4,), 1e-36)},
    "none": {"weight": torch.full((4,), 3e4), "reduction": "none"},
}


def _has_mode(shape: str, name: str, mode: str) -> bool:
    """A gradient of the linear loss that is made in forward needs one scalar loss."""
    return shape != "linear" or EXTREMES[name].get("reduction") != "none" or mode == "backward"


@pytest.mark.parametrize(
    ("shape", "name", "mode"),
    [case for case in itertools.product(("rows", "images", "linear"), EXTREMES, cases.MODES) if _has_mode(*case)],
)
def test_float16_gradients_of_extreme_options(shape: str, name: str, mode: str) -> None:
    """As those of float64 but for the roundings of what is stored; upstream as a gradient scaler's."""
    options = EXTREMES[name]
    z = torch.randn(32, 4, generator=cases.generator(5)).half()
    scaler = {"weights_of_a_tail": 1.0, "sum": 1e6, "none": 2.0**-14}.get(name, 64.0)
    grads = []
    for dtype in (torch.float64, torch.float16):
        x, weight, how = z.to(dtype), torch.eye(4, dtype=dtype), mode if dtype == torch.float16 else "backward"
        given = dict(options)
        if shape == "images":
            x = x.view(4, 8, 4).transpose(1, 2).contiguous()
            given |= {k: v.view(4, 8) for k, v in given.items() if k == "sample_weight"}
        x.requires_grad_()
        if shape == "linear":
            loss = longtail.linear_cross_entropy(x, weight, TAIL, gradient=how, **given)
        else:
            target = TAIL if shape == "rows" else TAIL.view(4, 8)
            loss = longtail.cross_entropy(x * 1.0, target, gradient=how, **given)
        grads.append(torch.autograd.grad(loss, x, torch.full_like(loss, scaler))[0].double())
    truth, grad = grads
    assert truth.abs().max() < 65504, "eager float16 has to hold it"
    assert truth.abs().max() > 1e-3
    assert_close(grad.half(), truth, eager=truth.half(), factor=4)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_float16_rows_and_columns_with_a_weight_that_is_not_finite_stand_alone(value: float, mode: str) -> None:
    z, weight = torch.randn(8, 4, generator=cases.generator(5)).half(), torch.ones(4)
    weight[2] = value
    rows = torch.arange(8) % 4 != 2
    with_weight = gradient(softmax(TAIL[:8], weight=weight, reduction="sum"), z, mode)
    assert_same(with_weight[rows], gradient(softmax(TAIL[:8], reduction="sum"), z, "backward")[rows])
    assert not with_weight[~rows].isfinite().all()
    columns = gradient(sigmoid(TAIL[:8], weight=weight, reduction="sum"), z, mode)
    without = gradient(sigmoid(TAIL[:8], reduction="sum"), z, "backward")
    assert_same(columns[:, weight == 1], without[:, weight == 1])
    assert not columns[:, 2].isfinite().any()


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(
    ("name", "elements"),
    [("by_target", False), *itertools.product(("pos_weight", "weight", "gamma", "tiny"), (False, True))],
)
def test_float16_gradients_of_extreme_sigmoid_options(name: str, elements: bool, mode: str) -> None:
    options: dict[str, Any] = {
        "pos_weight": {"pos_weight": COUNTS.sum() / COUNTS, "normalizer": 1e5},
        "weight": {"weight": COUNTS.sum() / COUNTS, "sample_weight": torch.linspace(1.0, 100.0, 32), "normalizer": 1e6},
        "by_target": {"weight": COUNTS.sum() / COUNTS, "class_weight_by_target": True, "normalizer": 1e5},
        "gamma": {"gamma": 5.0, "alpha": 0.25},
        "tiny": {"weight": torch.full((4,), 1e-9), "reduction": "sum"},
    }[name]
    z = torch.randn(32, 4, generator=cases.generator(5)).half()
    target = F.one_hot(TAIL, 4).float() if elements else TAIL
    grads = []
    for dtype, how in ((torch.float64, "backward"), (torch.float16, mode)):
        scaler = 2.0**26 if name == "tiny" else 64.0
        grads.append(gradient(sigmoid(target, **options), z.to(dtype), how, scaler).double())
    truth, grad = grads
    assert 1e-3 < truth.abs().max() < 65504
    assert_close(grad.half(), truth, eager=truth.half(), factor=4)


def test_float16_products_of_the_linear_loss_do_not_overflow() -> None:
    """Before the mean's denominator, 2048 rows of a feature of 500 sum to 1e6."""
    h = torch.randn(2048, 64, generator=cases.generator(0)).half() * 5
    h[:, 3] = 500
    weight = torch.randn(9, 64, generator=cases.generator(1)).half() * 0.01
    target = torch.zeros(2048, dtype=torch.long)
    for mode in ("auto", "backward"):
        x, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        got = torch.autograd.grad(longtail.linear_cross_entropy(x, w, target, gradient=mode), (x, w))
        x, w = h.double().requires_grad_(), weight.double().requires_grad_()
        truth = torch.autograd.grad(F.cross_entropy(x @ w.t(), target), (x, w))
        for actual, expected in zip(got, truth, strict=True):
            assert (actual - expected).norm() < 2.0**-8 * expected.norm()


@pytest.mark.parametrize("accumulate_dtype", [None, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["auto", "backward"])
def test_float16_linear_loss_accumulates_without_overflow(mode: str, accumulate_dtype: torch.dtype | None) -> None:
    h = torch.randn(64, 16, generator=cases.generator(0)).half() * 5
    weight = torch.randn(10, 16, generator=cases.generator(1)).half().requires_grad_()
    target = torch.arange(64) % 10
    loss = longtail.linear_cross_entropy(h, weight, target, gradient=mode, accumulate_dtype=accumulate_dtype)
    (grad,) = torch.autograd.grad(loss, weight)
    wide = weight.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(h.double() @ wide.t(), target), wide)
    assert (grad - truth).norm() < 2.0**-7 * truth.norm()


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_float16_linear_loss_and_gradient_scaler_do_not_underflow(mode: str) -> None:
    """Rare classes of many rows: p / N is far below the least float16."""
    x = torch.randn(512, 16, generator=cases.generator(0)).half()
    weight = torch.randn(200, 16, generator=cases.generator(1)).half() * 0.3
    target = torch.zeros(512, dtype=torch.long)
    grads = []
    for dtype, how in ((torch.float64, "backward"), (torch.float16, mode)):
        w = weight.to(dtype).requires_grad_()
        loss = longtail.linear_cross_entropy(x.to(dtype), w, target, gradient=how)
        grads.append(torch.autograd.grad(loss * 65536, w)[0].double())
    assert (grads[1] - grads[0]).abs().max() < 2.0**-8 * grads[0].abs().max()
    assert (grads[1] - grads[0])[1:].norm() < 2.0**-7 * grads[0][1:].norm()


@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=cases.name)
@pytest.mark.parametrize("mode", ["forward", "inplace"])
@pytest.mark.parametrize("loss", [softmax, sigmoid])
def test_a_kept_gradient_is_the_same_whatever_torchs_default_dtype_is(loss: Any, mode: str, default: Any) -> None:
    """A number of rows is an integer, of which arithmetic with Python's numbers makes that dtype."""
    of = loss(torch.arange(1234) % 5)
    z = torch.randn(1234, 5, generator=cases.generator(7)).half()
    expected = gradient(of, z, mode)
    torch.set_default_dtype(default)
    try:
        assert_same(gradient(of, z, mode), expected)
    finally:
        torch.set_default_dtype(torch.float32)
