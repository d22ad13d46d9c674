"""Promise: on a GPU the CUDA kernels equal float64 and Triton in each of their ways, with the same bits every time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import cases
import longtail
import shard_cases
import sigmoid_cases
from batches import SigmoidBatch, check
from emulation import harness
from kernels import Operators
from longtail.ops import cuda, operators
from longtail.options import SoftmaxOptions
from tolerances import assert_close, assert_same

pytestmark = pytest.mark.gpu
ops = torch.ops.longtail
# Rows, classes, dtype: the lanes of a warp, alone and in batches of rows, one block, clusters of 2 to 16 blocks, rows
# beyond all shared memory, and rows that are fewer than the multiprocessors.
SHAPES = [
    (5000, 1, torch.float32),
    (3001, 10, torch.bfloat16),
    (3001, 127, torch.float16),
    (1000, 1000, torch.bfloat16),
    (140_003, 128, torch.float16),
    (35_001, 1000, torch.bfloat16),
    (999, 1001, torch.bfloat16),
    (1000, 5000, torch.float32),
    (400, 50257, torch.bfloat16),
    (400, 50257, torch.float32),
    (200, 128256, torch.float16),
    (150, 262144, torch.bfloat16),
    (140, 600_011, torch.bfloat16),
    (20, 1_000_003, torch.bfloat16),
    (3, 1_000_000, torch.float32),
    (2, 4_000_000, torch.bfloat16),
    (1, 128256, torch.bfloat16),
    (7, 5003, torch.float32),
]
IDS = [f"{rows}x{classes}-{cases.name(dtype)}" for rows, classes, dtype in SHAPES]


@pytest.fixture(autouse=True)
def _on_cuda() -> Iterator[None]:
    with longtail.use_backend("cuda"):
        yield


def problem(rows: int, classes: int, dtype: torch.dtype, option_set: str) -> tuple[Tensor, Tensor, tuple[object, ...]]:
    """On the GPU, made there: one row in five is ignored, and poisoned."""
    g = torch.Generator("cuda").manual_seed(classes)
    target = torch.randint(classes, (rows,), generator=g, device="cuda")
    target[1::5] = cases.IGNORE
    logits = torch.randn(rows, classes, generator=g, device="cuda").mul_(3).to(dtype)
    logits[1::5] = torch.nan
    options = cases.options(option_set, classes, target.cpu())
    moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
    return logits, target, cases.operator_options(classes, moved)


def results(up: Tensor, logits: Tensor, target: Tensor, tail: tuple[object, ...]) -> list[Tensor]:
    """Losses (even places) and gradients (odd ones) by all four operators."""
    loss, stats = ops.softmax_loss(logits, target, *tail)
    grad = ops.softmax_loss_backward(up, logits, target, stats, *tail)
    both, _, both_grad = ops.softmax_loss_and_grad(up, logits, target, *tail)
    written = logits.clone()
    over, _ = ops.softmax_loss_and_grad_(up, written, target, *tail)
    return [loss, grad, both, both_grad, over, written]


def truth(up: Tensor, logits: Tensor, target: Tensor, tail: tuple[object, ...]) -> list[Tensor]:
    """Loss and gradient of each counted row in float64, a few rows or a million logits at a time."""
    vectors = [x.double() if isinstance(x, Tensor) else x for x in tail]
    losses, grads = [], []
    few = max(8, 2**20 // logits.shape[1])
    given = SoftmaxOptions(*vectors)
    for z, g, v, u in zip(*(x.split(few) for x in (logits, target, given.sample_weight, up)), strict=True):
        options = given._replace(sample_weight=v)
        with longtail.use_backend("reference"):
            loss, _, grad = ops.softmax_loss_and_grad(u.double(), z.double(), g, *options)
        losses.append(loss)
        grads.append(grad.to(torch.float32))  # far below the bounds, half the memory
    return [torch.cat(losses), torch.cat(grads)]


@pytest.mark.parametrize("option_set", ["plain", "mixed", "mixed_tail"])
@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES, ids=IDS)
def test_every_way_to_take_a_row(rows: int, classes: int, dtype: torch.dtype, option_set: str) -> None:
    logits, target, tail = problem(rows, classes, dtype, option_set)
    tail = tuple(SoftmaxOptions(*tail)._replace(sample_weight=torch.rand(rows, device="cuda") + 0.5))
    up = torch.randn(rows, device="cuda")
    loss, grad = truth(up, logits, target, tail)
    first = results(up, logits, target, tail)
    for at in (0, 2, 4):
        assert_close(first[at], loss, factor=4, what="loss")
    for at in (1, 3, 5):
        assert_close(first[at], grad.double(), factor=4, what="gradient")
        assert (first[at][1::5] == 0).all()
    for _ in range(3):
        for again, value in zip(results(up, logits, target, tail), first, strict=True):
            assert_same(again, value)


@pytest.mark.parametrize(("rows", "classes", "dtype"), SHAPES[1::2], ids=IDS[1::2])
def test_class_probabilities_give_the_same_bits_every_time(rows: int, classes: int, dtype: torch.dtype) -> None:
    """Those of Triton but for roundings, too."""
    logits = torch.randn(rows, classes, device="cuda").mul_(3).to(dtype)
    target = torch.rand(rows, classes, device="cuda").to(dtype)
    up, tail = torch.randn(rows, device="cuda"), cases.operator_options(classes, {"z_loss": 0.01})

    def outcome() -> tuple[Tensor, ...]:
        loss, stats = ops.softmax_loss(logits, target, *tail)
        return loss, ops.softmax_loss_backward(up, logits, target, stats, *tail)

    first = outcome()
    for _ in range(3):
        for again, value in zip(outcome(), first, strict=True):
            assert_same(again, value)
    with longtail.use_backend("triton"):
        for one, other in zip(outcome(), first, strict=True):
            assert_close(one, other.double(), one * (1 + 1e-5), factor=4)


@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
@pytest.mark.parametrize("classes", [10, 1000, 5003, 128256])
def test_agreement_with_triton(classes: int, option_set: str) -> None:
    logits, target, tail = problem(64, classes, torch.float32, option_set)
    up = torch.randn(64, device="cuda")
    cuda = results(up, logits, target, tail)
    with longtail.use_backend("triton"):
        triton = results(up, logits, target, tail)
    for one, other in zip(cuda, triton, strict=True):
        assert_close(one, other.double(), one * (1 + 1e-5), factor=4)


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("option_set", ["mixed", "seesaw", "mixed_tail"])
@pytest.mark.parametrize(("rows", "classes"), [(40, 100), (200, 5003), (4, 128256)])
def test_one_shard_of_the_classes(rows: int, classes: int, option_set: str, dtype: torch.dtype) -> None:
    """Told what the targets bring, in one block a row or several; in place, too."""
    options = cases.options(option_set, classes, torch.zeros(rows))
    logits, target, terms = shard_cases.told_case(rows, classes, dtype)
    truth, eager = shard_cases.told_stats(logits, target, terms, options)
    row_grad = torch.randn(rows, 5)
    row_grad[:, 0] = truth[:, 0]
    there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
    z, g, told, coefficients = logits.cuda(), target.cuda(), terms.cuda(), row_grad.cuda()
    stats = ops.softmax_loss_accumulate(z, g, *shard_cases.accumulate_tail(there, True, told))
    assert_close(stats.cpu(), truth, eager, what="stats", factor=4)
    tail = shard_cases.apply_tail(there, told)
    grad = ops.softmax_loss_apply(z, g, coefficients, *tail)
    assert_close(grad.cpu(), *shard_cases.told_gradient(logits, target, row_grad, terms, options), factor=4)
    ops.softmax_loss_apply_(z, g, coefficients, *tail)
    assert_same(z, grad)


@pytest.mark.parametrize("classes", [100, 5003, 128256])
def test_a_shard_in_place_reads_its_targets_first(classes: int) -> None:
    """Where nobody has told their logits, which any block of a row may overwrite."""
    logits, target, tail = problem(16, classes, torch.bfloat16, "seesaw")
    options = {"class_mitigation": SoftmaxOptions(*tail).class_mitigation, "compensation": 2.0}
    row_grad = torch.randn(16, 5, device="cuda")
    expected = ops.softmax_loss_apply(logits, target, row_grad, *shard_cases.apply_tail(options))
    for _ in range(20):
        z = logits.clone()
        ops.softmax_loss_apply_(z, target, row_grad, *shard_cases.apply_tail(options))
        assert_same(z, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("classes", [1000, 50257])
@pytest.mark.parametrize("start", [0, 1])
def test_rows_of_a_wider_matrix(start: int, classes: int, dtype: torch.dtype) -> None:
    """A padded vocabulary: the gradient's rows lie otherwise towards 16-byte boundaries than the logits'."""
    logits, target, tail = problem(60, classes, dtype, "mixed_tail")
    wide = torch.full((60, classes + 47), torch.nan, device="cuda", dtype=dtype)
    wide[:, start : start + classes] = logits
    up = torch.randn(60, device="cuda")
    expected = results(up, logits, target, tail)
    for one, other in zip(results(up, wide[:, start : start + classes], target, tail), expected, strict=True):
        assert_close(one, other.double(), factor=4)


@pytest.mark.parametrize("factor", [torch.randn(300), torch.tensor(0.3).expand(300), torch.ones(()).expand(300)])
@pytest.mark.parametrize("classes", [1, 10, 1001, 50257])
def test_scale_grad(classes: int, factor: Tensor) -> None:
    wide = torch.randn(300, classes + 3, device="cuda", dtype=torch.bfloat16)
    for grad in (wide[:, 1 : classes + 1], wide[:, :classes].contiguous()):
        expected = (grad.float() * factor.cuda()[:, None]).bfloat16()
        ops.scale_grad_(grad, factor.cuda(), None, -100)
        assert_same(grad.contiguous(), expected)


@pytest.mark.parametrize("classes", [10, 5000, 262144])
def test_more_rows_than_a_grid_of_blocks_is_launched_for(classes: int) -> None:
    """Rows far beyond the number of blocks that run together, with each of them checked."""
    rows = 2**28 // classes
    logits = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(classes, (rows,), device="cuda")
    tail = cases.operator_options(classes, {})
    loss, _ = ops.softmax_loss(logits, target, *tail)
    expected = torch.cat(
        [
            torch.nn.functional.cross_entropy(z.float(), g, reduction="none")
            for z, g in zip(logits.split(2**24 // classes), target.split(2**24 // classes), strict=True)
        ]
    )
    assert_close(loss, expected.double(), factor=8)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6)], ids=str)
def test_float64_goes_elsewhere(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, device="cuda", dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (shape[0], *shape[2:]), device="cuda")
    expected = torch.nn.functional.cross_entropy(logits, target)
    loss = longtail.cross_entropy(logits, target)
    assert_close(loss.detach(), expected.detach())
    (grad,), (expected_grad,) = (torch.autograd.grad(x, logits) for x in (loss, expected))
    assert_close(grad, expected_grad)


def test_tensors_on_another_device_are_refused() -> None:
    tail = cases.operator_options(9, {})
    with pytest.raises(RuntimeError, match="target is on another device"):
        ops.softmax_loss(torch.zeros(3, 9, device="cuda"), torch.zeros(3, dtype=torch.int64), *tail)


def test_the_library_has_every_operator() -> None:
    assert [op for op in operators.SCHEMAS if cuda.operator(op) is None] == []


IMAGES = ((3, 7, 35), (2, 19, 1024), (1, 1, 4096), (2, 70, 333), (2, 1203, 512), (4, 21, 256 * 256), (40000, 5, 1),
          (1, 20000, 8))  # fmt: skip


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_sigmoid_over_images(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    """Called without the dispatch: many pixels, few, and those of which 16 bytes are no vector."""
    kernels = Operators("cuda", "cuda", "longtail_cuda")
    for name in ("plain", "focal", "mixed"):
        logits, target = sigmoid_cases.random_case(shape, kind, dtype)
        case = sigmoid_cases.poisoned(logits, target), target
        for elementwise in (False, True):
            one = SigmoidBatch(kernels, case, sigmoid_cases.options(name, logits), elementwise)
            check(one)
            if kind == "soft":
                one.target = one.target.to(dtype)
                check(one)


GENERAL = {
    "asymmetric": ({"gamma": 1.0, "gamma_negative": 4.0, "clip": 0.05, "detach": True}, ()),
    "attached": ({"alpha": 0.25, "gamma": 0.5, "gamma_negative": 2.5, "clip": 0.2}, ("pos_weight", "class_bias")),
    "balanced": (
        {"gamma": 2.0, "negative_scale": 2.0, "rebalance_alpha": 0.1, "rebalance_beta": 10.0, "rebalance_mu": 0.2},
        ("inverse_counts", "class_bias"),
    ),
    "smoothed": ({"gamma": 1.5, "label_smoothing": 0.1}, ("class_alpha", "class_gamma")),
}
GENERAL_SHAPES = ((300, 1), (301, 11), (129, 1000), (130, 8192), (3, 50257), (3, 7, 35), (2, 19, 1024), (2, 1203, 512),
                  (1, 20000, 8))  # fmt: skip


@pytest.mark.parametrize("dtype", harness.STORAGES, ids=cases.name)
@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
@pytest.mark.parametrize("shape", GENERAL_SHAPES, ids=str)
def test_sigmoid_with_every_option(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    """Called without the dispatch, to the same bits every time; soft targets also in the type of the logits.

    factor: in rows of few elements eager PyTorch may happen to be exact.
    """
    kernels = Operators("cuda", "cuda", "longtail_cuda")
    g = cases.generator(9)
    for numbers, vectors in GENERAL.values():
        options = {"alpha": None, **numbers, **{name: 0.1 + torch.rand(shape[1], generator=g) for name in vectors}}
        logits, target = sigmoid_cases.random_case(shape, kind, dtype)
        for elementwise in (False, True):
            one = SigmoidBatch(kernels, (sigmoid_cases.poisoned(logits, target), target), options, elementwise)
            check(one, factor=2)
            first = one.outputs()
            one.run()
            for found, again in zip(first, one.outputs(), strict=True):
                assert_same(found, again)
        if kind == "soft":
            one.target = one.target.to(dtype)
            check(one, factor=2)


@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize("shape", [(2, 19, 1024), (2, 70, 333), (2, 1203, 512)], ids=str)
def test_sigmoid_over_strided_images_gives_the_same_bits_every_time(shape: tuple[int, int, int], kind: str) -> None:
    """Classes of which only some are there, in images of which only some pixels are."""
    n, c, p = shape
    logits, target = sigmoid_cases.random_case(shape, kind, torch.bfloat16)
    tail = sigmoid_cases.operator_options(sigmoid_cases.options("focal", logits))
    for more in (0, 1, 64):
        inner = torch.full((n, c + 1, p + more), torch.nan, device="cuda", dtype=torch.bfloat16)[:, :c, :p]
        inner.copy_(logits)
        y = (target if kind == "soft" else target.flatten()).cuda()
        up = torch.randn(n * p, device="cuda")
        kernel = torch.ops.longtail_cuda.sigmoid_loss_and_grad
        expected = kernel(up, logits.cuda(), y, *tail, False)
        for _ in range(3):
            loss, grad = kernel(up, inner, y, *tail, False)
            assert_close(loss, expected[0].double(), factor=4)
            assert_close(grad, expected[1].double())
        again = kernel(up, inner, y, *tail, False)
        assert_same(loss, again[0])
        assert_same(grad, again[1])
