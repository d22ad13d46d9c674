"""Promise: on a GPU the sigmoid family equals float64, over rows and images, at any size, with no host sync."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import cases
import longtail
import sigmoid_cases
from gpu_cases import FLOATS, IMAGES, check_sigmoid, cuda, poisoned
from tolerances import assert_close, assert_same

pytestmark = pytest.mark.gpu
ops = torch.ops.longtail
ROWS = ((300, 1), (301, 11), (66, 127), (129, 1000), (130, 8192), (40, 50257))
BACKENDS = ("cuda", "triton")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with longtail.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
@pytest.mark.parametrize("shape", [*ROWS, *IMAGES], ids=str)
def test_sigmoid(shape: tuple[int, ...], kind: str, elementwise: bool) -> None:
    for name in sigmoid_cases.sets_for(kind):
        logits, target = sigmoid_cases.random_case(shape, kind)
        options = sigmoid_cases.options(name, logits)
        check_sigmoid(poisoned(logits, target), target, options, elementwise)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=cases.name)
@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize("shape", [*ROWS, *IMAGES], ids=str)
def test_sigmoid_in_half_precision(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    logits, target = sigmoid_cases.random_case(shape, kind, dtype)
    options = sigmoid_cases.options("mixed", logits)
    for elementwise in (False, True):
        check_sigmoid(poisoned(logits, target), target, options, elementwise)
        if kind == "soft":
            check_sigmoid(logits, target.to(dtype), options, elementwise)


@pytest.mark.parametrize("gamma", cases.GAMMAS)
def test_saturation(gamma: float) -> None:
    z = torch.tensor([sign * margin for margin in (17.0, 20.0, 89.0, 1e4) for sign in (1.0, -1.0)])
    y = torch.tensor([0.0, 1.0, 0.4])[:, None].expand(3, 8).contiguous()
    for shape in ((3, 8), (1, 3, 8)):
        for alpha in (None, 0.25):
            options = {"alpha": alpha, "gamma": gamma, "ignore_index": cases.IGNORE}
            check_sigmoid(z.repeat(3, 1).reshape(shape), y.reshape(shape), options, True)
            check_sigmoid(torch.stack([z, -z], 1), torch.ones(8, dtype=torch.long), options, True)


@pytest.mark.parametrize("kind", ["class", "dense"])
def test_more_than_2_31_elements(kind: str) -> None:
    shape = (1, 2304, 1024, 1024)  # 2.4e9, in one image
    if torch.cuda.mem_get_info()[0] < 8 * torch.Size(shape).numel():
        pytest.skip("needs 20 GB of device memory")
    logits = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(2304, (1, 1024, 1024), device="cuda")
    if kind == "dense":
        target = torch.zeros_like(logits).scatter_(1, target[:, None], 1.0)
    last = logits[-1:, :, -1:].clone().double().requires_grad_()
    y = target[-1:, :, -1:].double() if kind == "dense" else target[-1:, -1:]
    with longtail.use_backend("reference"):
        truth = longtail.sigmoid_focal_loss(last, y, reduction="rows")
        truth.sum().backward()
    x = logits.requires_grad_()
    loss = longtail.sigmoid_focal_loss(x, target, reduction="rows")
    assert_close(loss[-1:, -1:], truth.detach())
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert_close(grad[-1:, :, -1:], last.grad)


@pytest.mark.parametrize("name", ["sigmoid_loss", "sigmoid_loss_backward", "sigmoid_loss_and_grad",
                                  "sigmoid_loss_and_grad_"])  # fmt: skip
@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize("shape", [(7, 11), (2, 5, 64)])
def test_opcheck(shape: tuple[int, ...], kind: str, name: str) -> None:
    logits, target = sigmoid_cases.random_case(shape, kind)
    tail = sigmoid_cases.operator_options(cuda(sigmoid_cases.options("mixed", logits)))
    logits, target = logits.cuda(), (target if kind == "soft" else target.flatten()).cuda()
    up = torch.randn(logits.numel() // shape[1], device="cuda")
    arguments = {
        "sigmoid_loss": (logits, target, *tail, False),
        "sigmoid_loss_backward": (up, logits, target, *tail),
        "sigmoid_loss_and_grad": (up, logits, target, *tail, False),
        "sigmoid_loss_and_grad_": (up, logits, target, *tail, False),
    }[name]
    torch.library.opcheck(getattr(ops, name).default, arguments)


def training_step(family: str, mode: str) -> tuple[Callable[[], Tensor], Tensor, Tensor]:
    """A step over static tensors, x and target; gradients land in x.grad."""
    shape = (2, 21, 40, 52) if "image" in family else (64, 5000)
    x = torch.randn(shape, device="cuda", requires_grad=True)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device="cuda")

    def step() -> Tensor:
        x.grad = None
        if "softmax" in family:
            loss = longtail.focal_loss(x * 1.0, target, gradient=mode)
        else:
            loss = longtail.sigmoid_focal_loss(x * 1.0, target, reduction="mean", normalizer="rows", gradient=mode)
        (loss * 1.7).backward()
        return loss.detach()

    return step, x, target


FAMILIES = ("sigmoid", "sigmoid_image", "softmax_image")


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
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graph_and_the_same_bits_at_every_run(family: str, mode: str) -> None:
    step, x, target = training_step(family, mode)
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
    for _ in range(3):
        assert_same(loss, step())
        assert_same(grad, x.grad)


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


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    logits, target = sigmoid_cases.random_case((8, 500), "class")
    results = []
    for device in ("cuda:0", "cuda:1"):
        x = logits.to(device).requires_grad_()
        loss = longtail.sigmoid_focal_loss(x, target.to(device), reduction="sum")
        loss.backward()
        results.append((loss.detach().cpu(), x.grad.cpu()))
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("shape", [(3, 10), (3, 5000), (1, 10, 3)])
@pytest.mark.parametrize("call", ["sigmoid_focal_loss(x, t, reduction='sum')", "cross_entropy(x, t)"])
def test_a_target_out_of_range_traps(shape: tuple[int, ...], call: str, backend: str) -> None:
    body = (
        "import longtail, torch\n"
        f"x, t = torch.zeros({shape}, device='cuda'), torch.tensor([0, {shape[1]}, 1], device='cuda')\n"
        f"t = t.reshape({(shape[0], *shape[2:])})\n"
        f"with longtail.use_backend({backend!r}): longtail.{call}\n"
        "torch.cuda.synchronize()\n"
        "print('silently ran')\n"
    )
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=300, check=False)
    assert "silently ran" not in done.stdout
    assert done.returncode != 0
    assert "target is out of bounds" in done.stdout + done.stderr
