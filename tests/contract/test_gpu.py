"""Promise: on a GPU the operators keep their contract at any size and on any device, and trap bad targets.

What they compute is looked at in the tests `*_operators.py`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
import sigmoid_cases
from batches import probability_case
from tolerances import assert_close, assert_same

pytestmark = pytest.mark.gpu
ops = torch.ops.longtail


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with longtail.use_backend(request.param):
        yield request.param


def cuda(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}


def test_the_backend_serves_the_gpu(backend: str) -> None:
    assert longtail.backends()[backend].available


@pytest.mark.parametrize("name", ["softmax_loss", "softmax_loss_backward", "softmax_loss_and_grad",
                                  "softmax_loss_and_grad_", "scale_grad_"])  # fmt: skip
@pytest.mark.parametrize("classes", [11, 5000])
def test_opcheck_softmax(classes: int, name: str) -> None:
    logits, target = cases.random_case(7, classes)
    tail = cases.operator_options(classes, cuda(cases.options("mixed_tail", classes, target)))
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


@pytest.mark.parametrize("classes", [11, 5000])
def test_opcheck_softmax_of_class_probabilities(classes: int) -> None:
    logits, target = probability_case((7, classes))
    options = cuda(cases.options("all_of_probabilities", classes, target[:, 0]))
    tail, logits, target = cases.operator_options(classes, options), logits.cuda(), target.cuda()
    stats = ops.softmax_loss(logits, target, *tail)[1]
    torch.library.opcheck(ops.softmax_loss.default, (logits, target, *tail))
    up = torch.randn(7, device="cuda")
    torch.library.opcheck(ops.softmax_loss_backward.default, (up, logits, target, stats, *tail))


@pytest.mark.parametrize("name", ["sigmoid_loss", "sigmoid_loss_backward", "sigmoid_loss_and_grad",
                                  "sigmoid_loss_and_grad_"])  # fmt: skip
@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize("shape", [(7, 11), (2, 5, 64)])
def test_opcheck_sigmoid(shape: tuple[int, ...], kind: str, name: str) -> None:
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


@pytest.mark.parametrize("classes", [9, 5003])
@pytest.mark.parametrize("option_set", ["plain", "mixed", "target_scale", "mitigation"])
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


@pytest.mark.parametrize("classes", [131071, 131072])
def test_more_than_2_31_elements_in_rows(classes: int) -> None:
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


def test_more_than_2_31_elements_in_rows_of_class_probabilities() -> None:
    classes = 131071
    rows = 2**31 // classes + 3
    if torch.cuda.mem_get_info()[0] < 8 * rows * classes:
        pytest.skip("needs 17 GB of device memory")
    logits = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    target = torch.rand(rows, classes, device="cuda", dtype=torch.bfloat16)
    up, tail = torch.randn(rows, device="cuda"), cases.operator_options(classes, {})
    last = logits[-3:].double(), target[-3:].double()
    with longtail.use_backend("reference"):
        truth, stats = ops.softmax_loss(*last, *tail)
        grad = ops.softmax_loss_backward(up[-3:].double(), *last, stats, *tail)
    loss, stats = ops.softmax_loss(logits, target, *tail)
    assert_close(loss[-3:], truth, factor=4)
    assert_close(ops.softmax_loss_backward(up, logits, target, stats, *tail)[-3:], grad, factor=4)


@pytest.mark.parametrize("kind", ["class", "dense"])
def test_more_than_2_31_elements_in_an_image(kind: str) -> None:
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


@pytest.mark.parametrize("family", ["softmax", "sigmoid"])
def test_a_device_that_is_not_the_current_one(family: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    logits, target = cases.random_case(8, 5000)
    results = []
    for device in ("cuda:0", "cuda:1"):
        x, y = logits.to(device).requires_grad_(), target.to(device)
        if family == "softmax":
            loss = longtail.cross_entropy(x, y, complement_gamma=-1.0)
        else:
            loss = longtail.sigmoid_focal_loss(x, y, reduction="sum", ignore_index=cases.IGNORE)
        loss.backward()
        assert torch.cuda.current_device() == 0
        results.append((loss.detach().cpu(), x.grad.cpu()))
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


CALLS = ("cross_entropy(x, t, reduction='sum')", "cross_entropy(x, t)", "sigmoid_focal_loss(x, t, reduction='sum')")


@pytest.mark.parametrize("shape", [(3, 10), (3, 5000), (1, 10, 3)], ids=str)
@pytest.mark.parametrize("call", CALLS)
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
