"""Promise: a target for each element lies in [0, 1] or is ignored; another one is named with its place, NaN shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from tolerances import assert_same

DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, *cases.DTYPES)
SHAPES: dict[tuple[int, ...], tuple[int, ...]] = {
    (7,): (5,),
    (4, 6): (2, 3),
    (7, 1): (5, 0),
    (2, 3, 4, 4): (1, 2, 3, 0),
}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "sigmoid_focal_loss": longtail.sigmoid_focal_loss,
    "sigmoid_cross_entropy": longtail.sigmoid_cross_entropy,
    "binary_focal_loss": longtail.binary_focal_loss,
    "module": lambda z, y, **options: longtail.SigmoidFocalLoss(**options)(z, y),
}


def case(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> tuple[Tensor, Tensor]:
    """Logits, and targets 0 and 1 but for one."""
    target = torch.zeros(shape, dtype=dtype)
    target.view(-1)[::2] = 1
    target[SHAPES[shape]] = value
    return torch.randn(shape, generator=cases.generator(0)), target


def values(dtype: torch.dtype) -> list[float]:
    outside = [2] if dtype == torch.uint8 else [2, -1]
    if dtype.is_floating_point:
        outside += [1.02, -1e-2, torch.inf]
    return [*outside, 255] if dtype != torch.int8 else outside


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_targets_outside_are_named(name: str, dtype: torch.dtype, shape: tuple[int, ...], backend: str) -> None:
    for value in values(dtype):
        z, y = case(shape, dtype, value)
        if dtype == torch.float64:
            z = z.double()
        place = rf"target {y[SHAPES[shape]].item()} at index \[{', '.join(map(str, SHAPES[shape]))}\]".replace(
            "+", r"\+"
        )
        for options in ({}, {"ignore_index": 100}):
            with longtail.use_backend(backend), pytest.raises(ValueError, match=place):
                FUNCTIONS[name](z, y, **options)


@pytest.mark.parametrize("layout", ["rows", "strided rows", "images", "strided images", "channels last"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_no_target_is_overlooked(dtype: torch.dtype, layout: str) -> None:
    """Wherever it lies, in tensors of more than one piece; gaps between rows are no targets, nor is what is ignored."""
    shape = (3, 40_000) if "rows" in layout else (2, 5, 4, 4500)
    wide = torch.full((*shape[:-1], shape[-1] + 7), 99.0, dtype=dtype)
    y = wide[..., :-7] if "strided" in layout else torch.empty(shape, dtype=dtype)
    if layout == "channels last":
        y = y.contiguous(memory_format=torch.channels_last)
    y.fill_(1.0)[:, ::2] = 0.0
    z = torch.zeros(shape, dtype=dtype)
    for place in ((0,) * len(shape), tuple(n - 1 for n in shape), tuple(n // 2 for n in shape)):
        y[place] = -3.0
        for gradient in ("backward", "forward"):
            with pytest.raises(ValueError, match=rf"target -3\.0 at index \[{', '.join(map(str, place))}\]"):
                longtail.sigmoid_cross_entropy(z.requires_grad_(), y, gradient=gradient)
        assert longtail.sigmoid_cross_entropy(z, y, ignore_index=-3).isfinite()
        y[place] = torch.nan
        assert longtail.sigmoid_cross_entropy(z, y).isnan()
        y[place] = 1.0


def test_nothing_is_written_beside_a_target_outside() -> None:
    x = torch.randn(300, 400, requires_grad=True, generator=cases.generator(0))
    y = torch.zeros(300, 400)
    y[299, 399] = 2.0
    z = x * 1.0
    with pytest.raises(ValueError, match=r"target 2\.0 at index \[299, 399\]"):
        longtail.sigmoid_cross_entropy(z, y, gradient="inplace")
    assert torch.equal(z, x)


def test_a_nan_hides_no_other_target() -> None:
    z, y = torch.zeros(2, 3), torch.tensor([[torch.nan, 0.0, 1.0], [0.0, 255.0, 1.0]])
    with pytest.raises(ValueError, match=r"target 255.0 at index \[1, 1\]"):
        longtail.sigmoid_focal_loss(z, y)
    assert longtail.sigmoid_focal_loss(z, y.clamp(max=1)).isnan().sum() == 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_ignored_targets_may_lie_outside(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for value in (2,) if dtype == torch.uint8 else (2, -1, -100):
        z, y = case(shape, dtype, value)
        loss = FUNCTIONS[name](z, y, ignore_index=value, reduction="none")
        assert loss[SHAPES[shape]] == 0
        assert (loss != 0).sum() == loss.numel() - 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rounded_targets_count_as_the_bound(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], backend: str
) -> None:
    """The softmax summed, a bicubic resize, an average: a focal factor of their negative 1 - p_t would be NaN."""
    eps = torch.finfo(dtype).eps
    for value, bound in ((1 + eps, 1), (1 + max(eps, 9e-4), 1), (-eps, 0), (-9e-4, 0), (-1e-12, 0)):
        for options in ({"reduction": "sum"}, {"reduction": "sum", "ignore_index": -1}, {"reduction": "mean"}):
            results = []
            for given in (value, bound):
                z, y = case(shape, dtype, given)
                if "ignore_index" in options:
                    y.view(-1)[0] = -1
                z = z.mul(9).to(dtype).requires_grad_()
                with longtail.use_backend(backend):
                    loss = FUNCTIONS[name](z, y, **options)
                results.append((loss.detach(), *torch.autograd.grad(loss, z)))
            for one, other in zip(*results, strict=True):
                assert_same(one, other)


def test_a_sum_of_probabilities_trains() -> None:
    p = torch.randn(500, 50, generator=cases.generator(0)).softmax(1).sum(1)
    assert p.max() > 1
    z = torch.full((500,), 20.0, requires_grad=True)
    for gamma in (0.0, 0.5, 2.0):
        loss = longtail.binary_focal_loss(z, p, gamma=gamma)
        assert 0 <= loss < 1e-3
        assert torch.autograd.grad(loss, z)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nan_targets_show(shape: tuple[int, ...], mode: str, backend: str) -> None:
    for dtype in cases.DTYPES:
        for gamma in (0.0, 0.5, 2.0):
            z, y = case(shape, dtype, torch.nan)
            z = z.to(dtype).requires_grad_()
            with longtail.use_backend(backend):
                loss = longtail.sigmoid_focal_loss(z * 1, y, gamma=gamma, gradient=mode)
                (grad,) = torch.autograd.grad(loss.sum(), z)
            for found in (loss, grad):
                assert found[SHAPES[shape]].isnan()
                assert found.isnan().sum() == 1


def test_bool_and_soft_targets_and_nothing() -> None:
    z = torch.randn(4, 6)
    for y in (torch.rand(4, 6), torch.rand(4, 6) < 0.5, torch.zeros(4, 6), torch.ones(4, 6)):
        assert longtail.sigmoid_focal_loss(z, y, reduction="mean").isfinite()
    assert longtail.sigmoid_focal_loss(z[:0], torch.zeros(0, 6), reduction="sum") == 0


@pytest.mark.parametrize("options", [{}, {"ignore_index": -1}], ids=str)
def test_traced_calls_look_at_no_value(options: dict[str, Any]) -> None:
    """No break of the graph, no failure without values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    z, y = torch.randn(4, 6, requires_grad=True), torch.rand(4, 6)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return longtail.sigmoid_focal_loss(a, b, reduction="mean", **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(z, y)
    assert_same(compiled.detach(), loss(z, y).detach())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert loss(torch.empty(4, 6), torch.empty(4, 6)).shape == ()
    assert loss(z.to("meta"), y.to("meta")).shape == ()
