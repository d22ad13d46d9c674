"""Promise: the Triton kernels compute the softmax family, seen in Triton's interpreter, where no GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from interpreted import FACTOR, HALVES, interpreted, rerun, starts_it
from tolerances import assert_close, assert_same

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
loss_math = pytest.importorskip("longtail.triton_kernels.loss_math")
SIZES = {1: 7, 2: 9, 3: 8, 127: 6, 1000: 5, 5000: 2, 50257: 2}
FEW = ("plain", "smoothing_weight", "mixed")


def numerics(case: tuple[Tensor, Tensor], options: dict[str, Any], up: Tensor) -> list[list[Tensor]]:
    """[loss, gradient] in float64, and by plain PyTorch in the logits' dtype."""
    logits, target = case
    results = []
    for wide in (True, False):
        z = logits.double() if wide else logits.clone()
        z.requires_grad_()
        chosen = cases.to_float64(options) if wide else options
        loss = longtail.reference.softmax_loss(z, target, **chosen)
        (grad,) = torch.autograd.grad(loss, z, up.to(loss.dtype))
        results.append([loss.detach(), grad])
    return results


def check_operators(
    case: tuple[Tensor, Tensor], options: dict[str, Any], up: Tensor | None = None, layout: str = "contiguous"
) -> None:
    """All four operators on one case."""
    logits, target = case
    factor, classes = FACTOR[logits.dtype], logits.shape[1]
    up = cases.upstreams(target.shape, torch.float32)["random"] if up is None else up
    (loss, grad), (eager_loss, eager_grad) = numerics(case, options, up)
    tail = cases.operator_options(classes, options)
    ops = torch.ops.longtail
    with longtail.use_backend("triton"):
        z = cases.LAYOUTS[layout](logits)
        one, stats = ops.softmax_loss(z, target, *tail)
        two, two_stats, two_grad = ops.softmax_loss_and_grad(up, z, target, *tail)
        one_grad = ops.softmax_loss_backward(up, z, target, stats, *tail)
        assert_same(z, logits, "logits")
        three, three_stats = ops.softmax_loss_and_grad_(up, z, target, *tail)
    for value in (one, two, three):
        assert_close(value, loss, eager_loss, what="loss")
    for value in (two_stats, three_stats):
        assert_close(value, stats.double(), what="stats", factor=4)
    for value in (one_grad, two_grad, z):
        assert value.dtype == logits.dtype
        assert_close(value, grad, eager_grad, what="gradient", factor=factor)
    ignored = target == cases.IGNORE
    for value in (one, stats, two_grad, z):
        assert (value[ignored] == 0).all(), "ignored rows are exactly 0"


# The sizes left out with most options are slow, and their neighbours show no less.
OPTION_CASES = [(c, name) for c in SIZES for name in cases.OPTION_SETS if c not in (1, 3, 50257) or name in FEW]


@interpreted
@pytest.mark.parametrize(("classes", "option_set"), OPTION_CASES)
def test_every_option(classes: int, option_set: str) -> None:
    logits, target = cases.random_case(SIZES[classes], classes)
    case = cases.poison_ignored(logits, target), target
    check_operators(case, cases.options(option_set, classes, target))


@interpreted
@pytest.mark.parametrize("dtype", HALVES, ids=cases.name)
@pytest.mark.parametrize("option_set", FEW)
@pytest.mark.parametrize("classes", SIZES)
def test_half_precision(classes: int, option_set: str, dtype: torch.dtype) -> None:
    logits, target = cases.random_case(SIZES[classes], classes, dtype)
    case = cases.poison_ignored(logits, target), target
    check_operators(case, cases.options(option_set, classes, target, dtype))


@interpreted
@pytest.mark.parametrize("margin", cases.MARGINS)
@pytest.mark.parametrize(("classes", "gamma"), [(1, 0.5), (2, 0.0), (127, 0.5), (127, 2.0), (4099, 1.5)])
def test_margins(classes: int, gamma: float, margin: float) -> None:
    case = cases.margin_case(margin, classes, rows=4)
    check_operators(case, {"focal_gamma": gamma, "complement_gamma": -1.0})


@interpreted
@pytest.mark.parametrize("layout", ["row_stride", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("classes", [64, 1000, 4104, 4099])
def test_layouts(classes: int, dtype: torch.dtype, layout: str) -> None:
    """Rows that begin anywhere within 16 bytes: with and without edges, aligned or not as the gradient is."""
    case = cases.random_case(3, classes, dtype)
    check_operators(case, cases.options("mixed", classes, case[1], dtype), layout=layout)


@interpreted
@pytest.mark.parametrize("classes", [127, 4099])
@pytest.mark.parametrize("upstream", ["stride0", "strided"])
def test_upstream_strides(upstream: str, classes: int) -> None:
    case = cases.random_case(4, classes)
    up = cases.upstreams((4,), torch.float32)[upstream]
    check_operators(case, {"focal_gamma": 2.0, "label_smoothing": 0.1}, up)


@interpreted
@pytest.mark.parametrize("classes", [7, 4099])
def test_infinite_and_undefined_logits(classes: int) -> None:
    logits, target = cases.random_case(8, classes, ignore=False)
    target[:] = torch.arange(8) % 5
    logits[0] = -torch.inf
    logits[0, 0] = 1.0  # the target alone has mass
    logits[1, 2:] = -torch.inf  # one other class does
    logits[2, 2] = -torch.inf  # the target has none
    logits[3, 5] = torch.nan
    up = cases.upstreams((8,), torch.float64)["random"]
    for options in ({}, {"focal_gamma": 2.0, "complement_gamma": -1.0}):
        tail = cases.operator_options(classes, options)
        with longtail.use_backend("reference"):
            expected = torch.ops.longtail.softmax_loss_and_grad(up, logits.double(), target, *tail)
        with longtail.use_backend("triton"):
            actual = torch.ops.longtail.softmax_loss_and_grad(up.float(), logits, target, *tail)
        for name, value, truth in zip(("loss", "stats", "gradient"), actual, expected, strict=True):
            assert_close(value, truth, what=name, factor=2)
        assert actual[0][2] == torch.inf
        assert actual[2][2].isfinite().all()


@interpreted
@pytest.mark.parametrize("classes", [33])
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_autograd(reduction: str, mode: str, classes: int) -> None:
    logits, target = cases.random_case(6, classes)
    options = cases.options("mixed", classes, target)
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with longtail.use_backend("triton"):
        loss, stats = longtail.cross_entropy(
            x * 1.0, target, reduction=reduction, gradient=mode, return_stats=True, **options
        )
        up = cases.upstreams(loss.shape, torch.float32)["random"] + 0.0
        loss.backward(up)
    truth = longtail.reference.cross_entropy(y, target, reduction=reduction, **cases.to_float64(options))
    truth.backward(up.double())
    assert_close(loss, truth.detach(), what="loss", factor=2)
    assert_close(x.grad, y.grad, what="gradient", factor=3)
    with longtail.use_backend("reference"):
        _, expected = longtail.cross_entropy(y.detach(), target, return_stats=True, **cases.to_float64(options))
    for name in ("lse", "log_prob", "complement_entropy"):
        assert_close(getattr(stats, name), getattr(expected, name), what=name, factor=2)
    assert_same(stats.correct, expected.correct)


@interpreted
def test_images_and_strided_statistics() -> None:
    logits = torch.randn(2, 5, 3, 2, generator=cases.generator(1))
    target = torch.randint(5, (2, 3, 2), generator=cases.generator(2))
    results = []
    for backend in ("triton", "reference"):
        x = logits.clone().requires_grad_()
        with longtail.use_backend(backend):
            loss = longtail.cross_entropy(x, target, complement_gamma=-1.0)
            loss.backward(torch.tensor(1.3))
        results.append((loss.detach(), x.grad))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected.double(), factor=2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=cases.name)
@pytest.mark.parametrize("classes", [3, 33, 5000])
def test_scale_grad(classes: int, dtype: torch.dtype) -> None:
    grad = torch.randn(6, classes, generator=cases.generator(3)).to(dtype)
    ups = cases.upstreams((6,), torch.float32)
    ups["some"] = torch.tensor([1.0, -2.0, 1.0, 0.5, 1.0, 1.0])
    for name, up in ups.items():
        for layout in ("contiguous", "row_stride", "offset"):
            actual = cases.LAYOUTS[layout](grad)
            with longtail.use_backend("triton"):
                torch.ops.longtail.scale_grad_(actual, up, None, -100)
            assert_close(actual, grad.double() * up.double()[:, None], what=name, factor=FACTOR[dtype])
    with longtail.use_backend("triton"):
        torch.ops.longtail.scale_grad_(actual := grad.clone(), torch.ones(()).expand(6), None, -100)
    assert_same(actual, grad)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=cases.name)
def test_scale_grad_leaves_ignored_rows_alone(dtype: torch.dtype) -> None:
    for shape in ((12, 3), (12, 33), (12, 5000)):
        for name, grad, up, target, expected in cases.scalings(shape, dtype):
            with longtail.use_backend("triton"):
                torch.ops.longtail.scale_grad_(grad, up, target, cases.IGNORE)
            assert_close(grad, expected.double(), what=f"{name} {shape}", factor=FACTOR[dtype])


@interpreted
def test_float64_is_the_references() -> None:
    logits, target = cases.random_case(5, 9, torch.float64)
    outcomes = []
    for backend in ("triton", "reference"):
        x = logits.clone().requires_grad_()
        with longtail.use_backend(backend):
            loss = longtail.cross_entropy(x, target, focal_gamma=2.0)
            outcomes.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for actual, expected in zip(*outcomes, strict=True):
        assert_same(actual, expected)


@interpreted
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(("rows", "classes"), [(0, 5), (0, 5000), (3, 5), (3, 5000)])
def test_nothing_counted(rows: int, classes: int, mode: str) -> None:
    x = torch.full((rows, classes), torch.nan, requires_grad=True)
    target = torch.full((rows,), cases.IGNORE)
    with longtail.use_backend("triton"):
        loss = longtail.cross_entropy(x * 1.0, target, normalizer="count", gradient=mode)
        loss.backward()
    assert loss == 0
    assert_same(x.grad, torch.zeros(rows, classes))


@interpreted
def test_wrong_arguments_raise() -> None:
    tail = list(cases.operator_options(5, {}))
    logits, target, up = torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), torch.ones(3)
    ops = torch.ops.longtail
    wrong: list[tuple[Any, list[Any]]] = [
        (ops.softmax_loss, [logits, target[:2], *tail]),
        (ops.softmax_loss, [logits, target.int(), *tail]),
        (ops.softmax_loss, [logits.t().contiguous().t(), target, *tail]),
        (ops.softmax_loss, [logits, target, torch.ones(4), *tail[1:]]),
        (ops.softmax_loss, [logits, target, torch.ones(10)[::2], *tail[1:]]),
        (ops.softmax_loss, [logits, target, torch.ones(5).double(), *tail[1:]]),
        (ops.softmax_loss_and_grad, [up[:2], logits, target, *tail]),
        (ops.softmax_loss_and_grad_, [up, logits[:1].expand(3, 5), target, *tail]),
        (ops.softmax_loss_backward, [up, logits, target, torch.zeros(3, 4), *tail]),
        (ops.scale_grad_, [logits, up[:2], None, -100]),
        (ops.scale_grad_, [logits, up, target[:2], -100]),
    ]
    with longtail.use_backend("triton"):
        for operator, arguments in wrong:
            with pytest.raises(RuntimeError, match="longtail"):
                operator(*arguments)
        with pytest.raises(IndexError, match="target 5 in row 1"):
            longtail.cross_entropy(logits, torch.tensor([0, 5, 1]))


@triton.jit
def evaluate(x, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(out + i, loss_math.log1p(value))
    tl.store(out + N + i, loss_math.tanh(value * 20.0 - 10.0))
    tl.store(out + 2 * N + i, loss_math.exp_cut(-value * 87.0)[0])


@interpreted
def test_elementary_functions() -> None:
    """log1p and tanh keep relative precision near 0; exp_cut is 0 where it cuts off, and NaN survives."""
    x = torch.cat([torch.logspace(-40, 0, 1000, dtype=torch.float64), torch.rand(1048).double()]).float()
    out = torch.empty(3, len(x))
    evaluate[(1,)](x, out, N=len(x))
    wide = x.double()
    for row, truth in zip(out, (wide.log1p(), (x * 20 - 10).double().tanh(), (-x * 87).double().exp()), strict=True):
        assert ((row.double() - truth).abs() <= 3e-7 * truth.abs() * (1 + truth.log().abs().nan_to_num(0))).all()
    x = torch.tensor([torch.nan, 1.3, 2.0, torch.inf]).repeat(4)
    out = torch.empty(3, len(x))
    evaluate[(1,)](x, out, N=len(x))
    assert out[:, 0].isnan().all()
    assert (out[2, 2:4] == 0).all()


@starts_it
def test_in_a_process_of_its_own() -> None:
    rerun(__file__)
