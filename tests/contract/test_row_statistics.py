"""Promise: `row_statistics` is exact in value and gradient, whatever loss is written of it, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from kernels import CPU, GPU, TRITON, Operators, over
from longtail.reference.row_statistics import RowStatistics
from statistics_cases import FIELDS, SETS, defined, options, weighted
from tolerances import assert_close, assert_same


def compare(kernels: Operators, logits: Tensor, target: Tensor, name: str, device: str = "cpu") -> None:
    dtype = logits.dtype
    given = options(name, logits.shape[1], dtype)
    truth_x = logits.double().requires_grad_()
    truth = defined(truth_x, target, **cases.to_float64(given))
    eager_x = logits.to(cases.vector_dtype(dtype)).requires_grad_()
    eager = defined(eager_x, target, **given)
    placed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
    x = logits.to(device).requires_grad_()
    with longtail.use_backend(kernels.backend):
        found = longtail.row_statistics(x, target.to(device), **placed)
        (grad,) = torch.autograd.grad(weighted(found), x)
    for field, got, want, other in zip(FIELDS, found[:5], truth, eager, strict=True):
        assert got.dtype == cases.vector_dtype(dtype)
        assert_close(got.cpu(), want, other, what=field, factor=2)
    (true_grad,), (eager_grad,) = (torch.autograd.grad(weighted(v), y) for v, y in ((truth, truth_x), (eager, eager_x)))
    factor = 2 * kernels.gradient_factor(dtype)
    assert_close(grad.cpu(), true_grad, eager_grad.to(dtype), what="gradient", factor=factor)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("kernels", "size", "dtype"),
    [
        *over(CPU, [(7, 1), (9, 2), (8, 3), (6, 127), (5, 1000)], cases.DTYPES),
        *over(TRITON, [(7, 1), (9, 2), (6, 127)], cases.DTYPES[1:]),
        *over(GPU, [(7, 1), (9, 2), (6, 127), (5, 1000), (3, 50257)], cases.DTYPES[1:]),
    ],
)
def test_definition(kernels: Operators, size: tuple[int, int], dtype: torch.dtype, name: str) -> None:
    logits, target = cases.random_case(*size, dtype)
    compare(kernels, cases.poison_ignored(logits, target), target, name, kernels.device)


@pytest.mark.parametrize("margin", cases.MARGINS)
@pytest.mark.parametrize(("kernels", "dtype"), over(CPU | TRITON | GPU, [torch.float32, torch.bfloat16]))
def test_saturation(kernels: Operators, dtype: torch.dtype, margin: float) -> None:
    logits, target = cases.margin_case(margin, 11, dtype)
    compare(kernels, logits, target, "plain", kernels.device)


@pytest.mark.parametrize("kernels", CPU.values(), ids=CPU)
def test_entropy_of_a_confident_row_keeps_its_digits(kernels: Operators) -> None:
    """1 - p_g is 1e-30: what is made of a rounded p_g has no digit there."""
    gap = 30 * torch.log(torch.tensor(10.0)).item()
    x = torch.tensor([[gap, 0.0, -1.0, -torch.inf]], requires_grad=True)
    with longtail.use_backend(kernels.backend):
        found = longtail.row_statistics(x, torch.tensor([0]))
    miss = torch.tensor([0.0, -1.0], dtype=torch.float64) - gap
    expected = -(miss.exp() * miss).sum() + miss.exp().sum()
    assert_close(found.entropy, expected[None], factor=10)  # of exp(-69), whose argument is rounded
    assert found.log_miss.item() == pytest.approx(miss.logsumexp(0).item(), rel=1e-6)
    assert 0 < -found.log_prob.item() < 2e-30
    (grad,) = torch.autograd.grad(found.entropy.sum(), x)
    z = x.detach().double().requires_grad_()
    log_p = z[0, :3] - z[0, :3].logsumexp(0)
    log_p = torch.cat([-torch.log1p((z[0, 1:3] - z[0, 0]).exp().sum())[None] + 0 * log_p[:1], log_p[1:]])
    (expected_grad,) = torch.autograd.grad(-(log_p.exp() * log_p).sum(), z)
    assert_close(grad, expected_grad, factor=10)
    assert grad.abs().max() > 1e-29


@pytest.mark.parametrize("field", ["entropy", "complement_entropy"])
def test_a_dominating_other_class_keeps_the_digits_of_its_gradient(field: str) -> None:
    """What cancels in it is the mean of the others' logits against the largest: nothing may add and take 1."""
    for gap in (12.0, 18.0, 25.0):
        x = torch.tensor([[0.0, 0.0, gap, -0.5]], requires_grad=True)
        z = x.detach().double().requires_grad_()
        index = FIELDS.index(field)
        (grad,) = torch.autograd.grad(longtail.row_statistics(x, torch.tensor([0]))[index].sum(), x)
        (truth,) = torch.autograd.grad(defined(z, torch.tensor([0]))[index].sum(), z)
        assert (grad.double() - truth).abs().max() < 2e-5 * truth.abs().max(), gap
        assert abs(grad.sum().item()) < 1e-6 * grad.abs().max().item(), gap


def test_gradcheck_of_each_statistic_alone_and_of_all() -> None:
    logits, target = cases.random_case(5, 7, torch.float64)
    logits.requires_grad_()
    given = options("mixed", 7, torch.float64)
    for take in ([0], [1], [2], [3], [4], [0, 1, 2, 3, 4]):

        def chosen(z: Tensor, take: list[int] = take) -> tuple[Tensor, ...]:
            found = longtail.row_statistics(z, target, **given)
            return tuple(found[i] for i in take)

        assert torch.autograd.gradcheck(chosen, logits)


@pytest.mark.parametrize("infinite", ["others", "target", "all_others", "best"])
def test_infinite_logits(infinite: str) -> None:
    x = torch.tensor([[0.3, -0.2, 1.0, 0.4]], dtype=torch.float64)
    change = {"others": (1, -torch.inf), "target": (0, -torch.inf), "best": (0, torch.inf)}
    if infinite == "all_others":
        x[0, 1:] = -torch.inf
    else:
        index, value = change[infinite]
        x[0, index] = value
    x.requires_grad_()
    found = longtail.row_statistics(x, torch.tensor([0]))
    (grad,) = torch.autograd.grad(sum(v.sum() for v in found[:5]), x)
    others = torch.tensor([-0.2, 1.0, 0.4], dtype=torch.float64)
    entropy = -(others.softmax(0) * others.log_softmax(0)).sum().item()
    expected: dict[str, list[float]] = {
        "target": [-torch.inf, 0.0, others.logsumexp(0).item(), entropy, entropy],
        "all_others": [0.0, -torch.inf, 0.3, 0.0, 0.0],
    }
    if infinite == "others":
        want = longtail.row_statistics(x.detach()[:, [0, 2, 3]], torch.tensor([0]))
        assert all(torch.allclose(a, b) for a, b in zip(found, want, strict=True))
        assert grad[0, 1] == 0
    elif infinite == "best":  # inf - inf: no probability, as in torch
        assert found.log_prob.isnan().all()
    else:
        for got, value in zip(found[:5], expected[infinite], strict=True):
            assert got.item() == pytest.approx(value, abs=1e-12)
    assert grad.isfinite().all() or infinite == "best"


@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (3, 5, 0), (0, 5, 2), (5,)], ids=str)
def test_few_and_no_rows(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=cases.generator(0), requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:] if len(shape) > 1 else (), dtype=torch.int64)
    found = longtail.row_statistics(x, target)
    assert all(v.shape == target.shape for v in found)
    (grad,) = torch.autograd.grad(sum(v.sum() for v in found[:5] if v is not found.log_miss), x)
    assert grad.shape == x.shape
    if shape == (3, 1):
        assert_same(found.log_miss, torch.full((3,), -torch.inf))
        assert_same(found.entropy, torch.zeros(3))
        assert_close(grad, torch.ones(3, 1, dtype=torch.float64))  # of lse alone


def test_only_ignored_rows_and_infinite_upstream() -> None:
    x = torch.full((4, 5), torch.nan, requires_grad=True)
    found = longtail.row_statistics(x, torch.full((4,), -100))
    for value in found:
        assert_same(value.detach(), torch.zeros_like(value))
    (grad,) = torch.autograd.grad(found.entropy, x, torch.full((4,), torch.inf))
    assert_same(grad, torch.zeros(4, 5))


@pytest.mark.parametrize("ignore_index", [-1, 2, 300])
def test_ignore_index(ignore_index: int) -> None:
    logits, target = cases.random_case(6, 5, ignore=False)
    target[1] = ignore_index
    found = longtail.row_statistics(logits, target, ignore_index=ignore_index)
    assert found.lse[1] == 0
    assert (found.lse != 0).sum() == (target != ignore_index).sum()
    if ignore_index != -1:
        target[2] = -1
        with pytest.raises(IndexError, match="target -1 in row 2"):
            longtail.row_statistics(logits, target, ignore_index=ignore_index)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "temperature_zero": ({"temperature": 0}, ValueError, "temperature is 0.0, expected a positive number"),
    "temperature_negative": ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
    "temperature_tensor": ({"temperature": torch.tensor(1.0)}, TypeError, r"temperature\.item\(\)"),
    "temperature_nan": ({"temperature": float("nan")}, ValueError, "temperature is nan"),
    "softcap": ({"softcap": -2.0}, ValueError, "softcap"),
    "bias": ({"class_bias": torch.zeros(4)}, ValueError, r"class_bias has shape \[4\], expected \[5\]"),
    "target": ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "target has shape"),
    "probabilities": ({"target": torch.rand(6, 5)}, TypeError, "expected an integer dtype"),
    "input": ({"input": torch.zeros(6, 5, dtype=torch.int64)}, TypeError, "input has dtype torch.int64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    given, error, text = WRONG[case]
    logits, target = cases.random_case(6, 5)
    with pytest.raises(error, match=text):
        longtail.row_statistics(**{"input": logits, "target": target, **given})


@pytest.mark.parametrize("gamma", cases.GAMMAS)
def test_focal_loss_written_of_them(gamma: float) -> None:
    for margin in (0.0, 20.0, 100.0):
        logits, target = cases.margin_case(margin, 7, torch.float64)
        x = logits.requires_grad_()
        found = longtail.row_statistics(x, target)
        loss = -((gamma * found.log_miss).exp() * found.log_prob).sum()
        want = longtail.focal_loss(x, target, gamma=gamma, reduction="sum")
        assert_close(loss, want)
        grads = [torch.autograd.grad(v, x)[0] for v in (loss, want)]
        assert_close(grads[0], grads[1], factor=10)


def test_statistics_of_losses_are_detached() -> None:
    logits, target = cases.random_case(6, 9)
    x = logits.requires_grad_()
    _, found = longtail.cross_entropy(x, target, focal_gamma=2.0, return_stats=True)
    for field, got, want in zip(RowStatistics._fields, found, longtail.row_statistics(x, target), strict=True):
        assert not got.requires_grad, field
        assert_same(got, want.detach(), field)
