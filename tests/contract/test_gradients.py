"""Promise: right first derivatives in every gradient mode, second ones refused, safe overwriting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from tolerances import assert_close, assert_same

TWICE = r"(?i)twice|second|double|once"


def gradient(
    logits: Tensor, target: Tensor, upstream: Tensor | None, mode: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the logits) through a non-leaf, so that every mode may be asked for."""
    x = logits.detach().clone().requires_grad_()
    loss = longtail.cross_entropy(x * 1.0, target, gradient=mode, **options)
    (grad,) = torch.autograd.grad(loss, x, upstream)
    return loss.detach(), grad


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("option_set", cases.DERIVED_SETS)
def test_gradcheck(option_set: str, reduction: str) -> None:
    """The default mode, through the compiled CPU kernel in float64."""
    logits, target = cases.random_case(5, 6, torch.float64, spread=1.5)
    options = cases.options(option_set, 6, target, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: longtail.cross_entropy(x, target, reduction=reduction, **options), logits.requires_grad_()
    )


@pytest.mark.parametrize("mode", ["forward", "inplace"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("option_set", cases.DERIVED_SETS)
def test_finite_differences(option_set: str, reduction: str, mode: str) -> None:
    """The modes whose graph may be used only once, against central differences of the value."""
    logits, target = cases.random_case(4, 5, torch.float64, spread=1.5)
    options = cases.options(option_set, 5, target, torch.float64)
    shape = target.shape if reduction == "none" else ()
    up = torch.randn(shape, generator=cases.generator(1), dtype=torch.float64)
    _, grad = gradient(logits, target, up, mode, reduction=reduction, **options)
    expected = torch.empty_like(logits)
    for i in range(logits.numel()):
        step = torch.zeros(logits.numel(), dtype=torch.float64)
        step[i] = 1e-5
        values = [
            longtail.cross_entropy(logits + s * step.view_as(logits), target, reduction=reduction, **options)
            for s in (1, -1)
        ]
        expected.view(-1)[i] = ((values[0] - values[1]) * up).sum() / 2e-5
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("upstream", ["random", "stride0", "strided", "one"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", ["nc", "ncd"])
def test_modes_agree(shape: str, reduction: str, upstream: str, dtype: torch.dtype) -> None:
    size = cases.SHAPES[shape]
    logits = torch.randn(size, generator=cases.generator(1)).to(dtype)
    target = torch.randint(5, (size[0], *size[2:]), generator=cases.generator(2))
    target.view(-1)[1] = cases.IGNORE
    options = cases.options("mixed", 5, target, dtype)
    wide = cases.vector_dtype(dtype)
    if upstream == "one":
        up = torch.ones((), dtype=wide).expand(target.shape if reduction == "none" else ())
    else:
        up = cases.upstreams(target.shape if reduction == "none" else (), wide)[upstream]
    loss, grad = gradient(logits, target, up, "backward", reduction=reduction, **options)
    assert grad.abs().max() > 0
    for mode in ("forward", "inplace"):
        other_loss, other = gradient(logits, target, up, mode, reduction=reduction, **options)
        assert other.dtype == dtype
        assert_close(other_loss, loss.double(), what=f"{mode} loss")
        assert_close(other, grad.double(), what=f"{mode} gradient", factor=3)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_modes_of_every_layout(layout: str, mode: str) -> None:
    values, target = cases.random_case(6, 17)
    values = cases.LAYOUTS[layout](values)
    up = cases.upstreams((6,), torch.float32)["random"]
    x = values.detach().requires_grad_()
    view = x if layout == "expanded" and mode == "backward" else cases.LAYOUTS[layout](x * 1.0)
    loss = longtail.cross_entropy(view, target, reduction="none", gradient=mode, label_smoothing=0.1)
    (grad,) = torch.autograd.grad(loss, x, up)
    y = values.detach().clone().requires_grad_()
    expanded = y if layout != "expanded" or mode == "backward" else y[:1].expand(6, 17)
    expected = torch.nn.functional.cross_entropy(expanded, target, reduction="none", label_smoothing=0.1)
    assert_close(grad, torch.autograd.grad(expected, y, up)[0].double(), what="gradient", factor=3)


@pytest.mark.parametrize("mode", ["backward", "forward"])
def test_leaf_logits(mode: str) -> None:
    logits, target = cases.random_case(6, 9)
    leaf = logits.clone().requires_grad_()
    (longtail.cross_entropy(leaf, target, gradient=mode) * 2.5).backward()
    assert_same(leaf.detach(), logits)
    _, expected = gradient(logits, target, torch.tensor(2.5), "backward")
    assert_close(leaf.grad, expected.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
def test_inplace_writes_the_gradient_over_the_logits(dtype: torch.dtype) -> None:
    logits, target = cases.random_case(6, 40, dtype)
    x = logits.clone().requires_grad_() * 1.0
    version = x._version
    loss = longtail.cross_entropy(x, target, reduction="sum", gradient="inplace")
    assert x._version > version
    (grad,) = torch.autograd.grad(loss, x, torch.tensor(-0.25))
    assert grad.data_ptr() == x.data_ptr(), "no second [N, C] buffer"
    _, expected = gradient(logits, target, torch.tensor(-0.25), "backward", reduction="sum")
    assert_close(grad, expected.double(), factor=3)


def test_using_overwritten_logits_raises() -> None:
    logits, target = cases.random_case(6, 9)
    x = logits.clone().requires_grad_() * 1.0
    square = x * x  # keeps x for its backward
    loss = longtail.cross_entropy(x, target, gradient="inplace")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + square.sum()).backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mode", ["forward", "inplace"])
def test_second_backward_raises(mode: str, reduction: str) -> None:
    logits, target = cases.random_case(6, 9)
    x = logits.clone().requires_grad_()
    loss = longtail.cross_entropy(x * 1.0, target, reduction=reduction, gradient=mode)
    up = torch.tensor(1.5).expand(loss.shape)
    loss.backward(up, retain_graph=True)
    first = x.grad.clone()
    with pytest.raises(RuntimeError, match=r"gradient="):
        loss.backward(up)
    assert_same(x.grad, first, "a refused backward adds nothing")


def test_second_backward_of_the_default_mode_accumulates() -> None:
    logits, target = cases.random_case(6, 9, torch.float64)
    x = logits.clone().requires_grad_()
    loss = longtail.cross_entropy(x, target, complement_gamma=-1.0)
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    (loss * 3).backward()
    assert_close(x.grad, first * 4)


@pytest.mark.parametrize("mode", cases.MODES)
def test_second_derivative_is_refused(mode: str) -> None:
    logits, target = cases.random_case(4, 5, torch.float64)
    x = logits.requires_grad_()
    up = torch.rand(4, generator=cases.generator(0), dtype=torch.float64).requires_grad_()
    loss = longtail.cross_entropy(x * 1.0, target, reduction="none", gradient=mode)
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(loss, x, up, create_graph=True)[0].square().sum().backward()


@pytest.mark.parametrize("mode", cases.MODES)
def test_second_derivative_by_func_is_refused(mode: str) -> None:
    """Nested `torch.func.grad` too: an error, not zeros."""
    logits, target = cases.random_case(4, 5, torch.float64)

    def first(z: Tensor) -> Tensor:
        return torch.func.grad(lambda y: longtail.cross_entropy(y * 1.0, target, gradient=mode))(z)

    with pytest.raises(RuntimeError, match=TWICE):
        torch.func.grad(lambda z: first(z).square().sum())(logits)


@pytest.mark.parametrize("mode", cases.MODES)
def test_forward_mode_differentiation_is_refused(mode: str) -> None:
    logits, target = cases.random_case(4, 5, torch.float64)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda z: longtail.cross_entropy(z * 1.0, target, gradient=mode), (logits,), (logits.cos(),))
    dual_level = torch.autograd.forward_ad.dual_level
    with dual_level(), pytest.raises(NotImplementedError, match="jvp"):  # never a loss that has lost its tangent
        longtail.cross_entropy(torch.autograd.forward_ad.make_dual(logits, logits.cos()), target, gradient=mode)
    soft = logits.softmax(1)
    with dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        longtail.cross_entropy(logits, torch.autograd.forward_ad.make_dual(soft, logits.cos()))


@pytest.mark.parametrize("option_set", ["plain", "smoothing_weight", "focal", "complement", "mixed"])
def test_second_derivative_by_the_reference(option_set: str) -> None:
    logits, target = cases.random_case(3, 4, torch.float64, spread=1.0)
    options = cases.options(option_set, 4, target, torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x: longtail.reference.softmax_loss(x, target, **options), logits.requires_grad_()
    )


@pytest.mark.parametrize("mode", cases.MODES)
def test_value_without_gradient(mode: str) -> None:
    logits, target = cases.random_case(6, 9)
    expected = torch.nn.functional.cross_entropy(logits.double(), target)
    with torch.no_grad():
        loss = longtail.cross_entropy(logits.clone().requires_grad_() * 1.0, target, gradient=mode)
    assert not loss.requires_grad
    assert_close(loss, expected)


@pytest.mark.parametrize("mode", cases.MODES)
def test_float16_mean_and_gradient_scaler_do_not_underflow(mode: str) -> None:
    """1/N folded into float16 would leave p / N = 1e-3 / 4096 two bits, before the scaler could help."""
    logits, target = cases.random_case(4096, 10, torch.float16, ignore=False, spread=1.0)
    _, grad = gradient(logits, target, torch.tensor(65536.0), mode)
    _, true = gradient(logits.double(), target, torch.tensor(65536.0).double(), "backward")
    visible = true.abs() > 1e-4 * 65536 / 4096
    assert visible.float().mean() > 0.99
    assert grad.isfinite().all()
    relative = ((grad.double() - true) / true)[visible].abs().max()
    assert relative < 1.2 * 2.0**-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=cases.name)
@pytest.mark.parametrize(
    "option_set",
    ["plain", "weight", "smoothing_weight", "focal", "complement_up", "class_margin", "target_scale", "seesaw"],
)
@pytest.mark.parametrize("margin", [0.0, 20.0, 1e4])
def test_row_gradients_sum_to_zero(option_set: str, margin: float, dtype: torch.dtype) -> None:
    logits, target = cases.margin_case(margin, 300, dtype, rows=4)
    options = cases.options(option_set, 300, target, dtype)
    _, grad = gradient(logits, target, torch.rand(4, dtype=dtype) + 0.5, "backward", reduction="none", **options)
    size = grad.double().abs().sum(1)
    assert (size > 0).any()
    assert (grad.double().sum(1).abs() <= 300 * torch.finfo(dtype).eps * size.clamp(min=1e-3)).all()
