"""Promise: the sigmoid operators, called directly, keep their schemas, fakes, fallback and bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
import sigmoid_cases
from tolerances import assert_close, assert_same

ops = torch.ops.longtail
NAMES = ("sigmoid_loss", "sigmoid_loss_backward", "sigmoid_loss_and_grad", "sigmoid_loss_and_grad_")
SHAPES = {"rows": (7, 11), "images": (2, 5, 6)}


def arguments(
    name: str,
    kind: str = "class",
    shape: tuple[int, ...] = (7, 11),
    elementwise: bool = False,
    dtype: torch.dtype = torch.float32,
    option_set: str = "mixed",
) -> list[Any]:
    """Arguments of one operator, some targets ignored, with a random upstream gradient."""
    logits, target = sigmoid_cases.random_case(shape, kind, dtype)
    tail = sigmoid_cases.operator_options(sigmoid_cases.options(option_set, logits))
    target = target.flatten() if kind == "class" else target
    rows = logits.numel() // shape[1]
    up = torch.randn(shape if elementwise else (rows,), generator=cases.generator(5)).to(cases.vector_dtype(dtype))
    if name == "sigmoid_loss":
        return [logits, target, *tail, elementwise]
    if name == "sigmoid_loss_backward":
        return [up, logits, target, *tail]
    return [up, logits, target, *tail, elementwise]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("kind", "elementwise"), [("class", False), ("soft", True)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, kind: str, shape: str, elementwise: bool, backend: str) -> None:
    with longtail.use_backend(backend):
        args = arguments(name, kind, SHAPES[shape], elementwise)
        results = torch.library.opcheck(getattr(ops, name).default, tuple(args))
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
def test_fallback_equals_kernel(kind: str, shape: str, elementwise: bool, dtype: torch.dtype) -> None:
    for option_set in sigmoid_cases.sets_for(kind):
        outcomes = []
        for backend in ("cpu", "reference"):
            with longtail.use_backend(backend):
                args = arguments("sigmoid_loss_and_grad", kind, SHAPES[shape], elementwise, dtype, option_set)
                loss, grad = ops.sigmoid_loss_and_grad(*args)
                written = args[1].clone()
                in_loss = ops.sigmoid_loss_and_grad_(args[0], written, *args[2:])
                assert_same(written, grad)
                assert_same(in_loss, loss)
                assert_close(ops.sigmoid_loss(*args[1:]), loss.double())
                assert_close(ops.sigmoid_loss_backward(*args[:-1]), grad.double(), factor=3)
                outcomes.append((loss, grad))
        for kernel, fallback in zip(*outcomes, strict=True):
            assert kernel.dtype == fallback.dtype
            assert kernel.stride() == fallback.stride()
            assert_close(kernel, fallback.double(), what=option_set, factor=4)


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


WRONG: dict[str, tuple[str, int, Any]] = {
    "target_short": ("sigmoid_loss", 1, torch.zeros(6, dtype=torch.long)),
    "target_int32": ("sigmoid_loss", 1, torch.zeros(7, dtype=torch.int32)),
    "target_narrow": ("sigmoid_loss", 1, torch.zeros(7, 11, dtype=torch.bfloat16)),
    "target_dense_short": ("sigmoid_loss", 1, torch.zeros(7, 10)),
    "target_transposed": ("sigmoid_loss", 1, torch.zeros(11, 7).t()),
    "target_outside": ("sigmoid_loss", 1, torch.full((7,), 11)),
    "logits_rank": ("sigmoid_loss", 0, torch.zeros(7, 11, 1, 1)),
    "logits_short": ("sigmoid_loss", 0, torch.zeros(7, 11, 2)),
    "logits_integer": ("sigmoid_loss", 0, torch.zeros(7, 11, dtype=torch.long)),
    "logits_transposed": ("sigmoid_loss", 0, torch.zeros(11, 7).t()),
    "weight_short": ("sigmoid_loss", 2, torch.ones(10)),
    "pos_weight_float64": ("sigmoid_loss", 3, torch.ones(11).double()),
    "sample_weight_short": ("sigmoid_loss", 4, torch.ones(6)),
    "by_target_without_weight": ("sigmoid_loss", 2, None),
    "upstream_short": ("sigmoid_loss_backward", 0, torch.ones(6)),
    "upstream_scalar": ("sigmoid_loss_backward", 0, torch.ones(())),
    "upstream_dense_short": ("sigmoid_loss_backward", 0, torch.ones(7, 10)),
    "upstream_strided": ("sigmoid_loss_backward", 0, torch.ones(11, 7).t()),
    "inplace_upstream_short": ("sigmoid_loss_and_grad_", 0, torch.ones(3)),
}


@pytest.mark.parametrize("case", WRONG)
def test_inconsistent_arguments_raise(case: str) -> None:
    """An error, never a read outside a tensor."""
    name, position, value = WRONG[case]
    args = arguments(name, option_set="by_target" if "by_target" in case else "mixed")
    args[position] = value
    with pytest.raises((RuntimeError, ValueError, IndexError, TypeError)):
        getattr(ops, name)(*args)
