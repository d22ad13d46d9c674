"""Promise: on a GPU the softmax family equals float64, at any size, stream and device, with no host sync anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import longtail
from tolerances import assert_close, assert_same

pytestmark = pytest.mark.gpu
ops = torch.ops.longtail
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = {1: 300, 2: 301, 3: 7, 127: 66, 1000: 129, 4096: 33, 5000: 130, 32000: 64, 50257: 133, 128256: 40}
FEW = ("plain", "smoothing_weight", "complement", "mixed")


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with longtail.use_backend(request.param):
        yield request.param


def cuda(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}


def reference(case: tuple[Tensor, Tensor], options: dict[str, Any], up: Tensor) -> list[list[Tensor]]:
    """[loss, gradient] of every row in float64, and by plain PyTorch in the logits' dtype."""
    results = []
    for wide in (True, False):
        z = case[0].double() if wide else case[0].clone()
        z.requires_grad_()
        loss = longtail.reference.softmax_loss(z, case[1], **(cases.to_float64(options) if wide else options))
        (grad,) = torch.autograd.grad(loss, z, up.to(loss.dtype))
        results.append([loss.detach(), grad])
    return results


def check(case: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
    """The four operators on the GPU against float64 there."""
    logits, target, options = case[0].cuda(), case[1].cuda(), cuda(options)
    up = cases.upstreams(target.shape, torch.float32)["random"].cuda()
    (loss, grad), (eager_loss, eager_grad) = reference((logits, target), options, up)
    tail = cases.operator_options(logits.shape[1], options)
    one, stats = ops.softmax_loss(logits, target, *tail)
    one_grad = ops.softmax_loss_backward(up, logits, target, stats, *tail)
    two, _, two_grad = ops.softmax_loss_and_grad(up, logits, target, *tail)
    written = logits.clone()
    three, _ = ops.softmax_loss_and_grad_(up, written, target, *tail)
    for value in (one, two, three):
        assert_close(value, loss, eager_loss, what="loss")
    for value in (one_grad, two_grad, written):
        assert_close(value, grad, eager_grad, what="gradient")
    ignored = target == cases.IGNORE
    for value in (one, stats, two_grad, written):
        assert (value[ignored] == 0).all()


def test_the_backend_serves_the_gpu(backend: str) -> None:
    assert longtail.backends()[backend].available


@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
@pytest.mark.parametrize("classes", SIZES)
def test_float32(classes: int, option_set: str) -> None:
    logits, target = cases.random_case(SIZES[classes], classes)
    check((cases.poison_ignored(logits, target), target), cases.options(option_set, classes, target))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=cases.name)
@pytest.mark.parametrize("option_set", FEW)
@pytest.mark.parametrize("classes", SIZES)
def test_half_precision(classes: int, option_set: str, dtype: torch.dtype) -> None:
    logits, target = cases.random_case(SIZES[classes], classes, dtype)
    check((cases.poison_ignored(logits, target), target), cases.options(option_set, classes, target, dtype))


@pytest.mark.parametrize("margin", cases.MARGINS)
@pytest.mark.parametrize("gamma", cases.GAMMAS)
@pytest.mark.parametrize("classes", [2, 127, 5000, 50257])
def test_margins(classes: int, gamma: float, margin: float) -> None:
    check(cases.margin_case(margin, classes), {"focal_gamma": gamma, "complement_gamma": -1.0})


@pytest.mark.parametrize("layout", ["row_stride", "offset"])
@pytest.mark.parametrize("dtype", FLOATS, ids=cases.name)
@pytest.mark.parametrize("classes", [64, 1000, 4099, 50257])
def test_layouts(classes: int, dtype: torch.dtype, layout: str) -> None:
    logits, target = cases.random_case(9, classes, dtype)
    tail = cases.operator_options(classes, cuda(cases.options("mixed", classes, target, dtype)))
    like = cases.LAYOUTS[layout](logits)
    storage = torch.empty(like.untyped_storage().nbytes() // like.itemsize, dtype=dtype, device="cuda")
    z = storage.as_strided(like.shape, like.stride(), like.storage_offset()).copy_(logits)
    up, target, logits = torch.randn(9, device="cuda"), target.cuda(), logits.cuda()
    expected = ops.softmax_loss_and_grad(up, logits, target, *tail)
    for actual, want in zip(ops.softmax_loss_and_grad(up, z, target, *tail), expected, strict=True):
        assert_close(actual, want.double(), factor=4)
    ops.softmax_loss_and_grad_(up, z, target, *tail)
    assert_close(z, expected[2].double(), factor=4)


@pytest.mark.parametrize("classes", [131071, 131072])
def test_more_than_2_31_elements(classes: int) -> None:
    rows = 2**31 // classes + 3
    if torch.cuda.mem_get_info()[0] < 12 * rows * classes:
        pytest.skip("needs 26 GB of device memory")
    logits = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(classes, (rows,), device="cuda")
    last = logits[-3:].double().requires_grad_()
    truth = longtail.reference.softmax_loss(last, target[-3:], complement_gamma=-1.0)
    up = torch.randn(rows, device="cuda")
    (grad,) = torch.autograd.grad(truth, last, up[-3:].double())
    tail = cases.operator_options(classes, {"complement_gamma": -1.0})
    loss, stats = ops.softmax_loss(logits, target, *tail)
    assert_close(loss[-3:], truth.detach())
    assert_close(ops.softmax_loss_backward(up, logits, target, stats, *tail)[-3:], grad)
    ops.softmax_loss_and_grad_(up, logits, target, *tail)
    assert_close(logits[-3:], grad)
    ops.scale_grad_(logits, torch.tensor(2.0, device="cuda").expand(rows), None, -100)
    assert_close(logits[-3:], 2 * grad)


@pytest.mark.parametrize("name", ["softmax_loss", "softmax_loss_backward", "softmax_loss_and_grad",
                                  "softmax_loss_and_grad_", "scale_grad_"])  # fmt: skip
@pytest.mark.parametrize("classes", [11, 5000])
def test_opcheck(classes: int, name: str) -> None:
    logits, target = cases.random_case(7, classes)
    tail = cases.operator_options(classes, cuda(cases.options("mixed", classes, target)))
    logits, target = logits.cuda(), target.cuda()
    up = torch.randn(7, device="cuda")
    arguments = {
        "softmax_loss": (logits, target, *tail),
        "softmax_loss_backward": (up, logits, target, ops.softmax_loss(logits, target, *tail)[1], *tail),
        "softmax_loss_and_grad": (up, logits, target, *tail),
        "softmax_loss_and_grad_": (up, logits, target, *tail),
        "scale_grad_": (logits, up, target, -100),
    }[name]
    torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize("classes", [9, 5003])
@pytest.mark.parametrize("option_set", ["plain", "mixed"])
def test_gradient_is_the_slope_of_the_float64_loss(option_set: str, classes: int) -> None:
    """Central differences of the reference, in random directions."""
    logits, target = cases.random_case(6, classes, ignore=False)
    options = cuda(cases.options(option_set, classes, target))
    logits, target, up = logits.cuda(), target.cuda(), torch.ones(6, device="cuda")
    grad = ops.softmax_loss_and_grad(up, logits, target, *cases.operator_options(classes, options))[2]
    wide, step = cases.to_float64(options), 1e-5
    for _ in range(3):
        direction = torch.randn_like(logits, dtype=torch.float64)
        ahead, behind = (
            longtail.reference.softmax_loss(logits.double() + distance * direction, target, **wide)
            for distance in (step, -step)
        )
        slope = (ahead - behind) / (2 * step)
        assert torch.allclose((grad * direction).sum(1), slope, rtol=1e-4, atol=1e-5)


def training_step(mode: str, classes: int = 5000) -> tuple[Callable[[], Tensor], Tensor, Tensor]:
    """A step over static tensors, x and target; gradients land in x.grad."""
    x = torch.randn(64, classes, device="cuda", requires_grad=True)
    target = torch.randint(classes, (64,), device="cuda")
    options = cuda(cases.options("mixed", classes, target.cpu())) | {"gradient": mode}

    def step() -> Tensor:
        x.grad = None
        loss = longtail.cross_entropy(x * 1.0, target, **options)
        (loss * 1.7).backward()
        return loss.detach()

    return step, x, target


@pytest.mark.parametrize("mode", cases.MODES)
def test_no_host_sync(mode: str) -> None:
    step, _, _ = training_step(mode)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("classes", [1000, 50257])
def test_cuda_graph(classes: int, mode: str) -> None:
    step, x, target = training_step(mode, classes)
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
        target.random_(classes)
    graph.replay()
    loss, grad = captured.clone(), captured_grad.clone()
    assert_same(loss, step())
    assert_same(grad, x.grad)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("classes", [1000, 50257])
def test_the_same_bits_at_every_run(classes: int, mode: str) -> None:
    step, x, _ = training_step(mode, classes)
    first = step(), x.grad
    for _ in range(5):
        assert_same(step(), first[0])
        assert_same(x.grad, first[1])


def test_other_streams() -> None:
    """The kernels wait for work that their own stream still has to do."""
    step, x, _ = training_step("backward")
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


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    logits, target = cases.random_case(8, 5000)
    results = []
    for device in ("cuda:0", "cuda:1"):
        x = logits.to(device).requires_grad_()
        loss = longtail.cross_entropy(x, target.to(device), complement_gamma=-1.0)
        loss.backward()
        assert torch.cuda.current_device() == 0
        results.append((loss.detach().cpu(), x.grad.cpu()))
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("compile_mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("mode", cases.MODES)
def test_compiled_model(mode: str, compile_mode: str | None) -> None:
    torch._dynamo.reset()
    model = nn.Linear(32, 5000, device="cuda")
    target = torch.randint(5000, (16,), device="cuda")
    options = cuda(cases.options("mixed", 5000, target.cpu())) | {"gradient": mode}

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


def test_logits_overwritten_in_place_cannot_be_used_again() -> None:
    x = torch.randn(4, 5000, device="cuda", requires_grad=True)
    z = x * 2.0
    square = z.square().sum()
    longtail.cross_entropy(z, torch.arange(4, device="cuda"), gradient="inplace")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@pytest.mark.parametrize("classes", [10, 5000])
def test_a_target_out_of_range_traps(classes: int, backend: str) -> None:
    body = (
        "import longtail, torch\n"
        f"x, target = torch.zeros(3, {classes}, device='cuda'), torch.tensor([0, {classes}, 1], device='cuda')\n"
        "longtail.cross_entropy(x, target, reduction='sum')\n"
        "torch.cuda.synchronize()\n"
        "print('silently ran')\n"
    )
    environment = {**os.environ, "LONGTAIL_BACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", body], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert "silently ran" not in done.stdout
    assert done.returncode != 0
    assert "target is out of bounds" in done.stdout + done.stderr
