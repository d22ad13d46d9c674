"""Promise: the asymmetric loss is the paper's formula, exact for every logit, and goes with every way of the family."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from multi_label_cases import KINDS, TWICE, data, dense, reduced, with_grad
from tolerances import assert_close, assert_same

BACKENDS = ("cpu", "reference")
# gamma_positive, gamma_negative, clip: the default, off, and exponents that are whole, equal, broken or 0.
SETS = ((1.0, 4.0, 0.05), (0.0, 0.0, 0.0), (0.0, 0.0, 0.2), (0.5, 0.5, 0.05), (2.0, 1.5, 0.9), (0.0, 2.0, 1e-6))


def formula(
    z: Tensor,
    y: Tensor,
    gamma_positive: Any = 1.0,
    gamma_negative: float = 4.0,
    clip: float = 0.05,
    detach: bool = True,
) -> Tensor:
    """Of each element; autograd differentiates it. For logits from -700 to 700 in float64."""
    shifted = (torch.sigmoid(z) - clip).clamp(min=0)
    log_miss = torch.log1p(-shifted) if clip else F.logsigmoid(-z)
    terms = y * F.logsigmoid(z) + (1 - y) * log_miss
    base = y * torch.sigmoid(-z) + (1 - y) * shifted
    base = base.masked_fill(base == 0, 1.0)  # where the other factor is 0
    factor = base ** (y * gamma_positive + (1 - y) * gamma_negative)
    return -(factor.detach() if detach else factor) * terms


def eager(z: Tensor, y: Tensor, gamma_negative: float, gamma_positive: float, clip: float, eps: float) -> Tensor:
    """As widely used code computes it: both probabilities, the shift, logarithms cut off at eps."""
    p = z.sigmoid()
    hit = (1 - p + clip).clamp(max=1)
    cost = y * p.clamp(min=eps).log() + (1 - y) * hit.clamp(min=eps).log()
    weight = (1 - p * y - hit * (1 - y)) ** (gamma_positive * y + gamma_negative * (1 - y))
    return -cost * weight


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(9, 37), (2, 5, 3, 4)], ids=str)
def test_the_papers_formula(shape: tuple[int, ...], kind: str, dtype: torch.dtype, backend: str) -> None:
    z, y = data(shape, kind, dtype)
    truth = dense(y, z)
    for numbers in SETS:
        for detach in (True, False):
            options = {"detach": detach, "reduction": "none"}
            with longtail.use_backend(backend):
                found = with_grad(lambda x, n=numbers, o=options: longtail.asymmetric_loss(x, y, *n, **o), z)
            exact = with_grad(lambda x, n=numbers, d=detach: formula(x, truth, *n, d), z.double())
            naive = with_grad(lambda x, n=numbers, d=detach: formula(x, truth.to(x), *n, d), z.to(found[0].dtype))
            assert_close(found[0], exact[0], naive[0], what=f"{numbers} loss")
            assert_close(found[1], exact[1], naive[1].to(dtype), what=f"{numbers} gradient", factor=2)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "rows", "none"])
@pytest.mark.parametrize("kind", ["class", "soft"])
def test_reductions_and_modes(kind: str, reduction: str, mode: str) -> None:
    for shape in ((6, 11), (2, 4, 5), (3, 1)):
        z, y = data(shape, kind)
        truth = dense(y, z)
        options = {"reduction": reduction, "gradient": mode}
        found = with_grad(lambda x, y=y, o=options: longtail.asymmetric_loss(x, y, **o), z)
        exact = with_grad(lambda x, t=truth: reduced(formula(x, t), reduction), z)
        for got, expected in zip(found, exact, strict=True):
            assert_close(got, expected, what=str(shape), factor=4)


@pytest.mark.parametrize("detach", [True, False])
def test_the_reference_differentiates_itself(detach: bool) -> None:
    z, y = data((5, 7), "soft")
    options = {"gamma": 1.0, "gamma_negative": 4.0, "clip": 0.05, "detach": detach, "elementwise": True}
    found = with_grad(lambda x: longtail.reference.sigmoid_loss(x, y, **options), z)
    for got, expected in zip(found, with_grad(lambda x: formula(x, y, detach=detach), z), strict=True):
        assert_close(got, expected)


def test_normalizers_and_weights() -> None:
    z, y = data((5, 7), "hard")
    weight, pos_weight = torch.rand(7, dtype=torch.float64), torch.rand(5, 1, dtype=torch.float64)
    rows = torch.rand(5, dtype=torch.float64)
    total = (formula(z, y, 2.0, 3.0, 0.1) * weight * torch.where(y == 1, pos_weight, 1.0) * rows[:, None]).sum()
    for normalizer, divisor in (("rows", 5), ("positives", y.sum()), ("elements", 35), (2.5, 2.5), (None, 35)):
        options = {"weight": weight, "pos_weight": pos_weight, "sample_weight": rows, "normalizer": normalizer}
        assert_close(longtail.asymmetric_loss(z, y, 2.0, 3.0, 0.1, **options), total / divisor, what=str(normalizer))


def test_values_by_hand() -> None:
    """p = 0.8: a positive costs 0.2 times -log 0.8; a negative, shifted to 0.75, costs 0.75^4 times log 4."""
    z = torch.tensor([[math.log(4.0), math.log(4.0), -math.log(19.0), -4.0]], dtype=torch.float64)
    y = torch.tensor([[1, 0, 0, 0]], dtype=torch.bool)
    loss, grad = with_grad(lambda x: longtail.asymmetric_loss(x, y, reduction="none"), z, torch.ones(1, 4).double())
    assert_close(loss, torch.tensor([[-0.2 * math.log(0.8), 0.75**4 * math.log(4.0), 0.0, 0.0]], dtype=torch.float64))
    # Factors are constants: 0.2 times -(1 - p), and 0.75^4 times p (1 - p) / (1 - 0.75).
    assert_close(grad, torch.tensor([[-0.04, 0.75**4 * 0.64, 0.0, 0.0]], dtype=torch.float64))


def test_soft_targets_by_hand() -> None:
    """y = 0.5 at p = 0.5, m = 0.1: 1 - p_t = 0.5 0.5 + 0.5 0.4 = 0.45, its exponent 0.5 1 + 0.5 3 = 2."""
    loss = longtail.asymmetric_loss(torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.5), 1.0, 3.0, 0.1)
    assert_close(loss, torch.tensor(0.45**2 * -0.5 * (math.log(0.5) + math.log(0.6)), dtype=torch.float64))


def test_without_shift_and_with_one_exponent_it_is_focal_loss() -> None:
    z, y = data((6, 9), "soft", torch.float32)
    for gamma in (0.0, 1.5, 2.0):
        asymmetric = with_grad(lambda x, g=gamma: longtail.asymmetric_loss(x, y, g, g, 0.0, detach=False), z)
        focal = with_grad(lambda x, g=gamma: longtail.binary_focal_loss(x, y, gamma=g), z)
        for got, expected in zip(asymmetric, focal, strict=True):
            assert_close(got, expected.double(), factor=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", cases.DTYPES[:2], ids=cases.name)
@pytest.mark.parametrize("clip", [0.0, 1e-6, 0.05, 0.9])
def test_saturation(clip: float, dtype: torch.dtype, backend: str) -> None:
    """Costs that grow with the logit do so exactly; of negatives -log(1 - max(p - m, 0)) is -log m at most."""
    z = torch.tensor([20.0, 100.0, 1e4, torch.inf], dtype=dtype)
    z, roundings = torch.stack([z, -z], 1), 1e-8 if dtype == torch.float64 else 5e-6
    for detach in (True, False):
        for gamma in (0.0, 0.5, 4.0):
            options = {"detach": detach, "gamma_positive": gamma, "gamma_negative": gamma, "clip": clip}
            for y in (torch.ones(4, 2), torch.zeros(4, 2)):
                with longtail.use_backend(backend):
                    none, grad = with_grad(
                        lambda x, y=y, o=options: longtail.asymmetric_loss(x, y, reduction="none", **o),
                        *(z, torch.ones(4, 2)),
                    )
                    total = longtail.asymmetric_loss(z, y, reduction="sum", **options)
                assert not none.isnan().any()
                assert not grad.isnan().any()
                wrong, right = (1, 0) if y[0, 0] == 1 else (0, 1)
                exact = z[:, 0].double()  # of positives, and of negatives without a shift
                if wrong == 0 and clip:
                    hit = torch.sigmoid(-exact) + clip
                    exact = -((1 - hit) ** gamma) * hit.log()
                torch.testing.assert_close(none[:, wrong].double(), exact, rtol=roundings, atol=0.0)
                assert (none[:, right] <= 3e-9).all()
                assert (grad[:, right].abs() <= 3e-9).all()
                steep = grad[:, wrong].abs()
                assert torch.allclose(steep, torch.ones_like(steep)) if wrong == 1 or not clip else (steep < 3e-3).all()
                assert total.isinf() == none.isinf().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [0.05, 0.5, 0.9, 1e-6])
def test_probabilities_beside_the_shift(clip: float, backend: str) -> None:
    """Loss and gradient are 0 up to it and continuous beyond, without NaN for broken exponents."""
    edge = math.log(clip) - math.log1p(-clip)
    z = torch.tensor([edge - 1.0, edge - 1e-3, edge + 1e-3, edge + 1e-2, edge + 1.0], dtype=torch.float64)[None]
    y = torch.zeros_like(z)
    for gamma in (0.0, 0.3, 1.0, 4.0):
        for detach in (True, False):
            numbers = (1.0, gamma, clip)
            with longtail.use_backend(backend):
                options = {"detach": detach, "reduction": "none"}
                loss, grad = with_grad(lambda x, n=numbers, o=options: longtail.asymmetric_loss(x, y, *n, **o), z)
                rows = [longtail.asymmetric_loss(z + d, y, *numbers, **options).sum() for d in (-1e-5, 1e-5)]
            assert torch.equal(loss[:, :2], y[:, :2])
            assert torch.equal(grad[:, :2], y[:, :2])
            exact = formula(z, y, *numbers)
            assert torch.allclose(loss, exact, rtol=1e-6 if clip == 1e-6 else 1e-9, atol=1e-15)
            if not detach:
                live = loss > 0
                exact = with_grad(lambda x, n=numbers, dead=~live: formula(x, y, *n, False).masked_fill(dead, 0), z)[1]
                assert torch.allclose(grad[live], exact[live], rtol=1e-6, atol=1e-15)
                assert rows[0] <= rows[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_nan_stays_nan(dtype: torch.dtype, backend: str) -> None:
    """Of its element, whatever the exponents and targets are."""
    z = torch.linspace(-3, 3, 21, dtype=dtype).index_fill(0, torch.tensor([4, 20]), torch.nan).expand(3, 21)
    y = torch.tensor([[0.0], [1.0], [0.5]]).expand(3, 21)
    for clip in (0.0, 0.05, 0.9):
        for gamma in (0.0, 0.5, 1.0, 4.0):
            options = {"gamma_positive": 1.0, "gamma_negative": gamma, "clip": clip, "reduction": "none"}
            with longtail.use_backend(backend):
                found = with_grad(lambda x, o=options: longtail.asymmetric_loss(x, y, **o), z)
            assert torch.equal(found[0].isnan(), z.isnan()), options
            assert torch.equal(found[1].isnan(), z.isnan()), options


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", cases.MODES)
def test_ignored_rows_and_elements(mode: str, backend: str) -> None:
    z, y = data((6, 9), "soft", torch.float32)
    y[1, ::2] = y[3] = -1
    ignored = y == -1
    bad = z.masked_fill(ignored, torch.nan)
    classes = torch.tensor([0, -100, 3, 8, -100, 1])
    for reduction in ("none", "mean", "sum", "rows"):
        with longtail.use_backend(backend):
            options = {"ignore_index": -1, "reduction": reduction, "gradient": mode}
            found = with_grad(lambda x, o=options: longtail.asymmetric_loss(x, y, **o), bad)
            rows = bad.masked_fill(~ignored, 0).masked_fill((classes != -100)[:, None], 0.5)
            of_rows = with_grad(lambda x, m=mode: longtail.asymmetric_loss(x, classes, gradient=m), rows)
        exact = torch.where(ignored, 0, formula(z.double(), y.double().clamp(min=0)))
        total = exact.sum() / (~ignored).sum() if reduction == "mean" else reduced(exact, reduction)
        assert_close(found[0], total, what=reduction, factor=2)
        assert torch.equal(found[1][ignored], torch.zeros(int(ignored.sum())))
        assert (found[1][~ignored] != 0).any()
        kept = classes != -100
        assert_close(of_rows[0], formula(rows.double()[kept], dense(classes[kept], rows[kept])).mean())
        assert torch.equal(of_rows[1][~kept], torch.zeros(2, 9))


def test_nothing_at_all() -> None:
    for shape in ((0, 5), (4, 0), (0,), (2, 3, 0)):
        for mode in cases.MODES:
            z, y = torch.zeros(shape), torch.zeros(shape)
            loss, grad = with_grad(
                lambda x, m=mode, y=y: longtail.asymmetric_loss(x, y, reduction="sum", gradient=m), z
            )
            assert (loss.item(), grad.shape) == (0.0, shape)


@pytest.mark.parametrize("kind", ["class", "hard", "soft"])
def test_gradcheck(kind: str) -> None:
    z, y = data((3, 4), kind)
    gammas = torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    for options in ({"gamma_positive": gammas}, {"clip": 0.3, "label_smoothing": 0.1}, {"class_bias": gammas}):
        given = {"detach": False, "reduction": "none", **options}
        assert torch.autograd.gradcheck(
            lambda x, o=given: longtail.asymmetric_loss(x, y, **o), z.clone().requires_grad_()
        )


def test_an_exponent_of_each_class() -> None:
    z, y = data((6, 5), "soft")
    gammas = torch.tensor([0.0, 0.5, 1.0, 2.0, 5.0], dtype=torch.float64)
    found = with_grad(lambda x: longtail.asymmetric_loss(x, y, gammas, reduction="none"), z)
    exact = with_grad(lambda x: formula(x, y, gammas), z)
    for got, expected in zip(found, exact, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("detach", [True, False])
def test_code_that_is_widely_used(detach: bool) -> None:
    """In float32, where its cut-off at eps lets it: sums, means over the rows, smoothed targets, weights."""
    z, y = data((16, 12), "hard", torch.float32)
    weight, pos_weight = torch.rand(12) + 0.5, torch.rand(12) + 0.5
    smooth = y * 0.8 + 0.1

    def theirs(x: Tensor) -> Tensor:
        p, hit = x.sigmoid(), (1 - x.sigmoid() + 0.05).clamp(max=1)
        cost = pos_weight * smooth * p.clamp(min=1e-8).log() + (1 - smooth) * hit.clamp(min=1e-8).log()
        miss = 1 - p * smooth - hit * (1 - smooth)
        factor = miss ** (smooth + 4 * (1 - smooth))
        return -(cost * (factor.detach() if detach else factor) * weight).sum() / len(x)

    options = {"weight": weight, "pos_weight": pos_weight, "label_smoothing": 0.2, "normalizer": "rows"}
    up = torch.tensor(1.0)
    found = with_grad(lambda x: longtail.asymmetric_loss(x, y, detach=detach, **options), z, up)
    for got, expected in zip(found, with_grad(theirs, z, up), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-6)
    plain = with_grad(lambda x: eager(x, y, 4.0, 1.0, 0.05, 1e-8).sum(), z, up)[0]
    torch.testing.assert_close(longtail.asymmetric_loss(z, y, reduction="sum"), plain)


def test_second_derivatives_are_refused() -> None:
    z, y = data((4, 5), "class")
    x = z.requires_grad_()
    loss = longtail.asymmetric_loss(x, y, reduction="sum")
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(loss, x, torch.ones((), requires_grad=True).double(), create_graph=True)[0].sum().backward()


def test_compiled() -> None:
    torch._dynamo.reset()
    z, y = data((6, 9), "soft", torch.float32)
    compiled = torch.compile(lambda x: longtail.asymmetric_loss(x, y), fullgraph=True, backend="eager")
    for got, expected in zip(
        with_grad(compiled, z), with_grad(lambda x: longtail.asymmetric_loss(x, y), z), strict=True
    ):
        assert_close(got, expected.double())


def test_the_module() -> None:
    z, y = data((6, 5), "hard", torch.float32)
    module = longtail.AsymmetricLoss(0.0, 2.0, 0.1, label_smoothing=0.1)
    assert repr(module) == "AsymmetricLoss(gamma_positive=0.0, gamma_negative=2.0, clip=0.1, label_smoothing=0.1)"
    gammas = torch.rand(5)
    module.gamma_positive = gammas
    assert list(module.state_dict()) == ["gamma_positive"]
    assert module.double().gamma_positive.dtype == torch.float64
    for again in (module.float(), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(again(z, y), longtail.asymmetric_loss(z, y, gammas, 2.0, 0.1, label_smoothing=0.1))
    module.persistent = False
    assert not module.state_dict()
    module.gamma_positive, module.detach = 1.5, False
    assert not dict(module.named_buffers(recurse=False)).keys() & {"gamma_positive"}
    expected = longtail.asymmetric_loss(z, y, 1.5, 2.0, 0.1, detach=False, label_smoothing=0.1)
    assert_same(module(z, y), expected)
    for name, wrong in (("gamma_positive", -1.0), ("gamma_negative", torch.rand(5)), ("clip", 1.0), ("detach", None)):
        with pytest.raises((TypeError, ValueError), match=name):
            setattr(module, name, wrong)
    assert_same(module(z, y), expected)


def test_wrong_arguments_are_named() -> None:
    z, y = data((6, 5), "hard", torch.float32)
    for name, wrong in (
        ("gamma_positive", -0.5),
        ("gamma_positive", "one"),
        ("gamma_positive", [1.0] * 5),
        ("gamma_positive", torch.tensor(1.0)),
        ("gamma_negative", torch.ones(5)),
        ("clip", -0.1),
        ("clip", None),
        ("gamma", 2.0),
        ("inverse_counts", torch.ones(5)),
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            longtail.asymmetric_loss(z, y, **{name: wrong})
