"""Promise: a gradient made in forward is handed out once, holds in float16, and is 0 where nothing counts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from tolerances import assert_close, assert_same

Loss = Callable[[Tensor, str], Tensor]
KEPT = ("forward", "inplace")
BACKENDS = ("cpu", "reference")
CLASSES = 7
LINEAR = torch.randn(CLASSES, 5, generator=cases.generator(3))


def softmax(target: Tensor, **options: Any) -> Loss:
    return lambda z, mode: longtail.cross_entropy(z * 1.0, target, gradient=mode, **options)


def sigmoid(target: Tensor, **options: Any) -> Loss:
    options = {"reduction": "mean", **options}
    return lambda z, mode: longtail.sigmoid_focal_loss(z * 1.0, target, gradient=mode, **options)


def binary(target: Tensor, **options: Any) -> Loss:
    return lambda z, mode: longtail.sigmoid_cross_entropy(z * 1.0, target, gradient=mode, **options)


def linear(target: Tensor, **options: Any) -> Loss:
    return lambda x, mode: longtail.linear_cross_entropy(x, LINEAR.to(x.dtype), target, gradient=mode, **options)


ROWS = torch.tensor([0, cases.IGNORE, 2, 6])
PIXELS = torch.tensor([[0, cases.IGNORE, 2], [cases.IGNORE, 6, 1]])
ELEMENTS = torch.randint(2, (4, CLASSES), generator=cases.generator(1)).float()
ELEMENTS[1] = ELEMENTS[2, 3] = -1.0

# name -> (loss, shape of its input, where that input is ignored)
LOSSES: dict[str, tuple[Callable[..., Loss], Tensor, tuple[int, ...], Tensor]] = {
    "softmax": (softmax, ROWS, (4, CLASSES), (ROWS == cases.IGNORE)[:, None]),
    "softmax_images": (softmax, PIXELS, (2, CLASSES, 3), (PIXELS == cases.IGNORE)[:, None]),
    "sigmoid": (sigmoid, ROWS, (4, CLASSES), (ROWS == cases.IGNORE)[:, None]),
    "sigmoid_images": (sigmoid, PIXELS, (2, CLASSES, 3), (PIXELS == cases.IGNORE)[:, None]),
    "elements": (lambda t, **k: sigmoid(t, ignore_index=-1, **k), ELEMENTS, (4, CLASSES), ELEMENTS == -1),
    "weighted_elements": (
        lambda t, **k: binary(t, ignore_index=-1, weight=torch.tensor([[0.5], [2.0], [1.0], [3.0]]), **k),
        *(ELEMENTS, (4, CLASSES), ELEMENTS == -1),
    ),
    "linear": (linear, ROWS, (4, 5), (ROWS == cases.IGNORE)[:, None]),
}


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[Callable[..., Loss], Tensor, Tensor, Tensor]:
    make, target, shape, ignored = LOSSES[name]
    return make, target, torch.randn(shape, generator=cases.generator(2)).to(dtype), ignored.expand(shape)


def gradient(loss: Loss, values: Tensor, mode: str, upstream: float = 1.0) -> Tensor:
    x = values.clone().requires_grad_()
    value = loss(x, mode)
    return torch.autograd.grad(value, x, torch.full_like(value, upstream))[0]


HOOKS: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "on_cpu": torch.autograd.graph.save_on_cpu,
    "identity": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
}


@pytest.mark.parametrize("hooks", [*HOOKS, "vjp"])
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_second_backward_is_right_or_refused(name: str, mode: str, hooks: str) -> None:
    """And never writes to what the first one returned."""
    make, target, values, _ = inputs(name)
    loss = make(target)
    expected = gradient(loss, values, "backward", 3.0)
    if hooks == "vjp":
        value, vjp = torch.func.vjp(lambda x: loss(x, mode), values)
        backward = lambda: vjp(torch.full_like(value, 3.0))[0]  # noqa: E731
    else:
        x = values.clone().requires_grad_()
        with HOOKS[hooks]():
            value = loss(x, mode)
        backward = lambda: torch.autograd.grad(value, x, torch.tensor(3.0), retain_graph=True)[0]  # noqa: E731
    first = backward()
    assert_close(first, expected.double(), factor=3)
    kept = first.clone()
    if mode == "backward":
        assert_close(backward(), expected.double())
    else:
        with pytest.raises(RuntimeError, match=r"gradient=.*run once"):
            backward()
    assert_same(first, kept, "what the first backward returned")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", KEPT)
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "linear"])
def test_a_compiled_graph_keeps_its_gradient(name: str, mode: str, backend: str) -> None:
    make, target, values, _ = inputs(name)
    loss = make(target)
    torch._dynamo.reset()
    x = values.clone().requires_grad_()
    value = torch.compile(lambda y: loss(y, mode), fullgraph=True, backend=backend)(x)
    expected = gradient(loss, values, "backward", 3.0).double()
    for _ in range(2):
        assert_close(torch.autograd.grad(value * 3.0, x, retain_graph=True)[0], expected, factor=3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("upstream", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_upstream_that_is_not_finite_stays_out_of_ignored_places(
    name: str, mode: str, dtype: torch.dtype, upstream: float, backend: str
) -> None:
    make, target, values, ignored = inputs(name, dtype)
    with longtail.use_backend(backend):
        grad = gradient(make(target), values, mode, upstream)
    assert (grad[ignored] == 0).all()
    assert not grad[~ignored].isfinite().any()


def _all_ignored(name: str) -> tuple[Loss, Tensor]:
    make, target, values, _ = inputs(name)
    return make(torch.full_like(target, -1.0 if target.is_floating_point() else cases.IGNORE)), values


NO_WEIGHT = torch.tensor([0.0, *[1.0] * (CLASSES - 1)])
ZEROS = torch.zeros(4, dtype=torch.long)
EMPTY = torch.zeros(0, dtype=torch.long)
# name -> what makes a loss of which nothing counts, and the logits
NOTHING: dict[str, Callable[[], tuple[Loss, Tensor]]] = {
    **{f"{name}_ignored": lambda name=name: _all_ignored(name) for name in LOSSES},  # type: ignore[misc]
    "no_rows": lambda: (softmax(EMPTY), torch.zeros(0, CLASSES)),
    "no_rows_sigmoid": lambda: (sigmoid(EMPTY), torch.zeros(0, CLASSES)),
    "no_rows_linear": lambda: (linear(EMPTY), torch.zeros(0, 5)),
    "weights_of_0": lambda: (softmax(ZEROS, weight=NO_WEIGHT), torch.randn(4, CLASSES)),
    "weights_of_0_linear": lambda: (linear(ZEROS, weight=NO_WEIGHT), torch.randn(4, 5)),
    "normalizer_0": lambda: (softmax(ROWS, normalizer=0), torch.randn(4, CLASSES)),
    "normalizer_0d": lambda: (softmax(ROWS, normalizer=torch.tensor(0)), torch.randn(4, CLASSES)),
    "normalizer_0_sigmoid": lambda: (sigmoid(ROWS, normalizer=0.0), torch.randn(4, CLASSES)),
    "normalizer_0_elements": lambda: (LOSSES["weighted_elements"][0](ELEMENTS, normalizer=0), torch.randn(4, CLASSES)),
    "normalizer_0_linear": lambda: (linear(ROWS, normalizer=0), torch.randn(4, 5)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_counts_the_gradient_is_0(name: str, mode: str, dtype: torch.dtype, backend: str) -> None:
    loss, values = NOTHING[name]()
    with longtail.use_backend(backend):
        grad = gradient(loss, values.to(dtype), mode, 2.5)
    assert_same(grad, torch.zeros_like(grad))


COUNTS = torch.tensor([900000.0, 60000.0, 3000.0, 12.0])
TAIL = torch.arange(32) % 4
FOCAL = {"focal_gamma": 2.0, "complement_gamma": -1.0, "label_smoothing": 0.1}
# Options under which a gradient that is not divided by the mean's denominator leaves the range of float16.
EXTREMES: dict[str, dict[str, Any]] = {
    "weights_of_a_tail": {"weight": COUNTS.sum() / COUNTS},
    "weights_and_all_options": {"weight": COUNTS.sum() / COUNTS, **FOCAL},
    "huge_sample_weights": {"sample_weight": torch.linspace(1.0, 3e6, 32), "normalizer": 1e6},
    "tiny_weights": {"weight": torch.full((4,), 1e-9)},
    "scale": {"scale": 3e3, "normalizer": 1e5},
    "z_loss": {"z_loss": 1.0, "normalizer": 1e3},
    "sum": {"weight": torch.full((4,), 1e-6), "reduction": "sum"},
    "none": {"weight": torch.full((4,), 3e4), "reduction": "none"},
}


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("shape", ["rows", "images", "linear"])
def test_float16_gradients_of_extreme_options(shape: str, name: str, mode: str) -> None:
    """As those of float64 but for the roundings of what is stored; upstream as a gradient scaler's."""
    options = EXTREMES[name]
    if shape == "linear" and options.get("reduction") == "none" and mode != "backward":
        pytest.skip("needs one scalar loss")
    z = torch.randn(32, 4, generator=cases.generator(5)).half()
    scaler = {"weights_of_a_tail": 1.0, "sum": 1e6, "none": 2.0**-14}.get(name, 64.0)
    grads = []
    for dtype in (torch.float64, torch.float16):
        x, weight, how = z.to(dtype), torch.eye(4, dtype=dtype), mode if dtype == torch.float16 else "backward"
        given = dict(options)
        if shape == "images":
            x, given = x.view(4, 8, 4).transpose(1, 2).contiguous(), {**given}
            given |= {k: v.view(4, 8) for k, v in given.items() if k == "sample_weight"}
        x.requires_grad_()
        if shape == "linear":
            loss = longtail.linear_cross_entropy(x, weight, TAIL, gradient=how, **given)
        else:
            target = TAIL if shape == "rows" else TAIL.view(4, 8)
            loss = longtail.cross_entropy(x * 1.0, target, gradient=how, **given)
        grads.append(torch.autograd.grad(loss, x, torch.full_like(loss, scaler))[0].double())
    truth, grad = grads
    assert truth.abs().max() < 65504, "eager float16 has to hold it"
    assert truth.abs().max() > 1e-3
    assert_close(grad.half(), truth, eager=truth.half(), factor=4)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_float16_rows_and_columns_with_a_weight_that_is_not_finite_stand_alone(value: float, mode: str) -> None:
    z, weight = torch.randn(8, 4, generator=cases.generator(5)).half(), torch.ones(4)
    weight[2] = value
    rows = torch.arange(8) % 4 != 2
    with_weight = gradient(softmax(TAIL[:8], weight=weight, reduction="sum"), z, mode)
    assert_same(with_weight[rows], gradient(softmax(TAIL[:8], reduction="sum"), z, "backward")[rows])
    assert not with_weight[~rows].isfinite().all()
    columns = gradient(sigmoid(TAIL[:8], weight=weight, reduction="sum"), z, mode)
    without = gradient(sigmoid(TAIL[:8], reduction="sum"), z, "backward")
    assert_same(columns[:, weight == 1], without[:, weight == 1])
    assert not columns[:, 2].isfinite().any()


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("elements", [False, True])
@pytest.mark.parametrize("name", ["pos_weight", "weight", "by_target", "gamma", "tiny"])
def test_float16_gradients_of_extreme_sigmoid_options(name: str, elements: bool, mode: str) -> None:
    options: dict[str, Any] = {
        "pos_weight": {"pos_weight": COUNTS.sum() / COUNTS, "normalizer": 1e5},
        "weight": {"weight": COUNTS.sum() / COUNTS, "sample_weight": torch.linspace(1.0, 100.0, 32), "normalizer": 1e6},
        "by_target": {"weight": COUNTS.sum() / COUNTS, "class_weight_by_target": True, "normalizer": 1e5},
        "gamma": {"gamma": 5.0, "alpha": 0.25},
        "tiny": {"weight": torch.full((4,), 1e-9), "reduction": "sum"},
    }[name]
    if elements and name == "by_target":
        pytest.skip("needs class indices")
    z = torch.randn(32, 4, generator=cases.generator(5)).half()
    target = F.one_hot(TAIL, 4).float() if elements else TAIL
    grads = []
    for dtype, how in ((torch.float64, "backward"), (torch.float16, mode)):
        scaler = 2.0**26 if name == "tiny" else 64.0
        grads.append(gradient(sigmoid(target, **options), z.to(dtype), how, scaler).double())
    truth, grad = grads
    assert 1e-3 < truth.abs().max() < 65504
    assert_close(grad.half(), truth, eager=truth.half(), factor=4)


def test_float16_products_of_the_linear_loss_do_not_overflow() -> None:
    """Before the mean's denominator, 2048 rows of a feature of 500 sum to 1e6."""
    h = torch.randn(2048, 64, generator=cases.generator(0)).half() * 5
    h[:, 3] = 500
    weight = torch.randn(9, 64, generator=cases.generator(1)).half() * 0.01
    target = torch.zeros(2048, dtype=torch.long)
    for mode in ("auto", "backward"):
        x, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        got = torch.autograd.grad(longtail.linear_cross_entropy(x, w, target, gradient=mode), (x, w))
        x, w = h.double().requires_grad_(), weight.double().requires_grad_()
        truth = torch.autograd.grad(F.cross_entropy(x @ w.t(), target), (x, w))
        for actual, expected in zip(got, truth, strict=True):
            assert (actual - expected).norm() < 2.0**-8 * expected.norm()


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_float16_linear_loss_and_gradient_scaler_do_not_underflow(mode: str) -> None:
    """Rare classes of many rows: p / N is far below the least float16."""
    x = torch.randn(512, 16, generator=cases.generator(0)).half()
    weight = torch.randn(200, 16, generator=cases.generator(1)).half() * 0.3
    target = torch.zeros(512, dtype=torch.long)
    grads = []
    for dtype, how in ((torch.float64, "backward"), (torch.float16, mode)):
        w = weight.to(dtype).requires_grad_()
        loss = longtail.linear_cross_entropy(x.to(dtype), w, target, gradient=how)
        grads.append(torch.autograd.grad(loss * 65536, w)[0].double())
    assert (grads[1] - grads[0]).abs().max() < 2.0**-8 * grads[0].abs().max()
    assert (grads[1] - grads[0])[1:].norm() < 2.0**-7 * grads[0][1:].norm()


@pytest.mark.parametrize("name", ["softmax", "softmax_images", "sigmoid", "elements"])
def test_inplace_on_a_leaf_is_refused(name: str) -> None:
    """As torch refuses every operation in place there: the parameter would be its own gradient."""
    _, target, values, _ = inputs(name)
    function = {"softmax": longtail.cross_entropy}.get(name.split("_")[0], longtail.sigmoid_focal_loss)
    options = {"ignore_index": -1} if name == "elements" else {}

    def loss(z: Tensor) -> Tensor:
        return function(z, target, gradient="inplace", **options).sum()

    leaf, before = values.clone().requires_grad_(), values.clone()
    for refused in (lambda: loss(leaf), lambda: loss(leaf.view_as(leaf)), lambda: torch.func.grad(loss)(values)):
        with pytest.raises(ValueError, match="leaf that requires grad") as error:
            refused()
        assert isinstance(error.value, RuntimeError), "as torch"
    with torch.no_grad():
        loss(leaf)
    loss(values)
    assert_same(leaf.detach(), before)
    assert_same(values, before)
