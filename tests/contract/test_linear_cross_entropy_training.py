"""Promise: the fused linear loss trains compiled, under autocast, checkpointed, transformed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import cases
import longtail
from tolerances import assert_close, assert_same

ROWS, FEATURES, CLASSES = 12, 8, 13
MODES = ("auto", "backward", "none")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def features(rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, FEATURES, generator=cases.generator(seed))
    target = torch.randint(CLASSES, (rows,), generator=cases.generator(seed + 1))
    target[1] = cases.IGNORE
    return x, target


Step = Callable[[Tensor, Tensor], Tensor]


def train_step(mode: str, **options: Any) -> tuple[nn.Module, Step]:
    """A body and a head (same weights every time), and the function from inputs and targets to a scalar loss."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(FEATURES, FEATURES), "head": nn.Linear(FEATURES, CLASSES)})
    head = model["head"]
    options |= {"reduction": "none"} if mode == "none" else {"gradient": mode}

    def step(x: Tensor, target: Tensor) -> Tensor:
        hidden = model["body"](x).tanh()
        loss = longtail.linear_cross_entropy(
            hidden, head.weight, target, linear_bias=head.bias, chunk_size=5, **options
        )
        return (loss * torch.arange(1.0, len(x) + 1)).sum() if mode == "none" else loss

    return model, step


def outcome(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 2.5, list(model.parameters()))]


def assert_equal_outcomes(results: list[list[Tensor]], factor: float = 4.0) -> None:
    for a, b in zip(*results, strict=True):
        assert a.abs().max() > 0
        assert_close(b.reshape(1, -1), a.reshape(1, -1).double(), factor=factor)


def mixed(target: Tensor) -> dict[str, Any]:
    return cases.options("mixed", CLASSES, target)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_step_equals_eager(mode: str, backend: str) -> None:
    x, target = features()
    results = []
    for compiled in (False, True):
        model, step = train_step(mode, **mixed(target))
        function = torch.compile(step, fullgraph=True, backend=backend) if compiled else step
        results.append(outcome(model, function(x, target)))
    assert_equal_outcomes(results)


@pytest.mark.parametrize("mode", MODES)
def test_number_of_rows_is_dynamic(mode: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model, step = train_step(mode, complement_gamma=-1.0, label_smoothing=0.1)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in (6, 9, 17, 33, 4):
        x, target = features(rows, seed=rows)
        assert_equal_outcomes([outcome(model, step(x, target)), outcome(model, compiled(x, target))])
    assert counter.frame_count <= 2, "one graph for the first size, one for every other"
    assert counter.op_count <= 40, "the chunks are not unrolled"


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_compiled_evaluation(grad_enabled: bool) -> None:
    model, _ = train_step("auto")
    x, target = features()
    weight, bias = (p.detach() for p in model["head"].parameters())
    options = mixed(target)

    def evaluate(x: Tensor) -> Any:
        return longtail.linear_cross_entropy(x, weight, target, linear_bias=bias, return_stats=True, **options)

    with torch.set_grad_enabled(grad_enabled):
        loss, stats = torch.compile(evaluate, fullgraph=True, backend="aot_eager")(x)
    expected, expected_stats = evaluate(x)
    assert not loss.requires_grad
    assert_close(loss, expected.double())
    assert_same(stats.correct, expected_stats.correct)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.name)
@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: str, dtype: torch.dtype, compiled: bool) -> None:
    x, target = features()
    model, step = train_step(mode, focal_gamma=2.0)
    function = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    with torch.autocast("cpu", dtype):
        loss = function(x, target)
        logits = model["head"](model["body"](x).tanh())
        assert logits.dtype == dtype
        eager = longtail.cross_entropy(logits, target, focal_gamma=2.0, reduction="none" if mode == "none" else "mean")
        eager = (eager * torch.arange(1.0, ROWS + 1)).sum() if mode == "none" else eager
    assert loss.dtype == torch.float32
    for got, want in zip(outcome(model, loss), outcome(model, eager), strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()


def test_autocast_leaves_float64_alone() -> None:
    x, target = features()
    weight = torch.randn(CLASSES, FEATURES, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = longtail.linear_cross_entropy(x.double(), weight, target)
    assert_close(loss, longtail.cross_entropy(x.double() @ weight.T, target))


@pytest.mark.parametrize("subset", range(8))
@pytest.mark.parametrize("mode", MODES)
def test_only_what_requires_grad(mode: str, subset: int) -> None:
    x, target = features()
    tensors = [x, torch.randn(CLASSES, FEATURES), torch.randn(CLASSES)]
    wanted = [bool(subset >> i & 1) for i in range(3)]
    options: dict[str, Any] = {"reduction": "none"} if mode == "none" else {"gradient": mode}
    results = []
    for fused in (False, True):
        a, w, b = (t.clone().requires_grad_(need) for t, need in zip(tensors, wanted, strict=True))
        if fused:
            loss = longtail.linear_cross_entropy(a, w, target, linear_bias=b, chunk_size=5, **options)
        else:
            loss = longtail.cross_entropy(F.linear(a, w, b), target, reduction=options.get("reduction", "mean"))
        assert loss.requires_grad == any(wanted)
        if not any(wanted):
            return
        loss.backward(torch.full(loss.shape, 0.3))
        results.append([loss.detach(), *(t.grad for t in (a, w, b) if t.grad is not None)])
        assert [t.grad is not None for t in (a, w, b)] == wanted
    assert_equal_outcomes(results)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_checkpoint(mode: str, reentrant: bool) -> None:
    x, target = features()
    results = []
    for use in (False, True):
        model, step = train_step(mode, **mixed(target))
        leaf = x.clone().requires_grad_()
        loss = checkpoint(step, leaf, target, use_reentrant=reentrant) if use else step(leaf, target)
        (loss * 2.5).backward()
        results.append([loss.detach(), leaf.grad, *(p.grad for p in model.parameters())])
    assert_equal_outcomes(results)


@pytest.mark.parametrize("mode", MODES)
def test_func_grad(mode: str) -> None:
    x, target = features()
    model, step = train_step(mode, **mixed(target))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(step(leaf, target) * 1.5, leaf)
    model.requires_grad_(False)
    assert_close(torch.func.grad(lambda a: step(a, target) * 1.5)(x), expected.double(), factor=4)


@pytest.mark.parametrize("mode", MODES)
def test_second_derivative_is_refused(mode: str) -> None:
    x, target = features()
    model, step = train_step(mode)
    loss = step(x, target)
    grads = torch.autograd.grad(loss, list(model["head"].parameters()), create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="second derivatives"):
            grad.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("mode", ["auto", "backward"])
def test_meta_tensors(mode: str) -> None:
    x, target = (t.to("meta") for t in features())
    model, step = train_step(mode)
    model.to("meta")
    for got, parameter in zip(outcome(model, step(x, target))[1:], model.parameters(), strict=True):
        assert (got.device.type, got.shape) == ("meta", parameter.shape)


def test_second_backward() -> None:
    x, target = features()
    weight = torch.randn(CLASSES, FEATURES).requires_grad_()
    loss = longtail.linear_cross_entropy(x, weight, target)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    with pytest.raises(RuntimeError, match='gradient="backward"'):
        loss.backward()
    assert_same(weight.grad, first, "a refused backward adds nothing")
    weight.grad = None
    loss = longtail.linear_cross_entropy(x, weight, target, gradient="backward")
    loss.backward(retain_graph=True)
    (loss * 2).backward()
    assert_close(weight.grad, 3 * first.double(), factor=4)


def test_reference_backend() -> None:
    x, target = features()
    results = []
    for backend in ("cpu", "reference"):
        if not longtail.backends()[backend].available:
            pytest.skip("no compiled kernels")
        with longtail.use_backend(backend):
            model, step = train_step("auto", **mixed(target))
            results.append(outcome(model, step(x, target)))
    assert_equal_outcomes(results)


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: f], ids=["grad", "value"])
def test_vmap_is_refused(transform: Callable[..., Any]) -> None:
    x, target = features()
    weight = torch.randn(CLASSES, FEATURES)
    batched = torch.func.vmap(transform(lambda a: longtail.linear_cross_entropy(a, weight, target)))
    with pytest.raises(RuntimeError, match="vmap"):
        batched(x.expand(3, *x.shape))
