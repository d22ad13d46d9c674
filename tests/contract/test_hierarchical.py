"""Promise: hierarchical cross-entropy is the paper's sum over the path of the target, exact at any confidence."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import hierarchy_cases
import longtail
from hierarchy_cases import TREES, losses, tree
from kernels import CPU, GPU, TRITON, Operators, over
from longtail import Hierarchy, hierarchical_cross_entropy
from tolerances import assert_close, assert_same

ALPHA = 0.3


def differentiated(
    kernels: Operators, mode: str, logits: Tensor, target: Tensor, hierarchy: Hierarchy, up: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of their sum times ``up``, on the CPU."""
    device = kernels.device
    leaf = logits.detach().clone().to(device).requires_grad_()
    given = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in options.items()}
    with longtail.use_backend(kernels.backend):
        loss = hierarchical_cross_entropy(
            leaf.clone(), target.to(device), hierarchy, gradient=mode, reduction="none", **given
        )
        loss.backward(up.to(device))
    assert leaf.grad is not None
    return loss.detach().cpu(), leaf.grad.cpu()


@pytest.mark.parametrize(
    ("kernels", "name", "dtype"),
    [
        *over(CPU, TREES, cases.DTYPES[:2]),
        *over(CPU | GPU, ["small", "shuffled", "deep"], cases.DTYPES[2:]),
        *over(GPU, TREES, cases.DTYPES[1:2]),
        *over(TRITON, ["two", "small", "deep"], cases.DTYPES[1:2]),
    ],
)
def test_the_papers_formula(kernels: Operators, name: str, dtype: torch.dtype) -> None:
    """In every mode, with every option; ignored rows hold NaN and infinities."""
    hierarchy, names = tree(name)
    logits, target = cases.random_case(6, len(names), dtype)
    logits = cases.poison_ignored(logits, target)
    options = hierarchy_cases.vectors(len(names), 6, dtype)
    up = torch.randn(6, generator=cases.generator(4)).to(cases.vector_dtype(dtype))
    found = []
    for wide in (torch.float64, cases.vector_dtype(dtype)):
        x = logits.to(wide).requires_grad_()
        loss = losses(x, target, names, ALPHA, **options)
        found.append((loss.detach(), *torch.autograd.grad(loss, x, up.to(wide))))
    (truth, true_grad), (eager, eager_grad) = found
    for mode in cases.MODES:
        loss, grad = differentiated(kernels, mode, logits, target, hierarchy, up, alpha=ALPHA, **options)
        assert loss.dtype == cases.vector_dtype(dtype)
        assert grad.dtype == dtype
        factor = 2 * kernels.gradient_factor(dtype)
        assert_close(loss, truth, eager, what=f"loss {mode}", factor=2)
        assert_close(grad, true_grad, eager_grad, what=f"gradient {mode}", factor=factor)
        assert (grad[target == cases.IGNORE] == 0).all()
        if dtype == torch.float64:
            assert grad.sum(1).abs().max() < 1e-13


@pytest.mark.parametrize(
    ("kernels", "name", "dtype", "biased"),
    over({"cpu": CPU["cpu"]} | GPU, ["ordered", "shuffled"], [torch.float32, torch.bfloat16], [False, True]),
)
def test_every_target_of_a_large_tree(kernels: Operators, name: str, dtype: torch.dtype, biased: bool) -> None:
    """Below nodes of one class to nearly all, in one batch, against the reference in float64."""
    hierarchy, names = tree(name)
    logits = (3 * torch.randn(len(names), len(names), generator=cases.generator(0))).to(dtype)
    target = torch.arange(len(names))
    options = hierarchy_cases.vectors(len(names), len(names), dtype)
    if not biased:
        del options["class_bias"]
    up = torch.randn(len(names), generator=cases.generator(4))
    wide = {k: x.double() for k, x in options.items()}
    truth = differentiated(CPU["reference"], "forward", logits.double(), target, hierarchy, up.double(), **wide)
    for mode in ("backward", "inplace"):
        found = differentiated(kernels, mode, logits, target, hierarchy, up, **options)
        for got, want in zip(found, truth, strict=True):
            assert_close(got, want, factor=4)


@pytest.mark.parametrize("kernels", over(CPU | GPU))
@pytest.mark.parametrize(("name", "alpha"), [("shuffled", 0.0), ("deep_ordered", 0.0), ("flat", 0.7)])
def test_it_is_cross_entropy_where_nothing_is_weighted(kernels: Operators, name: str, alpha: float) -> None:
    hierarchy, names = tree(name)
    logits, target = cases.random_case(5, len(names), torch.float64)
    up = torch.randn(5, generator=cases.generator(4), dtype=torch.float64)
    x = logits.clone().requires_grad_()
    truth = longtail.cross_entropy(x, target, reduction="none")
    (true_grad,) = torch.autograd.grad(truth, x, up)
    loss, grad = differentiated(kernels, "backward", logits, target, hierarchy, up, alpha=alpha)
    factor = torch.tensor(-alpha, dtype=torch.float64).exp()
    assert_close(loss, truth.detach() * factor)
    assert_close(grad, true_grad * factor)


@pytest.mark.parametrize("kernels", over(CPU | TRITON | GPU))
def test_only_children_contribute_nothing(kernels: Operators) -> None:
    chain = Hierarchy.from_paths(["a/b/c"])
    logits, up = torch.tensor([[3.0], [-1e4]]), torch.ones(2)
    for x in differentiated(kernels, "backward", logits, torch.zeros(2, dtype=torch.int64), chain, up):
        assert (x == 0).all()
    logits, target = cases.random_case(6, 4, ignore=False)
    with_chains = Hierarchy.from_paths(["a/x/y/1", "a/x/y/2", "b/z/3", "b/z/4"])
    without = Hierarchy.from_paths(["a/1", "a/2", "b/3", "b/4"])
    one = differentiated(kernels, "forward", logits, target, with_chains, torch.ones(6), alpha=0.0)
    two = differentiated(kernels, "forward", logits, target, without, torch.ones(6), alpha=0.0)
    for x, y in zip(one, two, strict=True):
        assert_same(x, y)


def exact(u: list[float], alpha: float) -> tuple[float, list[float]]:
    """Loss and gradient of the first class of ("t/g/x", "t/g/y", "t/z", "o"), in as many digits as it takes."""
    with localcontext() as context:
        context.prec = 80
        e = [(Decimal(x) - Decimal(max(u))).exp() for x in u]
        sets = [[0, 1, 2, 3], [0, 1, 2], [0, 1], [0]]
        sums = [sum((e[j] for j in each), Decimal(0)) for each in sets]
        loss, grad = Decimal(0), [Decimal(0)] * 4
        for level in (1, 2, 3):
            weight = (Decimal(-alpha) * level).exp()
            ratio = (sums[level - 1] - sums[level]) / sums[level]
            rest = [e[j] / sums[level] for j in sets[level - 1] if j not in sets[level]]
            nll = sum(rest, Decimal(0)) if ratio < Decimal("1e-40") else (1 + ratio).ln()
            loss += weight * nll
            for j in sets[level - 1]:
                grad[j] += weight * e[j] / sums[level - 1]
            for j in sets[level]:
                grad[j] -= weight * e[j] / sums[level]
        return float(loss), [float(x) for x in grad]


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 4e-6)])
@pytest.mark.parametrize("kernels", over(CPU | TRITON | GPU))
@pytest.mark.parametrize(("shuffled", "alpha"), [(False, ALPHA), (True, ALPHA), (False, 2.0), (True, 10.0)])
def test_saturation_at_each_level(
    kernels: Operators, shuffled: bool, alpha: float, dtype: torch.dtype, allowed: float
) -> None:
    """Not to a share of the largest number: every loss and every gradient has its own digits."""
    order = [2, 0, 3, 1] if shuffled else [0, 1, 2, 3]  # the column of each
    names = ["t/g/x", "t/g/y", "t/z", "o"]
    hierarchy = Hierarchy.from_paths([names[order.index(j)] for j in range(4)])
    rows = []
    for margin in (0.0, 17.0, 20.0, 50.0, 100.0, 1e4):
        for sign in (1.0, -1.0):
            rows += [[0.0, 0.5, 0.25, sign * margin], [0.0, 0.5, sign * margin, 0.25], [0.0, sign * margin, 0.5, 0.25]]
            rows += [[sign * margin, 0.0, 0.5, 0.25], [sign * margin, sign * margin, 0.5, -0.25]]
    u = torch.tensor(rows, dtype=dtype)
    logits, target = torch.empty_like(u), torch.full((len(rows),), order[0])
    logits[:, order] = u
    up = torch.ones(len(rows), dtype=dtype)
    loss, grad = differentiated(kernels, "forward", logits, target, hierarchy, up, alpha=alpha)
    smallest = torch.finfo(dtype).tiny * 16  # below, numbers lose their digits
    if kernels.backend == "triton" or dtype == torch.float32:
        smallest = max(smallest, 1e-36)
    for row, got_loss, got in zip(rows, loss.double(), grad[:, order].double(), strict=True):
        want_loss, want = exact(row, alpha)
        assert abs(got_loss.item() - want_loss) <= allowed * want_loss + smallest, (row, got_loss, want_loss)
        for x, y in zip(got.tolist(), want, strict=True):
            # lambda_{k+1} - sum ... cancels where both are of a size.
            assert abs(x - y) <= 8 * allowed * abs(y) + smallest or abs(x - y) <= 1e-2 * allowed * abs(y) ** 0.5, (
                row,
                got,
                want,
            )


@pytest.mark.parametrize("kernels", over(CPU | TRITON | GPU))
@pytest.mark.parametrize("name", ["small", "shuffled", "deep_ordered"])
def test_infinite_and_undefined_logits(kernels: Operators, name: str) -> None:
    hierarchy, names = tree(name)
    logits, target = cases.random_case(7, len(names), ignore=False)
    whole = [j for j, each in enumerate(names) if each[0] != names[int(target[0])][0]]
    logits[0, whole] = -torch.inf  # all that is not below the same topmost node
    logits[1, (target[1] + 1) % len(names)] = -torch.inf
    logits[2, target[2]] = -torch.inf
    logits[3] = -torch.inf
    logits[4, (target[4] + 2) % len(names)] = torch.nan
    logits[5, target[5]] = torch.nan
    loss, grad = differentiated(kernels, "forward", logits, target, hierarchy, torch.ones(7), alpha=ALPHA)
    finite = torch.tensor([0, 1, 6])
    x = logits[finite].double().requires_grad_()
    truth = losses(x, target[finite], names, ALPHA)
    assert_close(loss[finite], truth.detach(), factor=2)
    assert loss[2] == torch.inf
    assert grad[2].isfinite().all()
    assert abs(grad[2].sum()) < 1e-6
    assert grad[2, target[2]] < -0.1
    for row in (3, 4, 5):
        assert loss[row].isnan()
        assert grad[row].isnan().any()
    assert (grad[0, whole] == 0).all()
    assert grad[finite].isfinite().all()


@pytest.mark.parametrize("kernels", over(CPU | GPU))
@pytest.mark.parametrize("mode", cases.MODES)
def test_reductions_and_normalizers(kernels: Operators, mode: str) -> None:
    hierarchy, names = tree("small")
    device = kernels.device
    logits, target = cases.random_case(6, len(names))
    logits, target = cases.poison_ignored(logits, target).to(device), target.to(device)
    given = {name: x.to(device) for name, x in hierarchy_cases.vectors(len(names), 6, torch.float32).items()}
    counted = target != cases.IGNORE
    weights = given["weight"][target.clamp(min=0)][counted].sum()
    for reduction, normalizer, divisor in (
        ("sum", None, 1.0),
        ("mean", None, weights),
        ("mean", "count", counted.sum()),
        ("mean", 7.0, 7.0),
        ("mean", torch.tensor(3.0), 3.0),
    ):
        with longtail.use_backend(kernels.backend):
            one, two = (logits.clone().requires_grad_() for _ in range(2))
            rows = hierarchical_cross_entropy(one, target, hierarchy, **given, reduction="none")
            loss = hierarchical_cross_entropy(
                two * 1, target, hierarchy, **given, reduction=reduction, normalizer=normalizer, gradient=mode
            )
            (rows.sum() / divisor).backward()
            (2 * loss).backward()
        assert_close(loss, (rows.sum() / divisor).double())
        assert_close(two.grad, 2 * one.grad.double())


@pytest.mark.parametrize("kernels", over(CPU | GPU))
@pytest.mark.parametrize("mode", cases.MODES)
def test_nothing_counts(kernels: Operators, mode: str) -> None:
    hierarchy, names = tree("small")
    for rows in (0, 3):
        x = torch.full((rows, len(names)), torch.nan, device=kernels.device, requires_grad=True)
        target = torch.full((rows,), cases.IGNORE, device=kernels.device)
        with longtail.use_backend(kernels.backend):
            loss = hierarchical_cross_entropy(x * 1, target, hierarchy, gradient=mode)
            (grad,) = torch.autograd.grad(loss, x)
            none = hierarchical_cross_entropy(x, target, hierarchy, normalizer="count")
        assert loss.isnan()
        assert none == 0
        assert grad.shape == x.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("kernels", over(CPU | TRITON | GPU))
@pytest.mark.parametrize("layout", ["row_stride", "offset", "transposed"])
@pytest.mark.parametrize("name", ["small", "ordered"])
def test_layouts(kernels: Operators, name: str, layout: str) -> None:
    hierarchy, names = tree(name)
    logits, target = cases.random_case(5, len(names))
    up = torch.ones(()).expand(5)
    truth = differentiated(kernels, "backward", logits, target, hierarchy, up)
    laid = cases.LAYOUTS[layout](logits)
    strided = target.repeat_interleave(3)[::3]
    with longtail.use_backend(kernels.backend):
        leaf = laid.to(kernels.device).requires_grad_()
        loss = hierarchical_cross_entropy(leaf, strided.to(kernels.device), hierarchy, reduction="none")
        loss.backward(up.to(kernels.device))
    assert leaf.grad is not None
    assert_close(loss.detach().cpu(), truth[0].double())
    assert_close(leaf.grad.cpu(), truth[1].double())
