"""Promise: scales, mitigation and compensation are the losses of their papers, and nothing where they are neutral."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from kernels import CPU, TRITON, Operators, over
from tolerances import assert_close, assert_same

COUNTS = [4000, 3, 900, 250, 1, 60, 17, 2000, 8, 120, 33]
N = torch.tensor(COUNTS, dtype=torch.float64)
CLASSES = len(COUNTS)
pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(params=over(CPU | TRITON))
def kernels(request: pytest.FixtureRequest) -> Iterator[Operators]:
    with longtail.use_backend(request.param.backend):
        yield request.param


def gradient(logits: Tensor, target: Tensor, call: Any) -> tuple[Tensor, Tensor]:
    x = logits.detach().clone().requires_grad_()
    loss = call(x, target)
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss) * 0.7)
    return loss.detach(), grad


def log_softmax_row(u: list[Tensor], g: int) -> Tensor:
    return u[g] - torch.logsumexp(torch.stack(u), 0)


def vector_scaling(z: Tensor, g: int) -> Tensor:
    delta, iota = (N / N.max()) ** 0.15, 1.25 * (N / N.sum()).log()
    return -log_softmax_row([delta[j] * z[j] + iota[j] for j in range(CLASSES)], g)


def cdt(z: Tensor, g: int) -> Tensor:
    return -log_softmax_row([z[j] / (N.max() / N[j]) ** 0.2 for j in range(CLASSES)], g)


def immax(z: Tensor, g: int) -> Tensor:
    rho = 2.0 * N ** (1 / 3) / (N ** (1 / 3)).mean()
    return -log_softmax_row([z[j] / rho[g] for j in range(CLASSES)], g)


def gca(z: Tensor, g: int) -> Tensor:
    return N.sum() / N[g] * immax(z, g)


def seesaw(z: Tensor, g: int) -> Tensor:
    """Pair by pair, as the paper writes it: probabilities and their ratios."""
    sigma, below = z.detach().softmax(0), z[g].exp()
    for j in range(CLASSES):
        if j != g:
            mitigation = (N[j] / N[g]) ** 0.8 if N[g] > N[j] else 1.0
            compensation = (sigma[j] / sigma[g]) ** 2.0 if sigma[j] > sigma[g] else 1.0
            below = below + mitigation * compensation * z[j].exp()
    return -(z[g].exp() / below).log()


PAPERS: dict[str, tuple[Any, Any]] = {
    "vector_scaling": (vector_scaling, lambda d: longtail.vector_scaling(COUNTS, 0.15, 1.25, dtype=d)),
    "cdt": (cdt, lambda d: {"class_scale": longtail.cdt_scale(COUNTS, 0.2, dtype=d)}),
    "immax": (immax, lambda d: {"target_scale": longtail.immax_scale(COUNTS, 2.0, dtype=d)}),
    "gca": (
        gca,
        lambda d: {"target_scale": longtail.immax_scale(COUNTS, 2.0, dtype=d), "weight": (N.sum() / N).to(d)},
    ),
    "seesaw": (
        seesaw,
        lambda d: {"class_mitigation": longtail.seesaw_mitigation(COUNTS, dtype=d), "compensation": 2.0},
    ),
}


@pytest.mark.parametrize("dtype", cases.DTYPES[:3], ids=cases.name)
@pytest.mark.parametrize("paper", PAPERS)
def test_against_the_formula_of_the_paper(paper: str, dtype: torch.dtype, kernels: Operators) -> None:
    logits, target = cases.random_case(12, CLASSES, dtype, ignore=False, spread=2.0)
    formula, options = PAPERS[paper]
    wide = cases.vector_dtype(dtype)

    def call(x: Tensor, y: Tensor) -> Tensor:
        return longtail.cross_entropy(x, y, reduction="none", **options(wide))

    def truth(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([formula(row, int(g)) for row, g in zip(x, y, strict=True)])

    loss, grad = gradient(logits, target, call)
    expected, expected_grad = gradient(logits.double(), target, truth)
    with longtail.use_backend("reference"):
        eager, eager_grad = gradient(logits.to(wide), target, call)
    factor = 2.0 if dtype == torch.float64 else 2 * kernels.gradient_factor(dtype)
    assert_close(loss, expected, eager, what="loss", factor=2)
    assert_close(grad, expected_grad, eager_grad.to(dtype), what="gradient", factor=factor)


@pytest.mark.parametrize("shape", [(9, CLASSES), (2, CLASSES, 3, 5)])
def test_seesaw_loss_is_its_options(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, generator=cases.generator(3))
    target = torch.randint(CLASSES, (shape[0], *shape[2:]), generator=cases.generator(4))
    options = {"class_mitigation": longtail.seesaw_mitigation(COUNTS, 0.3), "compensation": 1.4}
    assert_same(
        longtail.seesaw_loss(logits, target, COUNTS, 0.3, 1.4), longtail.cross_entropy(logits, target, **options)
    )


NEUTRAL: dict[str, dict[str, Any]] = {
    "class_scale": {"class_scale": torch.ones(CLASSES)},
    "target_scale": {"target_scale": torch.ones(CLASSES)},
    "class_mitigation": {"class_mitigation": torch.full((CLASSES,), -3.7)},
    "nothing_to_compensate": {"compensation": 2.0},
    "all": {
        "class_scale": torch.ones(CLASSES),
        "target_scale": torch.ones(CLASSES),
        "class_mitigation": torch.zeros(CLASSES),
        "compensation": 2.0,
    },
}
WITH: dict[str, dict[str, Any]] = {
    "alone": {},
    "others": {"label_smoothing": 0.1, "softcap": 20.0, "focal_gamma": 1.5, "complement_gamma": -1.0, "z_loss": 1e-3},
}


@pytest.mark.parametrize("beside", WITH)
@pytest.mark.parametrize("option", NEUTRAL)
def test_neutral_vectors_change_no_bit(option: str, beside: str) -> None:
    """Of rows whose target leads, where compensation has nothing to do."""
    for shape in ((8, CLASSES), (4, CLASSES, 6)):
        logits = torch.randn(shape, generator=cases.generator(5))
        target = logits.argmax(1)
        others = {"reduction": "none", "class_bias": torch.zeros(CLASSES), **WITH[beside]}
        plain = gradient(logits, target, lambda x, y: longtail.cross_entropy(x, y, **others))  # noqa: B023
        found = gradient(logits, target, lambda x, y: longtail.cross_entropy(x, y, **others, **NEUTRAL[option]))  # noqa: B023
        for a, b in zip(found, plain, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("option_set", ["vector_scaling", "target_scale", "seesaw", "tail_linear"])
def test_permuting_the_classes_permutes_the_gradient(option_set: str) -> None:
    logits, target = cases.random_case(9, 23, torch.float64)
    options = cases.options(option_set, 23, target, torch.float64) | {"reduction": "none"}
    order = torch.randperm(23, generator=cases.generator(6))
    moved = {k: v[order] if isinstance(v, Tensor) and k != "sample_weight" else v for k, v in options.items()}
    new_target = torch.where(target == cases.IGNORE, cases.IGNORE, order.argsort()[target.clamp(min=0)])
    loss, grad = gradient(logits, target, lambda x, y: longtail.cross_entropy(x, y, **options))
    loss_moved, grad_moved = gradient(logits[:, order], new_target, lambda x, y: longtail.cross_entropy(x, y, **moved))
    torch.testing.assert_close(loss_moved, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_moved, grad[:, order], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("option_set", ["target_scale", "mitigation", "seesaw"])
def test_a_number_added_to_all_logits_of_a_row_changes_nothing(option_set: str) -> None:
    """Nor one added to all of class_mitigation; with class_scale it does, as with softcap and z_loss."""
    logits, target = cases.random_case(9, 23, torch.float64)
    options = cases.options(option_set, 23, target, torch.float64) | {"reduction": "none"}
    shifted = dict(options)
    if "class_mitigation" in options:
        shifted["class_mitigation"] = options["class_mitigation"] + 4.5
    a = gradient(logits, target, lambda x, y: longtail.cross_entropy(x, y, **options))
    b = gradient(logits + 3.25, target, lambda x, y: longtail.cross_entropy(x, y, **shifted))
    for found, expected in zip(b, a, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    scaled = cases.options("vector_scaling", 23, target, torch.float64)
    one, other = (longtail.cross_entropy(logits + c, target, **scaled) for c in (0.0, 3.25))
    assert (one - other).abs() > 1e-3


def test_scales_of_classes_and_targets_multiply() -> None:
    """Twice the one and half the other are the same, and so is ``scale`` in the place of equal ones."""
    logits, target = cases.random_case(9, 23)
    options = cases.options("mixed_tail", 23, target)
    moved = options | {"class_scale": options["class_scale"] * 2, "target_scale": options["target_scale"] / 2}
    assert_same(longtail.cross_entropy(logits, target, **moved), longtail.cross_entropy(logits, target, **options))
    by_class = longtail.cross_entropy(logits, target, class_scale=torch.full((23,), 2.0))
    assert_same(by_class, longtail.cross_entropy(logits, target, target_scale=torch.full((23,), 2.0)))
    assert_close(by_class, longtail.cross_entropy(logits.double(), target, scale=2.0))


@pytest.mark.parametrize("margin", [20.0, 100.0, 1e4])
def test_seesaw_far_from_the_target(margin: float, kernels: Operators) -> None:
    """Compensation multiplies the margin; nothing overflows, and the gradient keeps its digits."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, target = cases.margin_case(margin, 19, dtype, rows=8)
        options = cases.options("seesaw", 19, target) | {"reduction": "none"}
        loss, grad = gradient(logits, target, lambda x, y: longtail.cross_entropy(x, y, **options))  # noqa: B023
        wide = cases.to_float64(options)
        with longtail.use_backend("reference"):
            truth = gradient(logits.double(), target, lambda x, y: longtail.cross_entropy(x, y, **wide))  # noqa: B023
            eager = gradient(logits.float(), target, lambda x, y: longtail.cross_entropy(x, y, **options))  # noqa: B023
        assert_close(loss, truth[0], eager[0], what="loss")
        assert_close(grad, truth[1], eager[1].to(dtype), what="gradient", factor=2 * kernels.gradient_factor(dtype))
