"""Promise: sigmoid operators give the same bits by any thread, for a row alone, and write nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cases
import sigmoid_cases
from operator_arguments import sigmoid as arguments
from tolerances import assert_close, assert_same

ops = torch.ops.longtail
SHAPES = {"rows": (7, 11), "images": (2, 5, 6)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_targets_of_the_logits_dtype_or_wider(shape: str, dtype: torch.dtype) -> None:
    args = arguments("sigmoid_loss_and_grad", "hard", SHAPES[shape], True, dtype)
    expected = ops.sigmoid_loss_and_grad(*args)
    assert args[2].dtype == torch.float32
    args[2] = args[2].to(dtype)
    for actual, want in zip(ops.sigmoid_loss_and_grad(*args), expected, strict=True):
        assert_same(actual, want)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(301, 517), (3, 19, 2000)])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, ...], threads: int) -> None:
    before = torch.get_num_threads()
    args = arguments("sigmoid_loss_and_grad", shape=shape)
    try:
        torch.set_num_threads(1)
        expected = ops.sigmoid_loss_and_grad(*args)
        torch.set_num_threads(threads)
        for actual, want in zip(ops.sigmoid_loss_and_grad(*args), expected, strict=True):
            assert_same(actual, want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
def test_a_row_alone_gives_the_same_bits(kind: str) -> None:
    """Soft neighbours in one register do not change what a hard target costs."""
    args = arguments("sigmoid_loss_and_grad", kind, (3, 700))
    args[5] = None  # sample_weight
    loss, grad = ops.sigmoid_loss_and_grad(*args)
    image = [x.t().reshape(1, 700, 3).contiguous() if isinstance(x, Tensor) and x.dim() == 2 else x for x in args]
    image_loss, image_grad = ops.sigmoid_loss_and_grad(*image)
    assert_same(image_grad[0].t(), grad)
    assert_close(image_loss, loss.double())
    for row in range(3):
        alone = [x[row : row + 1] if i < 3 else x for i, x in enumerate(args)]
        for actual, want in zip(ops.sigmoid_loss_and_grad(*alone), (loss, grad), strict=True):
            assert_same(actual[0], want[row])


def test_nothing_is_written_between_strided_rows() -> None:
    args = arguments("sigmoid_loss_and_grad", shape=(5, 37))
    buffer = torch.full((5, 50), 123.0)
    buffer[:, 4:41] = args[1]
    _, grad = ops.sigmoid_loss_and_grad(*args)
    args[1] = buffer[:, 4:41]
    ops.sigmoid_loss_and_grad_(*args)
    assert_same(buffer[:, 4:41].contiguous(), grad)
    for gap in (buffer[:, :4], buffer[:, 41:]):
        assert torch.equal(gap, torch.full_like(gap, 123.0))
