"""Promise: a gradient made in forward is handed out once, and is 0 where nothing counts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from gradient_modes import Loss, gradient, sigmoid, softmax
from tolerances import assert_close, assert_same

KEPT = ("forward", "inplace")
BACKENDS = ("cpu", "reference")
CLASSES = 7
LINEAR = torch.randn(CLASSES, 5, generator=cases.generator(3))


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


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
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


def test_an_error_of_a_hook_stays_what_it_is() -> None:
    def unpack(_: Any) -> Tensor:
        raise torch.OutOfMemoryError("on the way back")

    make, target, values, _ = inputs("softmax")
    x = values.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        loss = make(target)(x, "forward")
    with pytest.raises(torch.OutOfMemoryError, match="on the way back"):
        loss.backward()


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


def probabilities(**options: Any) -> Loss:
    """Which know the default mode alone."""
    target = torch.full((4, CLASSES), 1 / CLASSES)
    return lambda z, _mode: longtail.cross_entropy(z, target.to(z.dtype), **options)


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
    "normalizer_0_probabilities": lambda: (probabilities(normalizer=0), torch.randn(4, CLASSES)),
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
    torch._dynamo.reset()
    for compiled in (loss, lambda z: loss(z.view_as(z))):
        with pytest.raises(torch._dynamo.exc.Unsupported) as unsupported:
            torch.compile(compiled, fullgraph=True, backend="aot_eager")(leaf)
        assert "leaf that requires grad" in str(unsupported.value) + str(unsupported.value.__cause__)
    with torch.no_grad():
        loss(leaf)
    loss(values)
    assert_same(leaf.detach(), before)
    assert_same(values, before)
