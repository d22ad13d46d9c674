"""Promise: on a GPU training steps sync with no host, give the same bits every time, and go into graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import cases
import longtail
from tolerances import assert_close, assert_same

pytestmark = pytest.mark.gpu
FAMILIES = ("softmax", "softmax_image", "sigmoid", "sigmoid_image")
MANY = [*((family, 5000) for family in FAMILIES), ("softmax", 1000), ("softmax", 50257)]


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with longtail.use_backend(request.param):
        yield request.param


def options_of(classes: int, target: Tensor, mode: str) -> cases.Options:
    options = cases.options("mixed_tail", classes, target.cpu()) | {"gradient": mode}
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}


def training_step(family: str, mode: str, classes: int = 5000) -> tuple[Callable[[], Tensor], Tensor, Tensor]:
    """A step over static tensors, x and target; gradients land in x.grad."""
    shape = (2, 21, 40, 52) if "image" in family else (64, classes)
    x = torch.randn(shape, device="cuda", requires_grad=True)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device="cuda")
    options = options_of(classes, target, mode)

    def step() -> Tensor:
        x.grad = None
        if family == "softmax":
            loss = longtail.cross_entropy(x * 1.0, target, **options)
        elif family == "softmax_image":
            loss = longtail.focal_loss(x * 1.0, target, gradient=mode)
        else:
            loss = longtail.sigmoid_focal_loss(x * 1.0, target, reduction="mean", normalizer="rows", gradient=mode)
        (loss * 1.7).backward()
        return loss.detach()

    return step, x, target


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_host_sync(family: str, mode: str) -> None:
    step, _, _ = training_step(family, mode)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(("family", "classes"), MANY)
def test_cuda_graph_and_the_same_bits_at_every_run(family: str, classes: int, mode: str) -> None:
    step, x, target = training_step(family, mode, classes)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    captured_grad = x.grad
    with torch.no_grad():
        x.normal_()
        target.random_(x.shape[1])
    graph.replay()
    loss, grad = captured.clone(), captured_grad.clone()
    for _ in range(6):
        assert_same(loss, step())
        assert_same(grad, x.grad)


def test_other_streams() -> None:
    """The kernels wait for work that their own stream still has to do."""
    step, x, _ = training_step("softmax", "backward")
    expected = step(), x.grad
    values = x.detach().clone()
    side = torch.cuda.Stream()
    with torch.no_grad():
        x.fill_(torch.nan)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            x.copy_(values)
        loss = step()
    side.synchronize()
    assert_same(loss, expected[0])
    assert_same(x.grad, expected[1])


@pytest.mark.parametrize("compile_mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("mode", cases.MODES)
def test_compiled_model(mode: str, compile_mode: str | None) -> None:
    torch._dynamo.reset()
    model = nn.Linear(32, 5000, device="cuda")
    target = torch.randint(5000, (16,), device="cuda")
    options = options_of(5000, target, mode)

    def step(x: Tensor) -> Tensor:
        return longtail.cross_entropy(model(x), target, **options)

    compiled = torch.compile(step, fullgraph=True, mode=compile_mode)
    for seed in range(4):
        x = torch.randn(16, 32, generator=cases.generator(seed)).cuda()
        losses, grads = [], []
        for function in (step, compiled):
            model.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            loss = function(x)
            loss.backward()
            losses.append(loss.detach().clone())
            grads.append(model.weight.grad.clone())
        assert_close(losses[1], losses[0].double(), factor=4)
        assert_close(grads[1], grads[0].double(), grads[0] * (1 + 1e-5), factor=4)


@pytest.mark.parametrize("compile_mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("family", ["sigmoid", "softmax_image"])
def test_compiled(family: str, mode: str, compile_mode: str | None) -> None:
    torch._dynamo.reset()
    shape = (2, 21, 16, 16) if family == "softmax_image" else (64, 500)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device="cuda")

    def loss(x: Tensor) -> Tensor:
        if family == "softmax_image":
            return longtail.focal_loss(x * 2.0, target, gradient=mode)
        return longtail.sigmoid_focal_loss(x * 2.0, target, reduction="sum", gradient=mode)

    compiled = torch.compile(loss, fullgraph=True, mode=compile_mode)
    for seed in range(3):
        values = torch.randn(shape, generator=cases.generator(seed)).cuda()
        results = []
        for function in (loss, compiled):
            x = values.clone().requires_grad_()
            torch.compiler.cudagraph_mark_step_begin()
            value = function(x)
            value.backward()
            results.append((value.detach().clone(), x.grad.clone()))
        for actual, expected in zip(*reversed(results), strict=True):
            assert_close(actual, expected.double(), factor=4)


def test_logits_overwritten_in_place_cannot_be_used_again() -> None:
    x = torch.randn(4, 5000, device="cuda", requires_grad=True)
    z = x * 2.0
    square = z.square().sum()
    longtail.cross_entropy(z, torch.arange(4, device="cuda"), gradient="inplace")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()
