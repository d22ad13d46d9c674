"""Promise: on a GPU losses over images equal those over rows, without a copy, and shards of the classes join."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
import shard_cases
from longtail.ops import cuda as cuda_backend
from longtail.ops.layout import to_images, to_rows
from tolerances import assert_close, assert_same

pytestmark = pytest.mark.gpu
ops = torch.ops.longtail
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
IMAGES = ((3, 7, 35), (2, 19, 1024), (1, 1, 4096), (2, 70, 333), (2, 1203, 512))


def cuda(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}


@pytest.fixture(params=["cuda", "triton"])
def softmax(request: pytest.FixtureRequest) -> Any:
    """The softmax operators of one backend, whichever of them dispatch would choose for images."""
    names = ("softmax_loss", "softmax_loss_backward", "softmax_loss_and_grad", "softmax_loss_and_grad_", "scale_grad_")
    if request.param == "cuda":
        with longtail.use_backend("cuda"):
            yield SimpleNamespace(**{name: cuda_backend.operator(name) for name in names})
    else:
        with longtail.use_backend("triton"):
            yield SimpleNamespace(**{name: getattr(ops, name) for name in names})


@pytest.mark.parametrize("dtype", FLOATS, ids=cases.name)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_images_equal_rows(shape: tuple[int, ...], dtype: torch.dtype, softmax: Any) -> None:
    """The softmax family over images, every option, poisoned ignored pixels."""
    n, c, p = shape
    for name in cases.OPTION_SETS:
        rows, target = cases.random_case(n * p, c, dtype)
        logits = to_images(cases.poison_ignored(rows, target), torch.Size(shape)).cuda()
        rows, target = rows.cuda(), target.cuda()
        options = cuda(cases.options(name, c, target.cpu(), dtype))
        up = torch.randn(n * p, device="cuda")
        x, y = rows.double().requires_grad_(), rows.clone().requires_grad_()
        truth = longtail.reference.softmax_loss(x, target, **cases.to_float64(options))
        eager = longtail.reference.softmax_loss(y, target, **options)
        (true_grad,) = torch.autograd.grad(truth, x, up.double())
        (eager_grad,) = torch.autograd.grad(eager, y, up)
        tail = cases.operator_options(c, options)
        loss, stats = softmax.softmax_loss(logits, target, *tail)
        grad = softmax.softmax_loss_backward(up, logits, target, stats, *tail)
        both, _, both_grad = softmax.softmax_loss_and_grad(up, logits, target, *tail)
        written, _ = softmax.softmax_loss_and_grad_(up, logits, target, *tail)
        for value in (loss, both, written):
            assert_close(value, truth.detach(), eager.detach(), what=name)
        for value in (grad, both_grad, logits):
            assert_close(to_rows(value), true_grad, eager_grad, what=name)


@pytest.mark.parametrize("dtype", FLOATS, ids=cases.name)
@pytest.mark.parametrize("shape", [(2, 21, 4096), (2, 21, 513 * 7), (1, 1203, 1024), (1, 5000, 4096), (1, 150_001, 16)])
def test_the_same_bits_at_every_run_and_in_a_graph(
    shape: tuple[int, int, int], dtype: torch.dtype, softmax: Any
) -> None:
    """Classes alone and shared by threads, kept on chip and read twice; a part of larger images; 64-bit sums."""
    n, c, p = shape
    g = torch.Generator("cuda").manual_seed(c)
    wide = torch.full((n, c + 1, p + 16), torch.nan, device="cuda", dtype=dtype)
    logits = wide[:, 1:, 8 : 8 + p]
    logits.copy_(torch.randn(shape, generator=g, device="cuda"))
    target = torch.randint(c, (n * p,), generator=g, device="cuda")
    target[::5] = cases.IGNORE
    tail = cases.operator_options(c, cuda(cases.options("mixed_tail", c, target.cpu(), dtype)))
    up = torch.randn(n * p, generator=g, device="cuda")

    def run() -> tuple[Tensor, ...]:
        loss, stats = softmax.softmax_loss(logits, target, *tail)
        return (
            loss,
            softmax.softmax_loss_backward(up, logits, target, stats, *tail),
            *softmax.softmax_loss_and_grad(up, logits, target, *tail),
        )

    first = run()
    wide_rows, wide_tail = to_rows(logits).double(), [x.double() if isinstance(x, Tensor) else x for x in tail]
    truth = longtail.ops.fallback.softmax_loss_and_grad(up.double(), wide_rows, target, *wide_tail)
    for value, want in ((first[0], truth[0]), (first[2], truth[0])):
        assert_close(value, want, factor=4)
    for value in (first[1], first[4]):
        assert_close(to_rows(value), truth[2], factor=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        graph.replay()
        for one, again, value in zip(captured, run(), first, strict=True):
            assert_same(one, value)
            assert_same(again, value)
    grad = first[4].clone()
    softmax.scale_grad_(grad, up, None, -100)
    assert_close(grad, first[4].double() * up.double().reshape(n, 1, p), factor=2)


@pytest.mark.parametrize("family", ["softmax", "class", "dense"])
@pytest.mark.parametrize("gradient", ["backward", "forward"])
def test_peak_extra_memory_over_images_is_the_gradient(family: str, gradient: str) -> None:
    logits = torch.randn(2, 64, 512, 512, device="cuda", requires_grad=True)
    target = torch.randint(64, (2, 512, 512), device="cuda")
    dense = torch.rand(2, 64, 512, 512, device="cuda") if family == "dense" else None

    def step() -> None:
        if family == "softmax":
            loss = longtail.focal_loss(logits, target, gradient=gradient)
        else:
            y = target if dense is None else dense
            loss = longtail.sigmoid_focal_loss(logits, y, reduction="sum", gradient=gradient)
        loss.backward()

    step()
    logits.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    extra = torch.cuda.max_memory_allocated() - before
    size = logits.numel() * 4
    assert size <= extra < 1.25 * size, f"{extra / size:.2f} times the gradient"


def test_shards_of_the_classes() -> None:
    """Statistics of two shards join to the row's; the operators trap what the launchers cannot see."""
    from longtail.triton_kernels import softmax_shard

    logits, target = cases.random_case(9, 6000, ignore=False)
    logits, target = logits.cuda(), target.cuda()
    tail = shard_cases.accumulate_tail({})
    whole = softmax_shard.softmax_loss_accumulate(logits, target, *tail)
    pieces = []
    for first in (0, 3000):
        local = torch.where((target >= first) & (target < first + 3000), target - first, -1)
        part = logits[:, first : first + 3000].contiguous()
        pieces.append(softmax_shard.softmax_loss_accumulate(part, local, *tail).double())
    assert_close(shard_cases.joined(*pieces)[:, :3].float(), whole[:, :3].double(), factor=4)
    row_grad = torch.randn(9, 5, device="cuda")
    row_grad[:, 0] = logits.amax(1)
    grad = softmax_shard.softmax_loss_apply(logits, target, row_grad, *shard_cases.apply_tail({}))
    shift = logits.double() - row_grad[:, :1]
    truth = shift.exp() * (row_grad[:, 1:2] + row_grad[:, 2:3] * shift) + row_grad[:, 3:4]
    truth.scatter_(1, target[:, None], row_grad[:, 4:].double())
    assert_close(grad, truth, factor=4)
