"""Promise: `torch.compile(fullgraph=True)`, `torch.func`, autocast and checkpointing equal eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import cases
import longtail
from tolerances import assert_close, assert_same

ROWS, FEATURES, CLASSES = 6, 8, 13


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


def train_step(options: dict[str, Any]) -> tuple[nn.Linear, Callable[[Tensor, Tensor], Tensor]]:
    """A linear model (same weights every time) and the function from features and targets to its loss."""
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES)
    return model, lambda x, target: longtail.cross_entropy(model(x), target, **options)


def outcome(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """The loss and the parameters' gradients for an upstream gradient that is not one."""
    return [loss.detach(), *torch.autograd.grad(loss * 2.5, list(model.parameters()))]


def mixed(target: Tensor, mode: str) -> dict[str, Any]:
    return {**cases.options("mixed", CLASSES, target), "gradient": mode}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", cases.MODES)
def test_compiled_training_step_equals_eager(mode: str, backend: str) -> None:
    x, target = features()
    results = []
    for compiled in (False, True):
        model, step = train_step(mixed(target, mode))
        function = torch.compile(step, fullgraph=True, backend=backend) if compiled else step
        results.append(outcome(model, function(x, target)))
    for eager, other in zip(*results, strict=True):
        assert eager.abs().max() > 0
        assert_close(other, eager.double(), factor=4)


@pytest.mark.parametrize("grad_enabled", [False, True])
@pytest.mark.parametrize("mode", cases.MODES)
def test_compiled_evaluation(mode: str, grad_enabled: bool) -> None:
    """Nothing requires a gradient, or gradients are off: the validation loss of a compiled model."""
    logits, target = cases.random_case(ROWS, CLASSES)
    options = mixed(target, mode)
    compiled = torch.compile(
        lambda z: longtail.cross_entropy(z * 1.0, target, return_stats=True, **options),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = longtail.reference.cross_entropy(
        logits.double(), target, **cases.to_float64(cases.options("mixed", CLASSES, target))
    )
    with torch.set_grad_enabled(grad_enabled):
        loss, stats = compiled(logits if grad_enabled else logits.clone().requires_grad_())
    assert not loss.requires_grad
    assert_close(loss, expected, what="loss")
    assert (stats.log_prob[target != cases.IGNORE] < 0).all()


def test_compiled_statistics_and_module() -> None:
    x, target = features()
    x.requires_grad_()
    loss = longtail.ComplementCrossEntropyLoss(gamma=-1.0, weight=torch.rand(CLASSES) + 0.5, return_stats=True)
    logits = nn.functional.linear(x, torch.randn(CLASSES, FEATURES))
    eager_loss, eager_stats = loss(logits, target)
    compiled_loss, compiled_stats = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits, target)
    assert_close(compiled_loss, eager_loss.double())
    for name in ("lse", "log_prob", "complement_entropy"):
        assert_close(getattr(compiled_stats, name), getattr(eager_stats, name).double(), what=name)
    assert_same(compiled_stats.correct, eager_stats.correct)


@pytest.mark.parametrize("mode", cases.MODES)
def test_number_of_rows_is_dynamic(mode: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model, step = train_step({"complement_gamma": -1.0, "label_smoothing": 0.1, "gradient": mode})
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in (6, 9, 17, 33, 5):
        x, target = features(rows, seed=rows)
        for other, eager in zip(outcome(model, compiled(x, target)), outcome(model, step(x, target)), strict=True):
            assert_close(other, eager.double(), factor=4)
    assert counter.frame_count <= 2, "one graph for the first size, one for every other"


@pytest.mark.parametrize("convert", [int, float])
def test_a_number_as_normalizer_is_dynamic(convert: Callable[[int], float]) -> None:
    """Such as the labels of all micro-batches of a step, which change with every step."""
    counter = CompileCounterWithBackend("aot_eager")
    x, target = features()
    model, _ = train_step({})

    def step(normalizer: float) -> Tensor:
        return longtail.linear_cross_entropy(x, model.weight, target, linear_bias=model.bias, normalizer=normalizer)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for normalizer in map(convert, (6, 9, 17, 33, 5)):
        for other, eager in zip(outcome(model, compiled(normalizer)), outcome(model, step(normalizer)), strict=True):
            assert_close(other, eager.double(), factor=4)
    assert counter.frame_count <= 2, "one graph for the first number, one for every other"


def test_a_schedule_outside_of_what_is_compiled() -> None:
    """A float option that takes more values than torch makes graphs of one function."""
    x, target = features()
    gammas = [i / 4 for i in range(12)]
    model, _ = train_step({})
    loss = longtail.CrossEntropyLoss()
    counter = CompileCounterWithBackend("eager")

    @torch.compiler.disable
    def compute_loss(logits: Tensor, target: Tensor) -> Tensor:
        return loss(logits, target)

    compiled = torch.compile(lambda: compute_loss(model(x), target), backend=counter)
    for gamma in gammas:
        loss.focal_gamma = gamma
        for other, eager in zip(outcome(model, compiled()), outcome(model, loss(model(x), target)), strict=True):
            assert_close(other, eager.double(), factor=4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("limit", [2, 4])
def test_a_schedule_within_what_is_compiled(limit: int) -> None:
    """Takes a graph for each value, as far as torch is told to make them."""
    x, target = features()
    model, _ = train_step({})

    def loss(gamma: float) -> Tensor:
        return longtail.cross_entropy(model(x), target, focal_gamma=gamma)

    seen = []
    with torch._dynamo.config.patch(recompile_limit=limit):
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        for gamma in (0.5, 1.0, 1.5, 2.0):
            try:
                assert_close(compiled(gamma), loss(gamma).double())
                seen.append(gamma)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                break
    assert len(seen) == limit


def test_tensors_that_change_make_no_new_graph() -> None:
    x, target = features()
    loss, counter = (
        longtail.CrossEntropyLoss(torch.ones(CLASSES), normalizer=torch.ones(())),
        CompileCounterWithBackend("eager"),
    )
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    logits = nn.functional.pad(x, (0, CLASSES - FEATURES))
    for i in range(12):
        loss.weight, loss.normalizer = torch.rand(CLASSES), torch.tensor(i + 1.0)
        assert_close(compiled(logits, target), loss(logits, target).double())
    assert counter.frame_count == 1


def test_autocast_under_compile() -> None:
    x, target = features()
    losses = []
    for compiled in (False, True):
        model, step = train_step({"focal_gamma": 2.0})
        function = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(x, target)
        assert loss.dtype == torch.float32
        losses.append(outcome(model, loss))
    for eager, other in zip(*losses, strict=True):
        assert_close(other, eager.double(), factor=4)


@pytest.mark.parametrize("mode", cases.MODES)
def test_func_grad(mode: str) -> None:
    logits, target = cases.random_case(7, 11)
    options = {**cases.options("mixed", 11, target), "gradient": mode}

    def scaled(z: Tensor) -> Tensor:
        return longtail.cross_entropy(z * 1.0, target, **options) * 1.5

    grad, value = torch.func.grad_and_value(scaled)(logits)
    x = logits.clone().requires_grad_()
    loss = scaled(x)
    loss.backward()
    assert_same(value, loss.detach())
    assert_close(grad, x.grad.double())


def test_functional_call_grad_of_parameters() -> None:
    x, target = features()
    model, _ = train_step({})
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return longtail.complement_cross_entropy(torch.func.functional_call(model, p, (x,)), target)

    grads = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(longtail.complement_cross_entropy(model(x), target), list(model.parameters()))
    for got, want in zip(grads.values(), expected, strict=True):
        assert_close(got, want.double())


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: f], ids=["grad", "value"])
def test_vmap_is_refused(transform: Callable[..., Any]) -> None:
    """Rows are the batch already; vmap over the operators says so instead of looping slowly or wrongly."""
    logits, target = cases.random_case(5, 9, ignore=False)
    batched = torch.func.vmap(transform(lambda z: longtail.cross_entropy(z, target, complement_gamma=-1.0)))
    with pytest.raises(RuntimeError, match="vmap"):
        batched(logits.expand(3, 5, 9))


@pytest.mark.parametrize("mode", cases.MODES)
def test_checkpoint(mode: str) -> None:
    x, target = features()
    results = []
    for use in (False, True):
        model, step = train_step(mixed(target, mode))
        loss = checkpoint(step, x, target, use_reentrant=False) if use else step(x, target)
        results.append(outcome(model, loss))
    for plain, other in zip(*results, strict=True):
        assert_close(other, plain.double())
