"""Promise: `cross_entropy` of class probabilities runs by the kernels in any layout, eager, compiled, by torch.func."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import longtail
from allocations import peak_while
from tolerances import assert_close, assert_same

SHAPES = {**cases.SHAPES, "one_row": (1, 5), "one_class": (6, 1), "block": (3, 1100)}


class Seen(TorchDispatchMode):
    """The operators of the package that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "longtail":
            self.names.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def soft_targets(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g, dim = cases.generator(3), min(1, len(shape) - 1)
    logits, raw = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    return logits.to(dtype), raw.softmax(dim)


def outcome(loss: Callable[..., Tensor], z: Tensor, *others: Any, **options: Any) -> list[Tensor]:
    """The loss, and the gradient of the logits for a random upstream one."""
    x = z.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(x, *others, **options)
    up = torch.randn(value.shape, generator=cases.generator(4), dtype=torch.float64).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, x, up)]


def against_torch(z: Tensor, y: Tensor, backend: str = "cpu", **options: Any) -> None:
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    truth = outcome(F.cross_entropy, z.double(), y.double(), **wide)
    eager = outcome(F.cross_entropy, *(x.to(cases.vector_dtype(z.dtype)) for x in (z, y)), **options)
    with longtail.use_backend(backend):
        ours = outcome(longtail.cross_entropy, z, y, **options)
    assert ours[0].dtype == cases.vector_dtype(z.dtype)
    assert (ours[1].dtype, ours[1].shape) == (z.dtype, z.shape)
    for got, want, reference in zip(ours, truth, eager, strict=True):
        assert_close(got, want, reference, factor=2)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_on_every_backend(shape: tuple[int, ...], backend: str) -> None:
    z, y = soft_targets(shape)
    classes = shape[0] if len(shape) == 1 else shape[1]
    weight = torch.rand(classes, generator=cases.generator(5)) + 0.5
    for reduction in ("none", "sum", "mean"):
        against_torch(z, y.float(), backend, reduction=reduction)
        against_torch(z, y.float(), backend, reduction=reduction, weight=weight, label_smoothing=0.1)


@pytest.mark.parametrize("target_dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_targets_of_every_dtype(dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    z, y = soft_targets((6, 37), dtype)
    held = y.to(target_dtype)
    if torch.float64 not in (dtype, target_dtype):  # both are rounded alike
        held = held.to(cases.vector_dtype(dtype)).to(target_dtype)
    against_torch(z, held.to(cases.vector_dtype(dtype)) if dtype != torch.float64 else held.double(), reduction="none")
    got = longtail.cross_entropy(z, held, reduction="none")
    same = longtail.cross_entropy(z, held.to(cases.vector_dtype(dtype)), reduction="none")
    assert_same(got, same, "a converted target")


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **cases.LAYOUTS,
    "channels_last": lambda x: x[:, :, None, None].contiguous(memory_format=torch.channels_last),
    "image": lambda x: x.t().contiguous().view(1, x.shape[1], x.shape[0]),
    "class_image": lambda x: x[:, :, None].expand(-1, -1, 3),
}


@pytest.mark.parametrize("of_target", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, of_target: bool) -> None:
    z, y = soft_targets((6, 37))
    z, y = (LAYOUTS[layout](x) for x in (z, y.float()))
    against_torch(z.contiguous() if of_target else z, y if of_target else y.contiguous(), reduction="none")


def test_what_runs() -> None:
    """Images as rows; what is asked of targets and weights by plain PyTorch."""
    z, y = soft_targets((2, 5, 3))
    weight = torch.rand(5, generator=cases.generator(1))
    with Seen() as seen:
        outcome(longtail.cross_entropy, z, y.float(), weight)
    assert seen.names == ["softmax_loss", "softmax_loss_backward"]
    for i in range(2):
        given = [y.float(), weight]
        given[i] = given[i].requires_grad_()
        with Seen() as seen:
            outcome(longtail.cross_entropy, z, *given)
        assert seen.names == []
        with torch.no_grad(), Seen() as seen:
            longtail.cross_entropy(z, *given)
        assert seen.names == ["softmax_loss"]


def test_memory_is_that_of_the_gradient() -> None:
    z, y = soft_targets((256, 1000))
    x, soft = z.requires_grad_(), y.float()
    peak, _ = peak_while(lambda: longtail.cross_entropy(x, soft, label_smoothing=0.1).backward())
    assert peak < 1.05 * z.numel() * z.element_size()


@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 5, 3)], ids=str)
def test_weights_and_targets_that_require_grad(shape: tuple[int, ...]) -> None:
    z, y = soft_targets(shape, torch.float64)
    grads = []
    for function in (longtail.cross_entropy, F.cross_entropy):
        leaves = [x.clone().requires_grad_() for x in (z, y, torch.rand(5, generator=cases.generator(2)).double())]
        grads.append(torch.autograd.grad(function(*leaves, label_smoothing=0.1), leaves))
    for got, want in zip(*grads, strict=True):
        assert want.abs().max() > 0
        assert_close(got, want)


def test_wrong_weights_that_require_grad_are_refused() -> None:
    z, y = soft_targets((6, 5))
    with pytest.raises(ValueError, match=r"weight has shape \[4\], expected \[5\]"):
        longtail.cross_entropy(z, y, torch.ones(4, requires_grad=True))
    with pytest.raises(ValueError, match="class_bias requires grad"):
        longtail.cross_entropy(z, y, class_bias=torch.ones(5, requires_grad=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_training_step(reduction: str, backend: str) -> None:
    def step(z: Tensor, y: Tensor) -> Tensor:
        return longtail.cross_entropy(z * 1.5, y, class_bias=torch.arange(13.0), z_loss=0.1, reduction=reduction)

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in (6, 9, 17, 5):
        z, y = soft_targets((rows, 13))
        for got, want in zip(outcome(compiled, z, y.float()), outcome(step, z, y.float()), strict=True):
            assert_close(got, want.double(), factor=4)
    assert counter.frame_count <= 2, "one graph for the first size, one for every other"


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3)], ids=str)
def test_func_grad(shape: tuple[int, ...]) -> None:
    z, y = soft_targets(shape, torch.float64)
    for place in (0, 1):

        def loss(x: Tensor, place: int = place) -> Tensor:
            return longtail.cross_entropy(*((x * 1.0, y) if place == 0 else (z, x * 1.0)), label_smoothing=0.1) * 1.5

        leaf = (z, y)[place].clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(leaf), leaf)
        assert_close(torch.func.grad(loss)((z, y)[place]), want)


def test_second_derivatives_are_refused_or_right() -> None:
    z, y = soft_targets((6, 5), torch.float64)
    x = z.clone().requires_grad_()
    (first,) = torch.autograd.grad(longtail.cross_entropy(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"longtail\.reference"):
        first.square().sum().backward()
    (first,) = torch.autograd.grad(longtail.reference.cross_entropy(x, y), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    (true_first,) = torch.autograd.grad(F.cross_entropy(x, y), x, create_graph=True)
    assert_close(second, torch.autograd.grad(true_first.square().sum(), x)[0])


def test_vmap_is_refused() -> None:
    z, y = soft_targets((5, 9))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: longtail.cross_entropy(x, y.float()))(z.expand(3, 5, 9))


def test_under_autocast_logits_are_read_as_they_are() -> None:
    x, w = torch.randn(6, 8, generator=cases.generator(1)), torch.randn(13, 8, generator=cases.generator(2))
    _, y = soft_targets((6, 13))
    with torch.autocast("cpu", torch.bfloat16):
        z = F.linear(x, w)
        assert z.dtype == torch.bfloat16
        loss, grad = outcome(longtail.cross_entropy, z, y.float())
    assert (loss.dtype, grad.dtype) == (torch.float32, torch.bfloat16)
    truth, true_grad = outcome(F.cross_entropy, z.double(), y)
    assert_close(loss, truth)
    assert_close(grad, true_grad, z.new_tensor(0.0).expand_as(true_grad) + true_grad.bfloat16())
