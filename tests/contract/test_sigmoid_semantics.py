"""Promise: ignored rows, normalizers, empty batches, layouts and gradient modes of the sigmoid family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
import sigmoid_cases
from tolerances import assert_close, assert_same

TWICE = r"(?i)twice|second|double|once"


def gradient(logits: Tensor, target: Tensor, up: Tensor | None, mode: str, **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient) through a non-leaf, so that every mode may be asked for."""
    x = logits.detach().clone().requires_grad_()
    loss = longtail.sigmoid_focal_loss(x * 1.0, target, gradient=mode, **options)
    return loss.detach(), torch.autograd.grad(loss, x, up)[0]


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("reduction", ["none", "rows", "sum", "mean"])
@pytest.mark.parametrize("shape", [(5, 9), (2, 6, 4)])
def test_ignored_rows(shape: tuple[int, ...], reduction: str, mode: str) -> None:
    logits, target = sigmoid_cases.random_case(shape, "class")
    ignored = target == cases.IGNORE
    bad = torch.where(ignored.unsqueeze(1), torch.tensor(torch.nan), logits)
    options = {"weight": torch.rand(shape[1]), "sample_weight": torch.rand(target.shape), "reduction": reduction}
    up = torch.randn({"none": shape, "rows": target.shape}.get(reduction, ()), generator=cases.generator(1))
    loss, grad = gradient(bad, target, up, mode, **options)
    clean_loss, clean_grad = gradient(logits, target, up, mode, **options)
    assert_same(loss, clean_loss)
    assert_same(grad, clean_grad)
    everywhere = ignored.unsqueeze(1).expand_as(grad)
    assert torch.equal(grad[everywhere], torch.zeros_like(grad[everywhere]))
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["class", "hard"])
def test_upstream_gradients_show_at_saturated_elements_but_not_at_ignored_ones(kind: str, backend: str) -> None:
    logits = torch.full((2, 3), 1e4)
    target = torch.tensor([0, cases.IGNORE])
    if kind == "hard":
        target = torch.tensor([[1.0, 1.0, 1.0], [cases.IGNORE] * 3])
    up = torch.tensor([[torch.inf, 1.0, torch.nan], [torch.inf, 1.0, torch.nan]])
    with longtail.use_backend(backend):
        _, grad = gradient(logits, target, up, "backward", ignore_index=cases.IGNORE)
    assert grad[0, 0].isnan()
    assert grad[0, 2].isnan()
    assert torch.equal(grad[1], torch.zeros(3))


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_ignored_elements(kind: str, mode: str) -> None:
    logits, target = sigmoid_cases.random_case((5, 40), kind)
    ignored = target == cases.IGNORE
    bad = logits.masked_fill(ignored, torch.inf)
    up = torch.randn(5, 40, generator=cases.generator(1))
    loss, grad = gradient(bad, target, up, mode, ignore_index=cases.IGNORE)
    assert torch.equal(loss[ignored], torch.zeros_like(loss[ignored]))
    assert torch.equal(grad[ignored], torch.zeros_like(grad[ignored]))
    other_loss, other_grad = gradient(logits, target.masked_fill(ignored, 1.0), up, mode)
    assert_same(loss[~ignored], other_loss[~ignored])
    assert_same(grad[~ignored], other_grad[~ignored])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", ["mean", "sum", "rows", "none"])
@pytest.mark.parametrize("mode", cases.MODES)
def test_weights_of_ignored_elements(mode: str, reduction: str, value: float) -> None:
    logits, target = torch.randn(4, 3, generator=cases.generator(0)), torch.ones(4, 3)
    target[1] = cases.IGNORE
    results = []
    for weight in (torch.tensor([[1.0], [value], [2.0], [0.5]]), torch.tensor([[1.0], [1.0], [2.0], [0.5]])):
        x = logits.clone().requires_grad_()
        loss = longtail.sigmoid_cross_entropy(
            x * 1.0, target, weight, reduction=reduction, ignore_index=cases.IGNORE, gradient=mode
        )
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), x)])
    for got, expected in zip(*results, strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)])
def test_normalizers(shape: tuple[int, ...], kind: str, mode: str) -> None:
    logits, target = sigmoid_cases.random_case(shape, kind, torch.float64)
    counted = target != cases.IGNORE
    rows = counted.sum() if kind == "class" else shape[0] * (shape[2] if len(shape) == 3 else 1)
    elements = counted.sum() * (shape[1] if kind == "class" else 1)
    positives = counted.sum() if kind == "class" else target[counted].sum()
    up = torch.tensor(-1.3, dtype=torch.float64)
    total, total_grad = gradient(logits, target, up, "backward", reduction="sum", ignore_index=cases.IGNORE)
    for normalizer, divisor in (
        (None, elements),
        ("elements", elements),
        ("rows", rows),
        ("positives", positives),
        (7, 7),
        (torch.tensor(2.5), 2.5),
    ):
        options = {"reduction": "mean", "normalizer": normalizer, "ignore_index": cases.IGNORE}
        loss, grad = gradient(logits, target, up, mode, **options)
        assert_close(loss, total / divisor, what=str(normalizer))
        assert_close(grad, total_grad / divisor, what=str(normalizer), factor=10)


@pytest.mark.parametrize("mode", cases.MODES)
def test_no_positives(mode: str) -> None:
    """An image without objects: the denominator is 1, not 0."""
    logits = torch.randn(4, 5, generator=cases.generator(0))
    options = {"reduction": "mean", "normalizer": "positives"}
    up = torch.tensor(0.7)
    loss, grad = gradient(logits, torch.zeros(4, 5), up, mode, **options)
    total, total_grad = gradient(logits, torch.zeros(4, 5), up, "backward", reduction="sum")
    assert_close(loss, total.double())
    assert_close(grad, total_grad.double())


@pytest.mark.parametrize("mode", cases.MODES)
def test_nothing_counts(mode: str) -> None:
    logits, target = torch.full((3, 4), torch.nan), torch.full((3,), cases.IGNORE)
    for normalizer, expected in ((None, torch.nan), ("elements", torch.nan), ("rows", 0.0), ("positives", 0.0)):
        loss, grad = gradient(logits, target, None, mode, reduction="mean", normalizer=normalizer)
        assert loss.isnan() if expected != 0 else loss.item() == 0.0
        assert torch.equal(grad, torch.zeros(3, 4))


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0,), (0, 5, 3), (2, 5, 0), (4, 0, 3), (4, 0, 0), (0, 1)])
def test_empty(shape: tuple[int, ...], mode: str) -> None:
    x = torch.zeros(shape, requires_grad=True)
    for reduction in ("none", "sum", "mean"):
        loss = longtail.sigmoid_focal_loss(x * 1.0, torch.zeros(shape), reduction=reduction, gradient=mode)
        assert loss.shape == (shape if reduction == "none" else ())
        assert loss.isnan() if reduction == "mean" else loss.sum() == 0
        assert torch.autograd.grad(loss.sum(), x)[0].shape == shape
    if len(shape) > 1:
        ignored = torch.full((shape[0], *shape[2:]), cases.IGNORE)
        assert longtail.sigmoid_focal_loss(x, ignored, reduction="sum").item() == 0


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (4, 0, 3)])
def test_empty_images_where_they_become_rows(shape: tuple[int, ...]) -> None:
    with longtail.use_backend("reference"):
        x = torch.zeros(shape, requires_grad=True)
        loss = longtail.sigmoid_focal_loss(x, torch.zeros(shape), reduction="rows")
        assert torch.equal(loss, torch.zeros(shape[0], shape[2]))
        assert torch.autograd.grad(loss.sum(), x)[0].shape == shape


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(layout: str, kind: str, mode: str) -> None:
    logits, target = sigmoid_cases.random_case((6, 17), kind)
    if layout == "expanded":
        logits, target = logits[:1].expand(6, 17), target[:1].expand(target.shape)
    lay = cases.LAYOUTS[layout]
    up = torch.randn(6, 17, generator=cases.generator(2))
    options = {"ignore_index": cases.IGNORE}
    expected = gradient(logits.contiguous(), target.contiguous(), up, "backward", **options)
    x = logits.contiguous().requires_grad_()
    y = target if kind == "class" else lay(target)
    loss = longtail.sigmoid_focal_loss(lay(x * 1.0), y, gradient=mode, **options)
    assert_close(loss, expected[0].double())
    if layout != "expanded":
        assert_close(torch.autograd.grad(loss, x, up)[0], expected[1].double())


@pytest.mark.parametrize("reduction", ["none", "rows", "sum", "mean"])
@pytest.mark.parametrize(
    ("kind", "option_set"),
    [
        (kind, name)
        for kind in sigmoid_cases.TARGETS
        for name in sigmoid_cases.sets_for(kind)
        if name != "asymmetric"  # its gradient is meant to be none of its loss
    ],
)
def test_gradcheck(kind: str, option_set: str, reduction: str) -> None:
    """In float64 through the compiled CPU kernel."""
    for shape in ((4, 5), (2, 3, 3)):
        logits, target = sigmoid_cases.random_case(shape, kind, torch.float64)
        options = {**sigmoid_cases.options(option_set, logits), "reduction": reduction}
        assert torch.autograd.gradcheck(
            lambda x, t=target, o=options: longtail.sigmoid_focal_loss(x, t, **o), logits.requires_grad_()
        )


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("reduction", ["none", "rows", "sum", "mean"])
@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
def test_modes_agree(kind: str, reduction: str, dtype: torch.dtype) -> None:
    for shape in ((6, 21), (2, 5, 7)):
        logits, target = sigmoid_cases.random_case(shape, kind, dtype)
        options = {**sigmoid_cases.options("mixed", logits), "reduction": reduction}
        rows = (shape[0], *shape[2:])
        size = {"none": shape, "rows": rows}.get(reduction, ())
        for up in cases.upstreams(size, cases.vector_dtype(dtype)).values():
            loss, grad = gradient(logits, target, up, "backward", **options)
            for mode in ("forward", "inplace"):
                other_loss, other = gradient(logits, target, up, mode, **options)
                assert_close(other_loss, loss.double(), what=f"{mode} loss")
                assert_close(other, grad.double(), what=f"{mode} gradient", factor=3)


def test_inplace_writes_the_gradient_over_the_logits() -> None:
    logits, target = sigmoid_cases.random_case((2, 5, 4, 3), "class")
    x = logits.clone().requires_grad_() * 1.0
    version = x._version
    loss = longtail.sigmoid_focal_loss(x, target, reduction="sum", gradient="inplace")
    assert x._version > version
    (grad,) = torch.autograd.grad(loss, x, torch.tensor(-0.25))
    assert grad.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("mode", cases.MODES)
def test_second_derivative_is_refused(mode: str) -> None:
    logits, target = sigmoid_cases.random_case((4, 5), "class", torch.float64)
    x = logits.requires_grad_()
    loss = longtail.sigmoid_focal_loss(x * 1.0, target, reduction="rows", gradient=mode)
    up = torch.rand(4, dtype=torch.float64).requires_grad_()
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(loss, x, up, create_graph=True)[0].square().sum().backward()


@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
def test_second_derivative_by_the_reference(kind: str) -> None:
    logits, target = sigmoid_cases.random_case((3, 4), kind, torch.float64, spread=1.0)
    options = sigmoid_cases.options("mixed", logits)
    assert torch.autograd.gradgradcheck(
        lambda x: longtail.reference.sigmoid_loss(x, target, **options), logits.requires_grad_()
    )


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("kind", ["class", "soft"])
def test_compiled_and_functional(kind: str, mode: str) -> None:
    logits, target = sigmoid_cases.random_case((6, 9), kind)
    options = {**sigmoid_cases.options("mixed", logits), "reduction": "mean", "gradient": mode}

    def loss(z: Tensor) -> Tensor:
        return longtail.sigmoid_focal_loss(z * 1.0, target, **options) * 1.5

    x = logits.clone().requires_grad_()
    expected = loss(x)
    expected.backward()
    grad, value = torch.func.grad_and_value(loss)(logits)
    assert_close(value, expected.detach().double())
    assert_close(grad, x.grad.double())
    torch._dynamo.reset()
    y = logits.clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(y).backward()
    assert_close(y.grad, x.grad.double())
    assert_close(compiled(logits), expected.detach().double())
