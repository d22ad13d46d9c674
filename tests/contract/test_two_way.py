"""Promise: ZLPR and the two-way loss are their papers' formulas, for every target, shape, reduction and mode."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
import two_way_cases
from kernels import CPU, GPU, Operators, over
from tolerances import assert_close, assert_same


def loss_of(joint: bool, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """By the public functions, of the options of ``two_way_cases``."""
    if joint:
        return longtail.two_way_loss(logits, target, **options)
    assert options.pop("positive_temperature", 1.0) == options.pop("negative_temperature", 1.0) == 1
    return longtail.zlpr_loss(logits, target, **options)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("name", two_way_cases.OPTION_SETS)
@pytest.mark.parametrize(("kernels", "kind"), over(CPU | GPU, two_way_cases.KINDS))
def test_the_papers_formulas(kernels: Operators, kind: str, name: str, dtype: torch.dtype) -> None:
    logits, target = two_way_cases.random_case((7, 19), kind, dtype)
    options = two_way_cases.options(name, logits)
    joint = options.pop("joint")
    w = logits.double().requires_grad_()
    wide = target if kind == "class" else target.double()
    counts = (target > 0).any(1) if joint and kind != "class" else torch.ones(7, dtype=torch.bool)
    truth = torch.where(counts, two_way_cases.naive(w, wide, joint, **cases.to_float64(options)), 0.0)
    up = torch.randn(7, generator=cases.generator(3), dtype=torch.float64)
    (expected,) = torch.autograd.grad(truth, w, up)
    x = logits.to(kernels.device).requires_grad_()
    on = {k: v.to(kernels.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    with longtail.use_backend(kernels.backend):
        loss = loss_of(joint, x, target.to(kernels.device), reduction="none", **on)
        (grad,) = torch.autograd.grad(loss, x, up.to(kernels.device, loss.dtype))
    assert loss.dtype == cases.vector_dtype(dtype)
    assert_close(loss.detach().cpu(), truth.detach(), factor=3)
    assert_close(grad.cpu(), expected.nan_to_num(0.0), factor=3)


def test_by_hand() -> None:
    """Two labels at log 2 and log 4, two others at log 3 and 0: 1 + 3 + 1 and 1 + 1/2 + 1/4."""
    logits = torch.tensor([[math.log(2.0), math.log(3.0), math.log(4.0), 0.0]], dtype=torch.float64)
    y = torch.tensor([[True, False, True, False]])
    assert longtail.zlpr_loss(logits, y).item() == pytest.approx(math.log(5.0) + math.log(1.75))
    soft = torch.tensor([[1.0, 0.25, 1.0, 0.0]], dtype=torch.float64)  # 1 + 0.75 * 3 + 1 and 1 + 1/2 + 1/4 + 0.25 / 3
    assert longtail.zlpr_loss(logits, soft).item() == pytest.approx(math.log(4.25) + math.log(1.75 + 0.25 / 3))
    assert longtail.two_way_loss(logits, y, 1.0).item() == pytest.approx(math.log(1 + 4 * 0.75))
    assert longtail.two_way_loss(logits, y, 0.5, 2.0).item() == pytest.approx(
        math.log(1 + (math.sqrt(3.0) + 1) ** 2 * (0.25 + 0.0625) ** 0.5)
    )


def test_a_label_alone_at_temperature_1_is_cross_entropy() -> None:
    logits, target = cases.random_case(9, 21)
    assert_close(longtail.two_way_loss(logits, target, 1.0), F.cross_entropy(logits.double(), target), factor=4)


def test_a_masked_class_costs_nothing_and_a_masked_label_everything() -> None:
    x = torch.tensor([[0.5, -torch.inf, 1.0, -torch.inf]], requires_grad=True)
    for function in (longtail.zlpr_loss, longtail.two_way_loss):
        loss = function(x, torch.tensor([[1, 0, 0, 0]]))
        (grad,) = torch.autograd.grad(loss, x)
        assert_close(loss.detach(), function(x[:, [0, 2]].double(), torch.tensor([[1, 0]])).detach())
        assert grad[0, [1, 3]].tolist() == [0.0, 0.0]
        assert function(x, torch.tensor([1])).item() == torch.inf


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", [(23,), (1,), (2, 23, 3), (2, 23, 2, 3), (3, 1, 4)])
def test_shapes(shape: tuple[int, ...], dense: bool, mode: str) -> None:
    classes = shape[1] if len(shape) > 1 else shape[0]
    logits = torch.randn(shape, generator=cases.generator(0))
    rows = logits.movedim(1, -1).reshape(-1, classes) if len(shape) > 1 else logits[None]
    of_rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    target = torch.randint(classes, of_rows, generator=cases.generator(1))
    flat = target.reshape(-1)
    if dense:
        target = torch.rand(shape, generator=cases.generator(1)) < 0.3
        flat = target.movedim(1, -1).reshape(-1, classes) if len(shape) > 1 else target[None]
    one, two = logits.clone().requires_grad_(), rows.clone().requires_grad_()
    up = torch.randn(of_rows, generator=cases.generator(2))
    for function in (longtail.zlpr_loss, longtail.two_way_loss):
        loss = function(one * 1, target, reduction="none", gradient=mode)
        same = function(two, flat, reduction="none")
        assert loss.shape == of_rows
        assert_close(loss.detach().reshape(-1), same.detach().double())
        (grad,), (plain,) = torch.autograd.grad(loss, one, up), torch.autograd.grad(same, two, up.reshape(-1))
        assert_close(grad.movedim(1, -1).reshape(-1, classes) if len(shape) > 1 else grad[None], plain.double())


@pytest.mark.parametrize("kind", two_way_cases.KINDS)
@pytest.mark.parametrize(("kernels", "mode"), over(CPU | GPU, cases.MODES))
def test_reductions_and_normalizers(kernels: Operators, mode: str, kind: str) -> None:
    logits, target = two_way_cases.random_case((8, 12), kind)
    weight = torch.rand(8, generator=cases.generator(4))
    for joint in (False, True):
        counts = target != cases.IGNORE if kind == "class" else (target > 0).any(1) if joint else torch.ones(8)
        rows = float(counts.sum())
        for normalizer, divisor in ((None, rows), ("count", rows), (3.5, 3.5), (torch.tensor(2), 2.0)):
            given = {"ignore_index": cases.IGNORE, "sample_weight": weight.to(kernels.device)}
            x, w = (logits.to(kernels.device).requires_grad_() for _ in range(2))
            y = target.to(kernels.device)
            with longtail.use_backend(kernels.backend):
                mean = loss_of(joint, x * 1, y, normalizer=normalizer, gradient=mode, **given)
                total = loss_of(joint, w, y, reduction="sum", **given)
                mean.backward(torch.tensor(-0.7, device=kernels.device))
                total.backward(torch.tensor(-0.7 / divisor, device=kernels.device))
            assert_close(mean.detach(), total.detach().double() / divisor)
            assert_close(x.grad, w.grad.double(), factor=2)


@pytest.mark.parametrize("kernels", over(CPU | GPU))
@pytest.mark.parametrize("mode", cases.MODES)
def test_nothing_counts(kernels: Operators, mode: str) -> None:
    """NaN, as torch, or 0 by "count"; no gradient, whatever the logits hold."""
    logits = torch.full((3, 4), torch.nan, device=kernels.device)
    classes = torch.full((3,), cases.IGNORE, device=kernels.device)
    for function, target in (
        (longtail.zlpr_loss, classes),
        (longtail.two_way_loss, classes),
        (longtail.two_way_loss, torch.zeros(3, 4, device=kernels.device)),
    ):
        with longtail.use_backend(kernels.backend):
            for normalizer, expected in ((None, torch.nan), ("count", 0.0)):
                x = logits.clone().requires_grad_()
                loss = function(x * 1, target, normalizer=normalizer, gradient=mode)
                loss.backward()
                assert loss.isnan() if expected else loss == 0
                assert (x.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_targets_of_any_dtype(dtype: torch.dtype) -> None:
    logits, y = two_way_cases.random_case((5, 9), "hard")
    y = y.clamp(min=0)
    for function in (longtail.zlpr_loss, longtail.two_way_loss):
        assert_same(function(logits, y.to(dtype)), function(logits, y))


def test_float16_gradients_keep_their_size() -> None:
    logits, target = two_way_cases.random_case((6, 9), "soft", torch.float16)
    for size in (1e-7, 1e7):
        grads = []
        for mode in ("forward", "backward"):
            leaf = logits.clone().requires_grad_()
            options = {"sample_weight": torch.full((6,), size), "ignore_index": cases.IGNORE, "gradient": mode}
            loss = longtail.zlpr_loss(leaf * 1, target, reduction="sum", **options)
            loss.backward(torch.tensor(1024.0 / size))
            grads.append(leaf.grad)
        assert grads[0].isfinite().all()
        assert grads[0].abs().max() > 1
        assert_close(grads[0], grads[1].double(), factor=4)


@pytest.mark.parametrize("name", two_way_cases.OPTION_SETS)
@pytest.mark.parametrize("kind", two_way_cases.KINDS)
def test_the_reference_differentiates_twice(kind: str, name: str) -> None:
    logits, target = two_way_cases.random_case((2, 5), kind, torch.float64)
    options = two_way_cases.options(name, logits)
    x = logits.requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return longtail.reference.two_way_loss(z, target, **options)

    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x, fast_mode=True)


def test_second_derivatives_are_refused() -> None:
    logits, y = two_way_cases.random_case((4, 9), "hard")
    x = logits.requires_grad_()
    (grad,) = torch.autograd.grad(longtail.zlpr_loss(x, y.clamp(min=0)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", ["class", "hard"])
@pytest.mark.parametrize("module", [longtail.ZLPRLoss(), longtail.TwoWayLoss(2.0)], ids=["zlpr", "two_way"])
def test_compiled_and_exported(module: torch.nn.Module, kind: str) -> None:
    logits, target = two_way_cases.random_case((4, 9), kind)
    target = target.clamp(min=0)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    one, two = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, again = module(one, target), compiled(two, target)
    loss.backward()
    again.backward()
    assert_close(again.detach(), loss.detach().double())
    assert_close(two.grad, one.grad.double())
    exported = torch.export.export(module, (logits, target)).module()
    assert_close(exported(logits, target), loss.detach().double())


@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize("end", ["", "_backward", "_and_grad", "_and_grad_"])
def test_opcheck(end: str, kind: str) -> None:
    for shape in ((5, 9), (2, 4, 3)):
        logits, target = two_way_cases.random_case(shape, kind)
        tail = two_way_cases.operator_options(two_way_cases.options("two_way_vectors", logits))
        y = target.flatten() if kind == "class" else target
        up = torch.randn(logits.numel() // shape[1], generator=cases.generator(5))
        arguments = [logits, y, *tail]
        if end == "_backward":
            arguments = [up, logits, y, torch.ops.longtail.two_way_loss(logits, y, *tail)[1], *tail]
        elif end:
            arguments = [up, *arguments]
        results = torch.library.opcheck(getattr(torch.ops.longtail, "two_way_loss" + end).default, tuple(arguments))
        assert set(results.values()) == {"SUCCESS"}, results


X, Y, T = torch.zeros(4, 5), torch.zeros(4, 5), torch.tensor([0, 4, 2, 1])
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "target_shape": ((X, T[:3]), {}, ValueError, "target has shape"),
    "target_complex": ((X, Y.to(torch.complex64)), {}, TypeError, "complex"),
    "target_requires_grad": ((X, Y.clone().requires_grad_()), {}, RuntimeError, "not differentiable"),
    "target_outside": ((X, Y + 2), {}, ValueError, r"target 2.0 at index \[0, 0\]"),
    "out_of_range": ((X, T + 1), {}, IndexError, r"5.*row 1"),
    "logits_integer": ((X.long(), T), {}, TypeError, "input"),
    "temperature_0": ((X, T), {"positive_temperature": 0.0}, ValueError, "positive_temperature is 0"),
    "temperature_below": ((X, T), {"negative_temperature": -1.0}, ValueError, "negative_temperature is -1"),
    "temperature_tiny": ((X, T), {"negative_temperature": 1e-50}, ValueError, "negative_temperature is 1e-50"),
    "temperature_tensor": ((X, T), {"positive_temperature": torch.tensor(1.0)}, TypeError, "positive_temperature"),
    "reduction": ((X, Y), {"reduction": "rows"}, ValueError, "reduction is 'rows'"),
    "normalizer": ((X, Y), {"normalizer": "rows"}, ValueError, "normalizer is 'rows', expected 'count'"),
    "sample_weight_shape": ((X, Y), {"sample_weight": torch.ones(4, 5)}, ValueError, "sample_weight has shape"),
    "class_bias_shape": ((X, Y), {"class_bias": torch.ones(4)}, ValueError, "class_bias has shape"),
    "temperature": ((X, Y), {"Tp": 2.0}, TypeError, "unexpected keyword argument 'Tp'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    args, options, error, text = ERRORS[case]
    with pytest.raises(error, match=text):
        longtail.two_way_loss(*args, **options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("place", "value"), [(1, torch.zeros(3)), (1, torch.zeros(4, 5, dtype=torch.int32)), (2, Y[0, :3]), (3, Y[0])]
)
def test_operators_refuse_what_does_not_fit(backend: str, place: int, value: Tensor) -> None:
    arguments: list[Any] = [X, Y, None, None, None, 1.0, 1.0, True]
    arguments[place] = value
    with longtail.use_backend(backend), pytest.raises(RuntimeError, match=r"longtail: .* expected"):
        torch.ops.longtail.two_way_loss(*arguments)
