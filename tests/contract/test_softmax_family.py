"""Promise: every option has the value and gradient of its definition, at every margin and size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
import naive
from tolerances import assert_close


def ours(logits: Tensor, target: Tensor, upstream: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    x = logits.detach().clone().requires_grad_()
    loss = longtail.cross_entropy(x, target, reduction="none", **options)
    (grad,) = torch.autograd.grad(loss, x, upstream)
    return loss.detach(), grad


def plain(logits: Tensor, target: Tensor, upstream: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The package's own plain PyTorch, in the dtype of the logits."""
    x = logits.detach().requires_grad_()
    loss = longtail.reference.softmax_loss(x, target, **options)
    (grad,) = torch.autograd.grad(loss, x, upstream)
    return loss.detach(), grad


def check(logits: Tensor, target: Tensor, options: dict[str, Any], truth: Any = plain, factor: float = 1.0) -> None:
    """Loss and gradient within twice plain PyTorch's error in `vector_dtype`; random upstream gradient."""
    dtype = cases.vector_dtype(logits.dtype)
    up = torch.randn(target.shape, generator=cases.generator(4), dtype=torch.float64).to(dtype)
    loss, grad = ours(logits, target, up, **options)
    true_loss, true_grad = truth(logits.double(), target, up.double(), **cases.to_float64(options))
    eager_loss, eager_grad = plain(logits.to(dtype), target, up, **options)
    assert loss.dtype == dtype
    assert grad.dtype == logits.dtype
    assert_close(loss, true_loss, eager_loss, what="loss", factor=factor)
    assert_close(grad, true_grad, eager_grad.to(logits.dtype), what="gradient", factor=factor)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
def test_definition(option_set: str, dtype: torch.dtype) -> None:
    """Against formulas written apart from the package, straight from the definitions."""
    logits, target = cases.random_case(23, 37, dtype, spread=2.0)
    options = cases.options(option_set, 37, target, dtype)
    check(cases.poison_ignored(logits, target), target, options, truth=naive.rows_and_grad)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("margin", cases.MARGINS)
@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
def test_margins(option_set: str, margin: float, dtype: torch.dtype) -> None:
    logits, target = cases.margin_case(margin, 19, dtype, rows=8)
    options = cases.options(option_set, 19, target, dtype)
    # Compensation multiplies the margin, and with it what rounding takes from effective logits.
    check(logits, target, options, factor=3.0 if "compensation" in options else 1.0)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize(("classes", "rows"), cases.SIZES.items())
@pytest.mark.parametrize("option_set", ["plain", "smoothing_weight", "complement", "mixed"])
def test_sizes(option_set: str, classes: int, rows: int, dtype: torch.dtype) -> None:
    logits, target = cases.random_case(rows, classes, dtype, seed=classes)
    options = cases.options(option_set, classes, target, dtype)
    check(cases.poison_ignored(logits, target), target, options)


BOUNDARIES = [*range(1, 70), *(2**k + offset for k in range(7, 14) for offset in (-1, 0, 1))]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("option_set", ["plain", "mixed"])
def test_around_vector_and_block_boundaries(option_set: str, dtype: torch.dtype) -> None:
    for classes in BOUNDARIES:
        logits, target = cases.random_case(3, classes, dtype, seed=classes)
        check(logits, target, cases.options(option_set, classes, target, dtype))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("lead", ["target", "other", "minus_infinity"])
@pytest.mark.parametrize("classes", [131, 2500])
def test_every_column_as_target_and_as_maximum(classes: int, lead: str, dtype: torch.dtype) -> None:
    """Row i has target i; its maximum is the target, another column, or all but a few columns are -inf."""
    target = torch.arange(0, classes, 1 if classes < 200 else 17)
    rows = torch.arange(len(target))
    logits = torch.randn(len(target), classes, generator=cases.generator(classes)).to(dtype)
    if lead == "minus_infinity":
        logits[(torch.arange(classes)[None] - target[:, None]) % classes > 3] = -torch.inf
    else:
        logits[rows, (target + (lead == "other") * (rows + 1)) % classes] += 30
    check(logits, target, {"complement_gamma": -1.0, "focal_gamma": 0.5})


@pytest.mark.parametrize("gamma", cases.GAMMAS)
@pytest.mark.parametrize("margin", cases.MARGINS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_gammas(gamma: float, margin: float, smoothing: float) -> None:
    """Finite and right also for 0 < gamma < 1 at a saturated p, where autograd of (1 - p)^gamma gives NaN."""
    logits, target = cases.margin_case(margin, 7, rows=8)
    check(logits, target, {"focal_gamma": gamma, "label_smoothing": smoothing})


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("option_set", ["focal_half", "complement", "mixed", "mixed_linear"])
@pytest.mark.parametrize("layout", ["row_stride", "offset", "transposed", "every_other", "expanded"])
def test_layouts(layout: str, option_set: str, dtype: torch.dtype) -> None:
    values, target = cases.random_case(6, 33, dtype)
    logits = cases.LAYOUTS[layout](values)
    options = cases.options(option_set, 33, target, dtype)
    up = torch.randn(6, generator=cases.generator(1)).to(cases.vector_dtype(dtype))
    x = logits.detach().requires_grad_()
    loss = longtail.cross_entropy(x, target, reduction="none", **options)
    (grad,) = torch.autograd.grad(loss, x, up)
    true_loss, true_grad = plain(logits.double(), target, up.double(), **cases.to_float64(options))
    wide = logits.to(cases.vector_dtype(dtype))
    eager_loss, eager_grad = plain(wide, target, up, **options)
    assert_close(loss, true_loss, eager_loss, what="loss")
    assert_close(grad, true_grad, eager_grad.to(dtype), what="gradient")


@pytest.mark.parametrize("option_set", ["complement", "mixed"])
@pytest.mark.parametrize("shape", cases.SHAPES.values(), ids=cases.SHAPES.keys())
def test_shapes(shape: tuple[int, ...], option_set: str) -> None:
    """Classes in dimension 1 (or 0 of one row): as the same rows in a matrix."""
    logits = torch.randn(shape, generator=cases.generator(3), dtype=torch.float64)
    rows = () if len(shape) == 1 else (shape[0], *shape[2:])
    target = torch.randint(5, rows, generator=cases.generator(4))
    options = cases.options(option_set, 5, target, torch.float64)
    up = torch.randn(rows, generator=cases.generator(5), dtype=torch.float64)
    loss, grad = ours(logits, target, up, **options)
    matrix = logits.movedim(0 if len(shape) == 1 else 1, -1).reshape(-1, 5)
    if "sample_weight" in options:
        options["sample_weight"] = options["sample_weight"].reshape(-1)
    flat_loss, flat_grad = naive.rows_and_grad(matrix, target.reshape(-1), up.reshape(-1), **options)
    assert_close(loss, flat_loss.reshape(rows), what="loss")
    moved = flat_grad.reshape(*rows, 5).movedim(-1, 0 if len(shape) == 1 else 1)
    assert_close(grad, moved, what="gradient")


def test_minus_infinity_among_the_others_is_as_if_the_class_were_absent() -> None:
    logits, target = cases.random_case(5, 12, torch.float64, ignore=False)
    keep = torch.tensor([j for j in range(12) if j not in (3, 7)])
    target = keep[target % 10]
    holed = logits.clone()
    holed[:, [3, 7]] = -torch.inf
    up = torch.randn(5, generator=cases.generator(1), dtype=torch.float64)
    smaller = (keep[None] == target[:, None]).int().argmax(1)
    options = {"focal_gamma": 1.5, "z_loss": 0.01, "scale": 1.2}
    loss, grad = ours(holed, target, up, complement_gamma=-11.0, **options)
    less_loss, less_grad = naive.rows_and_grad(
        logits[:, keep], smaller, up, complement_gamma=-9.0, **options
    )  # gamma / (C - 1) = -1 in both
    assert_close(loss, less_loss, what="loss")
    assert_close(grad[:, keep], less_grad, what="gradient")
    assert torch.equal(grad[:, [3, 7]], torch.zeros(5, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("margin", [20.0, 40.0, 55.0])
def test_target_gradient_is_right_relatively_where_p_rounds_to_one(margin: float, dtype: torch.dtype) -> None:
    """-(1 - p_g) to a few roundings of itself: computed from a float32 p_g it is 8 % off at 20 nats, 0 from 21 on."""
    logits = torch.zeros(1, 64, dtype=dtype)
    logits[0, 5] = margin
    loss, grad = ours(logits, torch.tensor([5]), torch.tensor([1.5]))
    odds = 63 * torch.tensor(-margin, dtype=torch.float64).exp()
    expected = -1.5 * odds / (1 + odds)
    relative = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    assert abs(grad[0, 5].double() / expected - 1) < relative
    assert abs(loss[0].double() / torch.log1p(odds) - 1) < 1e-5
    focal, _ = ours(logits, torch.tensor([5]), torch.tensor([1.5]), focal_gamma=0.5)
    assert abs(focal[0].double() / (torch.log1p(odds) * (odds / (1 + odds)) ** 0.5) - 1) < 2e-5


@pytest.mark.parametrize("dtype", cases.DTYPES[:3], ids=cases.name)
@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
def test_nan_stays_in_its_row_and_ignored_rows_are_exactly_zero(option_set: str, dtype: torch.dtype) -> None:
    logits, target = cases.random_case(9, 21, dtype)
    logits = cases.poison_ignored(logits, target)
    logits[3, 2] = torch.nan
    options = cases.options(option_set, 21, target, dtype)
    up = torch.randn(9, generator=cases.generator(4)).to(cases.vector_dtype(dtype))
    loss, grad = ours(logits, target, up, **options)
    counted = target != cases.IGNORE
    assert loss[3].isnan()
    assert grad[3].isnan().any()
    assert torch.equal(loss[~counted], torch.zeros_like(loss[~counted]))
    assert torch.equal(grad[~counted], torch.zeros_like(grad[~counted]))
    counted[3] = False
    assert loss[counted].isfinite().all()
    assert grad[counted].isfinite().all()
    assert (grad[counted].abs().amax(1) > 0).all()
