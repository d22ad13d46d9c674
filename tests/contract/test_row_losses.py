"""Promise: the losses made of row statistics are the papers' formulas, exact where p_g rounds to 0 or 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from kernels import CPU, GPU, Operators, over
from naive import effective_logits
from statistics_cases import OF_CLASSES
from tolerances import assert_close, assert_same

Loss = Callable[..., Tensor]
# name -> (ours, the name of its hyperparameter, the values tried)
LOSSES: dict[str, tuple[Loss, str, tuple[float, ...]]] = {
    "poly": (longtail.poly_cross_entropy, "epsilon", (1.0, -0.7, 0.0)),
    "generalized": (longtail.generalized_cross_entropy, "q", (0.7, 1.0, 1e-3, 0.0)),
}
EACH = [(name, value) for name, (_, _, values) in LOSSES.items() for value in values]
MIXED: dict[str, Any] = {"temperature": 1.7, "scale": 1.3, "softcap": 8.0, "compensation": 0.8}


def paper(name: str, value: float, p: Tensor) -> Tensor:
    """Leng et al. 2022, Poly-1, and Zhang and Sabuncu 2018, eq. 6, of the target's probability."""
    if name == "poly":
        return -p.log() + value * (1 - p)
    return -p.log() if value == 0 else (1 - p**value) / value


def rows(name: str, value: float, logits: Tensor, target: Tensor, temperature: float = 1.0, **given: Any) -> Tensor:
    """Each row's loss in plain PyTorch, 0 where ignored; for moderate margins."""
    counted = target != cases.IGNORE
    g, z = target[counted], logits[counted]
    vectors = {k: given.pop(k, None) for k in ("weight", "sample_weight")}
    of_classes = {k: given.pop(k) for k in OF_CLASSES if k in given}
    u = effective_logits(z, g, **given) / temperature
    u = effective_logits(u, g, **of_classes)
    loss = paper(name, value, u.softmax(1)[F.one_hot(g, u.shape[1]).bool()])
    if vectors["weight"] is not None:
        loss = loss * vectors["weight"][g]
    if vectors["sample_weight"] is not None:
        loss = loss * vectors["sample_weight"][counted]
    return torch.zeros_like(target, dtype=logits.dtype).masked_scatter(counted, loss)


def vectors(classes: int, target: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    g = cases.generator(2)
    found = {name: torch.rand(classes, generator=g) for name in ("weight", *OF_CLASSES[:-1])}
    found["sample_weight"] = torch.rand(target.shape, generator=g)
    return {name: x.to(cases.vector_dtype(dtype)) for name, x in found.items()}


@pytest.mark.parametrize(("name", "value"), EACH)
@pytest.mark.parametrize(
    ("kernels", "size", "dtype"),
    [
        *over(CPU, [(9, 2), (6, 127)], [torch.float32, torch.bfloat16]),
        *over(GPU, [(7, 1), (6, 127)], [torch.float32, torch.float16]),
    ],
)
def test_formula(kernels: Operators, size: tuple[int, int], dtype: torch.dtype, name: str, value: float) -> None:
    logits, target = cases.random_case(*size, dtype)
    given = {**MIXED, **vectors(size[1], target, dtype)}
    upstream = cases.upstreams(target.shape, cases.vector_dtype(dtype))["random"]
    expected = []
    for x in (logits.double(), logits.to(cases.vector_dtype(dtype))):
        options = cases.to_float64(given) if x.dtype == torch.float64 else given
        loss = rows(name, value, x.requires_grad_(), target, **options)
        expected.append((loss, *torch.autograd.grad(loss, x, upstream.to(loss.dtype))))
    (truth, true_grad), (eager, eager_grad) = expected
    ours, option, _ = LOSSES[name]
    placed = {k: v.to(kernels.device) if isinstance(v, Tensor) else v for k, v in given.items()}
    x = cases.poison_ignored(logits.detach(), target).to(kernels.device).requires_grad_()
    with longtail.use_backend(kernels.backend):
        found = ours(x, target.to(kernels.device), reduction="none", **{option: value}, **placed)
        (grad,) = torch.autograd.grad(found, x, upstream.to(kernels.device))
    assert found.dtype == cases.vector_dtype(dtype)
    assert_close(found.cpu(), truth, eager, what="loss", factor=4)
    assert_close(grad.cpu(), true_grad, eager_grad.to(dtype), what="gradient", factor=4)


def exact(name: str, value: float, row: Tensor, g: int) -> tuple[float, list[float]]:
    """Loss and gradient of one row of logits, in decimals of 100 digits."""
    with localcontext() as context:
        context.prec, context.Emin, number = 100, -(10**6), Decimal(value)
        e = [(Decimal(z) - Decimal(row.max().item())).exp() for z in row.tolist()]
        total = sum(e, Decimal(0))
        p, miss = [x / total for x in e], (total - e[g]) / total
        if name == "poly":
            loss, slope = -p[g].ln() + number * miss, -(1 + number * p[g])
        elif value == 0:
            loss, slope = -p[g].ln(), Decimal(-1)
        else:
            power = (number * p[g].ln()).exp()
            loss, slope = (1 - power) / number, -power
        return float(loss), [float(slope * (miss if j == g else -x)) for j, x in enumerate(p)]


@pytest.mark.parametrize("margin", [20.0, 100.0, 1e4])
@pytest.mark.parametrize(("name", "value"), EACH)
@pytest.mark.parametrize("kernels", CPU.values(), ids=CPU)
def test_saturation(kernels: Operators, name: str, value: float, margin: float) -> None:
    """Digits, not only finite numbers: 1 - p_g is exp(-margin) in half of the rows, p_g in the others."""
    logits, target = cases.margin_case(margin, 5)
    ours, option, _ = LOSSES[name]
    x = logits.requires_grad_()
    with longtail.use_backend(kernels.backend):
        loss = ours(x, target, reduction="none", **{option: value})
        (grad,) = torch.autograd.grad(loss.sum(), x)
    want = [exact(name, value, row, int(g)) for row, g in zip(logits.detach(), target, strict=True)]
    relative = 2e-5 if margin < 1e4 else 1e-3  # the margin itself is rounded, and stands in an exponent
    for got, (value_of_row, gradient) in zip(zip(loss.tolist(), grad.tolist(), strict=True), want, strict=True):
        assert got[0] == pytest.approx(value_of_row, rel=relative, abs=1e-37)
        assert got[1] == pytest.approx(gradient, rel=relative, abs=1e-37)


def test_infinite_logits() -> None:
    """A class at -inf is none; a target there has the loss of p_g = 0, and a finite gradient."""
    x = torch.tensor([[1.0, 0.5, -torch.inf], [-torch.inf, 0.3, 0.1]], dtype=torch.float64, requires_grad=True)
    target = torch.zeros(2, dtype=torch.int64)
    for name, (ours, _, _) in LOSSES.items():
        loss = ours(x, target, reduction="none")
        alone = ours(x[:1, :2], target[:1], reduction="none")
        assert_close(loss[:1], alone)
        assert loss[1].item() == (torch.inf if name == "poly" else pytest.approx(1 / 0.7))
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert grad.isfinite().all()
        assert grad[0, 2] == 0


def test_limits_are_the_losses_of_the_papers() -> None:
    logits, target = cases.random_case(8, 6, torch.float64)
    given = vectors(6, target, torch.float64)
    plain = longtail.cross_entropy(logits, target, **given)
    assert_close(longtail.poly_cross_entropy(logits, target, 0.0, **given), plain)
    assert_close(longtail.generalized_cross_entropy(logits, target, 0.0, **given), plain)
    near = longtail.generalized_cross_entropy(logits, target, 1e-9, **given)
    assert_close(near, plain, factor=1e6)
    counted = target != cases.IGNORE
    hot = F.one_hot(target.clamp(min=0), 6).double()
    absolute = (logits.softmax(1) - hot).abs().sum(1)[counted].mean()
    assert_close(longtail.generalized_cross_entropy(logits, target, 1.0), absolute / 2)


REQUESTS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "count": {"normalizer": "count"},
    "number": {"normalizer": 3.5},
    "tensor": {"normalizer": torch.tensor(7)},
    "zero": {"normalizer": 0.0},
}


@pytest.mark.parametrize("case", ["plain", "weighted", "images", "ignored", "empty", "row"])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_reductions_are_those_of_cross_entropy(request_name: str, case: str) -> None:
    """epsilon = 0 and q = 0 are cross-entropy, whose means, shapes and empty means they share."""
    logits, target = cases.random_case(6, 5)
    given = vectors(5, target, torch.float32) if case == "weighted" else {}
    if case == "images":
        logits, target = logits.view(2, 3, 5).movedim(1, 2), target.view(2, 3)
        given = {"sample_weight": torch.rand(2, 3, generator=cases.generator(1)), "weight": torch.rand(5)}
    elif case == "ignored":
        target = torch.full_like(target, cases.IGNORE)
    elif case == "empty":
        logits, target = logits[:0], target[:0]
    elif case == "row":
        logits, target = logits[0], target[0]
    asked = {**given, **REQUESTS[request_name]}
    found = []
    for ours, option in ((longtail.cross_entropy, None), *((ours, option) for ours, option, _ in LOSSES.values())):
        x = logits.clone().requires_grad_()
        loss = ours(x, target, **({} if option is None else {option: 0.0}), **asked)
        found.append((loss, *torch.autograd.grad(loss.sum(), x)))
    for loss, grad in found[1:]:
        assert_close(loss, found[0][0].double())
        assert_close(grad, found[0][1].double())


def test_weights_of_other_classes_and_ignored_rows_stay_out() -> None:
    logits, target = cases.random_case(6, 5)
    bad, rows_weight = torch.ones(5), torch.ones(6)
    absent = next(c for c in range(5) if c not in target)
    bad[absent], rows_weight[target == cases.IGNORE] = torch.nan, torch.inf
    x = cases.poison_ignored(logits, target).requires_grad_()
    for ours, _, _ in LOSSES.values():
        options = {"weight": bad, "sample_weight": rows_weight, "reduction": "none"}
        loss = ours(x, target, **options)
        (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, 2.0).masked_fill(target < 0, torch.inf))
        assert_same(loss.detach(), ours(logits, target, reduction="none"))
        assert grad.isfinite().all()
        assert_same(grad[target < 0], torch.zeros_like(grad[target < 0]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_targets_of_any_integer_dtype(dtype: torch.dtype) -> None:
    logits, target = cases.random_case(6, 5, ignore=False)
    weight = torch.rand(5, generator=cases.generator(1))
    for ours, _, _ in LOSSES.values():
        assert_same(ours(logits, target.to(dtype), weight=weight), ours(logits, target, weight=weight))


def test_in_place() -> None:
    logits, target = cases.random_case(6, 5)
    for ours, _, _ in LOSSES.values():
        x = logits.clone().requires_grad_()
        (want,) = torch.autograd.grad(ours(x, target), x)
        z = x * 1.0
        (grad,) = torch.autograd.grad(ours(z, target, gradient="inplace"), x)
        assert_same(grad, want)
        assert_same(z.detach(), want)
        with pytest.raises(ValueError, match="leaf"):
            ours(x, target, gradient="inplace")


def test_gradcheck() -> None:
    logits, target = cases.random_case(3, 4, torch.float64)
    given = {**MIXED, **vectors(4, target, torch.float64), "compensation": 0.0}  # which counts as a constant
    for ours, _, _ in LOSSES.values():
        assert torch.autograd.gradcheck(lambda z, ours=ours: ours(z, target, **given), logits.requires_grad_())


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.rand(13, generator=cases.generator(1))

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        statistics = longtail.row_statistics(z, target)
        loss = -(longtail.token_weighting(statistics, "mile") * statistics.log_prob).sum()
        return loss + longtail.generalized_cross_entropy(z * 1.0, target, weight=self.weight)


def test_compile_func_and_export() -> None:
    logits, target = cases.random_case(6, 13)
    x, model = logits.requires_grad_(), _Model()
    (want,) = torch.autograd.grad(model(x, target), x)
    assert_close(torch.func.grad(model)(x.detach(), target), want.double(), factor=4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(model, (x, target)).module()
    for call in (compiled, exported):
        (got,) = torch.autograd.grad(call(x, target), x)
        assert_close(got, want.double(), factor=4)


class _Sharded(Tensor):
    full_tensor = None  # by which a DTensor is known


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "probabilities": ({"target": torch.rand(6, 5)}, TypeError, "expected an integer dtype"),
    "shape": ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "target has shape"),
    "bound": ({"target": torch.full((6,), 5)}, IndexError, "target 5 in row 0"),
    "input": ({"input": torch.zeros(6, 5, dtype=torch.int64)}, TypeError, "input has dtype torch.int64"),
    "list": ({"input": [[1.0]]}, TypeError, "input is a list, expected a Tensor"),
    "dtensor": ({"input": torch.ones(6, 5).as_subclass(_Sharded)}, TypeError, "input is a DTensor, expected a plain"),
    "weight": ({"weight": torch.ones(4)}, ValueError, r"weight has shape \[4\], expected \[5\]"),
    "weight_grad": ({"weight": torch.ones(5, requires_grad=True)}, ValueError, "weight requires grad"),
    "sample_weight": ({"sample_weight": torch.ones(5)}, ValueError, r"sample_weight has shape \[5\], expected \[6\]"),
    "bias": ({"class_bias": torch.ones(4)}, ValueError, "class_bias has shape"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature is 0.0, expected a positive number"),
    "reduction": ({"reduction": "rows"}, ValueError, "reduction is 'rows'"),
    "normalizer": ({"normalizer": "rows"}, ValueError, "normalizer is 'rows'"),
    "gradient": ({"gradient": "forward"}, ValueError, "expected one of 'backward', 'inplace'"),
    "unknown": ({"label_smoothing": 0.1}, TypeError, "unexpected keyword argument 'label_smoothing'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    given, error, text = WRONG[case]
    logits, target = cases.random_case(6, 5)
    for ours, _, _ in LOSSES.values():
        with pytest.raises(error, match=text):
            ours(**{"input": logits, "target": target, **given})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("poly", math.inf, ValueError),
        ("poly", torch.tensor(1.0), TypeError),
        ("generalized", 1.5, ValueError),
        ("generalized", -0.1, ValueError),
        ("generalized", 1e-42, ValueError),
        ("generalized", "0.7", TypeError),
    ],
)
def test_wrong_hyperparameters(name: str, value: Any, error: type[Exception]) -> None:
    ours, option, _ = LOSSES[name]
    with pytest.raises(error, match=f"{option} is "):
        ours(*cases.random_case(6, 5), value)
