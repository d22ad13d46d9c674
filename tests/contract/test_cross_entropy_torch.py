"""Promise: with torch's options, `longtail.cross_entropy` equals `F.cross_entropy` in every respect."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from tolerances import assert_close, assert_same

REDUCTIONS = ("none", "sum", "mean")


def random_target(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> Tensor:
    """Targets for logits of `shape`: class indices (some ignored), uint8 indices, or class probabilities."""
    g = cases.generator(11)
    classes = shape[0] if len(shape) == 1 else shape[1]
    if kind == "probabilities":
        raw = torch.rand(shape, generator=g, dtype=torch.float64) + 0.05
        return (raw / raw.sum(0 if len(shape) == 1 else 1, keepdim=True)).to(dtype)
    target = torch.randint(classes, () if len(shape) == 1 else (shape[0], *shape[2:]), generator=g)
    if kind == "ignored" and target.dim():
        target.view(-1)[1::3] = cases.IGNORE
    return target.to(torch.uint8) if kind == "uint8" else target


def compare_with_torch(logits: Tensor, target: Tensor, **options: object) -> None:
    """Value and logits gradient against `F.cross_entropy` in float64; bounds from torch's float32 error."""
    half = logits.dtype in (torch.float16, torch.bfloat16)
    weight = options.get("weight")
    wide = cases.vector_dtype(logits.dtype)
    results = []
    for kind, dtype in (("ours", logits.dtype), ("truth", torch.float64), ("eager", wide)):
        x = logits.detach().to(dtype).requires_grad_()
        y = target
        if kind != "ours":  # torch takes uint8 indices too, but not with every shape and option
            y = target.to(dtype if target.is_floating_point() else torch.long)
        call = dict(options)
        if isinstance(weight, Tensor) and kind != "ours":
            call["weight"] = weight.to(dtype)
        loss = (longtail.cross_entropy if kind == "ours" else F.cross_entropy)(x, y, **call)
        up = torch.randn(loss.shape, generator=cases.generator(3), dtype=torch.float64)
        loss.backward(up.to(loss.dtype))
        results.append((loss.detach(), x.grad))
    (loss, grad), (true_loss, true_grad), (eager_loss, eager_grad) = results
    assert loss.dtype == (torch.float32 if half else eager_loss.dtype)
    assert grad.dtype == logits.dtype
    assert_close(loss, true_loss, eager_loss, what="loss")
    assert_close(grad, true_grad, eager_grad.to(logits.dtype), what="gradient")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["indices", "ignored", "uint8", "probabilities"])
@pytest.mark.parametrize("shape", cases.SHAPES.values(), ids=cases.SHAPES.keys())
@pytest.mark.parametrize("options", ["plain", "weight", "smoothing", "smoothing_weight"])
def test_every_shape_and_target(shape: tuple[int, ...], kind: str, reduction: str, options: str) -> None:
    logits = torch.randn(shape, generator=cases.generator(5)) * 2
    target = random_target(shape, kind, torch.float32)
    opts = cases.options(options, 5, target)
    compare_with_torch(logits, target, reduction=reduction, **opts)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 5, 3, 2)], ids=["c", "nc", "ncdd"])
def test_every_dtype(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    logits = (torch.randn(shape, generator=cases.generator(6)) * 2).to(dtype)
    target = random_target(shape, kind, dtype)
    weight = torch.rand(5, generator=cases.generator(7)).to(dtype) + 0.5
    compare_with_torch(logits, target, reduction="mean", weight=weight, label_smoothing=0.2)


@pytest.mark.parametrize(("classes", "rows"), cases.SIZES.items())
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_every_size(classes: int, rows: int, dtype: torch.dtype) -> None:
    logits, target = cases.random_case(rows, classes, dtype, seed=classes)
    compare_with_torch(logits, target, reduction="none")


@pytest.mark.parametrize("margin", cases.MARGINS)
@pytest.mark.parametrize("dtype", cases.DTYPES[:3], ids=cases.name)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_margin(margin: float, dtype: torch.dtype, smoothing: float) -> None:
    logits, target = cases.margin_case(margin, 37, dtype, rows=8)
    compare_with_torch(logits, target, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["row_stride", "offset", "transposed", "every_other", "expanded"])
def test_every_layout(layout: str, smoothing: float) -> None:
    values, target = cases.random_case(6, 19)
    logits = cases.LAYOUTS[layout](values)
    up = torch.randn(6, generator=cases.generator(2))
    grads = []
    for x in (logits.detach().requires_grad_(), logits.contiguous().requires_grad_()):
        loss = longtail.cross_entropy(x, target, reduction="none", label_smoothing=smoothing)
        grads.append((loss.detach(), *torch.autograd.grad(loss, x, up)))
    assert_close(grads[0][0], grads[1][0].double(), what="loss")
    assert_close(grads[0][1], grads[1][1].double(), what="gradient")
    compare_with_torch(logits, target, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("options", ["plain", "weight", "smoothing_weight"])
@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 5, 3)], ids=["c", "nc", "ncd"])
def test_gradient_of_class_probabilities(shape: tuple[int, ...], options: str) -> None:
    logits = torch.randn(shape, generator=cases.generator(8), dtype=torch.float64)
    target = random_target(shape, "probabilities", torch.float64)
    opts = cases.options(options, 5, target, torch.float64)
    grads = []
    for function in (longtail.cross_entropy, F.cross_entropy):
        x, y = logits.clone().requires_grad_(), target.clone().requires_grad_()
        loss = function(x, y, reduction="none", **opts)
        up = torch.randn(loss.shape, generator=cases.generator(9), dtype=torch.float64)
        grads.append((loss.detach(), *torch.autograd.grad(loss, (x, y), up)))
    for what, ours, torchs in zip(("loss", "logits gradient", "probabilities gradient"), *grads, strict=True):
        assert torchs.abs().max() > 0
        assert_close(ours, torchs, what=what)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0), (0, 0), (2, 0, 0), (0, 0, 0)], ids=str)
def test_nothing_to_do(shape: tuple[int, ...], reduction: str) -> None:
    x = torch.zeros(shape, requires_grad=True)
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.long)
    loss = longtail.cross_entropy(x, target, reduction=reduction)
    assert_same(loss.detach(), F.cross_entropy(x, target, reduction=reduction).detach())
    loss.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 5, 3)], ids=["c", "nc", "ncd"])
def test_all_rows_ignored(shape: tuple[int, ...]) -> None:
    rows = () if len(shape) == 1 else (shape[0], *shape[2:])
    target = torch.full(rows, 3)
    for reduction in REDUCTIONS:
        x = torch.full(shape, torch.nan, requires_grad=True)
        loss = longtail.cross_entropy(x, target, ignore_index=3, reduction=reduction)
        if reduction == "mean":
            assert loss.isnan()
            assert loss.shape == ()
        else:
            assert torch.equal(loss.detach(), torch.zeros(rows if reduction == "none" else ()))
        loss.sum().backward()
        assert torch.equal(x.grad, torch.zeros(shape)), "the gradient of ignored rows is exactly 0, also of a NaN mean"


def test_weights_that_sum_to_zero_give_torchs_nan() -> None:
    logits, target = cases.random_case(4, 5, ignore=False)
    weight = torch.zeros(5)
    assert_same(longtail.cross_entropy(logits, target, weight), F.cross_entropy(logits, target, weight))


def test_ignore_index_may_be_out_of_range_or_a_class() -> None:
    logits, target = cases.random_case(8, 5, ignore=False)
    for index in (int(target[2]), 5, -1):
        changed = torch.where(torch.arange(8) == 2, torch.tensor(index), target)
        compare_with_torch(logits, changed, ignore_index=index)


def test_target_at_minus_infinity_is_infinite_and_nan_stays_in_its_row() -> None:
    logits, target = cases.random_case(4, 9, ignore=False)
    logits[0, target[0]] = -torch.inf
    logits[1, (target[1] + 1) % 9] = -torch.inf
    logits[2, (target[2] + 3) % 9] = torch.nan
    loss = longtail.cross_entropy(logits, target, reduction="none")
    expected = F.cross_entropy(logits.double(), target, reduction="none")
    assert loss[0] == torch.inf
    assert loss[2].isnan()
    assert_close(loss, expected)


INFINITE_ROWS = {
    "plus_target": [torch.inf, 0.0, 1.0],
    "plus_other": [0.0, torch.inf, 1.0],
    "minus_target": [-torch.inf, 0.0, 1.0],
    "minus_other": [0.0, -torch.inf, 1.0],
    "minus_others": [0.0, -torch.inf, -torch.inf],
    "minus_all": [-torch.inf, -torch.inf, -torch.inf],
    "nan_target": [torch.nan, 0.0, 1.0],
    "nan_other": [0.0, torch.nan, 1.0],
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("row", INFINITE_ROWS)
def test_infinities_as_torch(row: str, smoothing: float) -> None:
    """A diverged model must not look like a perfect one: NaN and infinities where torch has them."""
    logits = torch.tensor([INFINITE_ROWS[row]])
    compare_with_torch(logits, torch.tensor([0]), reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
def test_same_inside_and_outside_autocast(dtype: torch.dtype) -> None:
    logits, target = cases.random_case(6, 50, dtype)
    weight = torch.rand(50, generator=cases.generator(1))
    outcomes = []
    for enabled in (False, True):
        x = logits.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = longtail.cross_entropy(x, target, weight, label_smoothing=0.1)
        (loss * 3.5).backward()
        outcomes.append((loss.detach(), x.grad))
    assert outcomes[0][0].dtype == torch.float32
    assert_same(outcomes[1][0], outcomes[0][0], "loss")
    assert_same(outcomes[1][1], outcomes[0][1], "gradient")


def test_no_float32_copy_of_half_logits_is_kept() -> None:
    logits, target = cases.random_case(32, 100, torch.bfloat16)
    saved: list[tuple[torch.dtype, int]] = []
    x = logits.requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append((t.dtype, t.numel())), t)[1], lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        loss = longtail.cross_entropy(x, target)
    assert (torch.bfloat16, 3200) in saved, "the logits themselves are kept for the backward pass"
    assert not [s for s in saved if s[0] == torch.float32 and s[1] >= 3200]
    loss.backward()


def test_positional_arguments_are_torchs() -> None:
    logits, target = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 2])
    weight, soft = torch.rand(5), torch.rand(6, 5)
    given = (weight, None, 2, None, "sum", 0.1)
    assert_close(longtail.cross_entropy(logits, target, *given), F.cross_entropy(logits, target, *given).double())
    module, torchs = longtail.CrossEntropyLoss(*given), torch.nn.CrossEntropyLoss(*given)
    assert_close(module(logits, target), torchs(logits, target).double())
    binary = (weight, None, None, "sum", weight)
    expected = F.binary_cross_entropy_with_logits(logits, soft, *binary).double()
    assert_close(longtail.sigmoid_cross_entropy(logits, soft, *binary), expected)
    assert_close(longtail.SigmoidCrossEntropyLoss(*binary)(logits, soft), expected)


@pytest.mark.parametrize("reduce", [None, False, True])
@pytest.mark.parametrize("size_average", [None, False, True])
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_deprecated_reductions(size_average: bool | None, reduce: bool | None) -> None:
    logits, target = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 2])
    given = {"size_average": size_average, "reduce": reduce}
    expected = F.cross_entropy(logits, target, **given).double()
    assert_close(longtail.cross_entropy(logits, target, **given), expected)
    assert_close(longtail.CrossEntropyLoss(**given)(logits, target), expected)


def test_deprecated_reductions_warn() -> None:
    with pytest.warns(UserWarning, match='pass reduction="sum"'):
        longtail.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), size_average=False)
