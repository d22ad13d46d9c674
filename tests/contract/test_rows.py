"""Promise: a row's result depends on that row alone, not on neighbours, addresses or how many threads run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import cases
import longtail
from tolerances import assert_close, assert_same

ops = torch.ops.longtail


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def loss_and_grad(logits: Tensor, target: Tensor, mode: str, option_set: str = "mixed") -> tuple[Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    options = cases.options(option_set, logits.shape[1], target, logits.dtype)
    loss = longtail.cross_entropy(x * 1.0, target, gradient=mode, reduction="none", **options)
    up = cases.upstreams(loss.shape, loss.dtype)["random"]
    return loss.detach(), torch.autograd.grad(loss, x, up)[0]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype, mode: str) -> None:
    logits, target = cases.random_case(301, 517, dtype)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(loss_and_grad(logits, target, mode))
    for loss, grad in results[1:]:
        assert_same(loss, results[0][0], "loss")
        assert_same(grad, results[0][1], "gradient")
    assert results[0][1].abs().max() > 0


@pytest.mark.parametrize("mode", cases.MODES)
def test_a_row_alone_gives_the_same_bits(mode: str) -> None:
    logits, target = cases.random_case(40, 333)
    loss, grad = loss_and_grad(logits, target, mode, "focal")
    for row in (0, 17, 39):
        up = cases.upstreams((40,), torch.float32)["random"][row]
        x = logits[row : row + 1].clone().requires_grad_()
        alone = longtail.cross_entropy(x * 1.0, target[row : row + 1], gradient=mode, reduction="none", focal_gamma=2.0)
        assert_same(alone.detach()[0], loss[row])
        assert_same(torch.autograd.grad(alone, x, up[None])[0][0], grad[row])


def test_calls_from_many_threads_do_not_mix() -> None:
    inputs = [cases.random_case(50, 200, seed=seed) for seed in range(16)]
    expected = [loss_and_grad(*case, mode="backward") for case in inputs]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda case: loss_and_grad(*case, mode="backward"), inputs))
    for (loss, grad), (true_loss, true_grad) in zip(results, expected, strict=True):
        assert_same(loss, true_loss)
        assert_same(grad, true_grad)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_nothing_is_written_between_strided_rows(dtype: torch.dtype) -> None:
    logits, target = cases.random_case(5, 37, dtype)
    buffer = torch.full((5, 50), 123.0, dtype=dtype)
    view = buffer[:, 4:41]
    view.copy_(logits)
    up = cases.upstreams((5,), cases.vector_dtype(dtype))["random"]
    tail = cases.operator_options(37, cases.options("mixed", 37, target, dtype))
    before = buffer.clone()
    _, _, grad = ops.softmax_loss_and_grad(up, view, target, *tail)
    assert_same(buffer, before, "the logits out of place")
    ops.softmax_loss_and_grad_(up, view, target, *tail)
    assert_same(view, grad, "the gradient in place")
    ops.scale_grad_(view, up, None, -100)
    for gap in (buffer[:, :4], buffer[:, 41:]):
        assert torch.equal(gap, torch.full_like(gap, 123.0))


def test_rows_further_apart_than_32_bits() -> None:
    """Two rows 2^31 elements apart in one lazily mapped buffer: only their own pages are ever touched."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        stride, classes = 2**31 + 16, 100
        logits = torch.empty(stride + classes, dtype=torch.bfloat16).as_strided((2, classes), (stride, 1))
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    values, target = cases.random_case(2, classes, torch.bfloat16, ignore=False)
    logits.copy_(values)
    up = cases.upstreams((2,), torch.float32)["random"]
    tail = cases.operator_options(classes, {})
    for actual, expected in zip(
        ops.softmax_loss_and_grad(up, logits, target, *tail),
        ops.softmax_loss_and_grad(up, values, target, *tail),
        strict=True,
    ):
        assert_same(actual, expected)
    ops.softmax_loss_and_grad_(up, logits, target, *tail)
    assert_same(logits.contiguous(), ops.softmax_loss_and_grad(up, values, target, *tail)[2])


@pytest.mark.parametrize("mode", cases.MODES)
def test_channels_last_images(mode: str) -> None:
    logits = torch.randn(2, 19, 4, 5, generator=cases.generator(0)).to(memory_format=torch.channels_last)
    target = torch.randint(19, (2, 4, 5), generator=cases.generator(1))
    target[0, 1] = cases.IGNORE
    up = torch.randn(2, 4, 5, generator=cases.generator(2))
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = longtail.cross_entropy(x * 1.0, target, gradient=mode, reduction="none", label_smoothing=0.1)
    truth = torch.nn.functional.cross_entropy(y, target, reduction="none", label_smoothing=0.1)
    assert_close(loss, truth.detach())
    assert_close(torch.autograd.grad(loss, x, up)[0], torch.autograd.grad(truth, y, up.double())[0], factor=2)
