"""Promise: whatever computes them, the softmax operators of class probabilities equal their formula in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cases
import dense_cases
from batches import Kernels, check, one_thread
from dense_cases import DenseBatch
from emulation.harness import STORAGES
from emulation.plans import SIGMOID_REGIMES, emulated
from interpreted import HALVES
from kernels import GPU, TRITON, over
from tolerances import assert_close

FLOATS = (torch.float32, *HALVES)
FEW = ("plain", "mixed")
TRITON_ROWS = [(7, 1), (9, 2), (8, 3), (6, 127), (3, 1000), (3, 5000), (3, 5001)]
# Emulated plans, which are those of the sigmoid family; the widest see fewer cases.
REGIMES = ("lanes", "warp_of_single_elements", "block", "cluster_2", "single_elements")
GPU_ROWS = [(300, 1), (301, 2), (7, 3), (66, 127), (129, 1000), (33, 4096), (130, 5000), (64, 32000), (133, 50257),
            (40, 128256)]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def batch(
    kernels: Kernels,
    shape: tuple[int, int],
    option_set: str,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    **how: str,
) -> DenseBatch:
    case = dense_cases.random_case(shape, dtype, target_dtype)
    return DenseBatch(kernels, case, dense_cases.options(option_set, shape[1], shape[0]), **how)


@pytest.mark.parametrize(
    ("kernels", "shape", "option_set"),
    [
        *over(TRITON, [(6, 127), (2, 5001)], dense_cases.OPTION_SETS),
        *over(TRITON, [x for x in TRITON_ROWS if x not in ((6, 127), (3, 5001))], FEW),
        *over(emulated(SIGMOID_REGIMES, "lanes", "cluster_2"), [(5, 127)], dense_cases.OPTION_SETS),
        *over(emulated(SIGMOID_REGIMES), [(7, 1), (9, 2), (8, 3), (5, 128), (3, 1000), (2, 5001)], FEW),
        *over(GPU, GPU_ROWS, dense_cases.OPTION_SETS),
    ],
)
def test_every_option(kernels: Kernels, shape: tuple[int, int], option_set: str) -> None:
    check(batch(kernels, shape, option_set))


@pytest.mark.parametrize(
    ("kernels", "shape", "option_set", "dtype", "target_dtype"),
    [
        *over(TRITON, [(8, 3), (6, 127), (3, 5001)], ["mixed"], HALVES, [None, torch.float32]),
        *over(emulated(SIGMOID_REGIMES, *REGIMES), [(8, 3), (5, 127), (3, 1000)], FEW, HALVES, [None, torch.float32]),
        *over(GPU, GPU_ROWS, FEW, HALVES, [None, torch.float32]),
    ],
)
def test_every_type(
    kernels: Kernels, shape: tuple[int, int], option_set: str, dtype: torch.dtype, target_dtype: torch.dtype | None
) -> None:
    check(batch(kernels, shape, option_set, dtype, target_dtype))


LAYOUTS = [("row_stride", "row_stride"), ("contiguous", "offset"), ("offset", "contiguous"), ("offset", "row_stride")]


@pytest.mark.parametrize(
    ("kernels", "shape", "dtype", "target_dtype", "layouts"),
    [
        *over(TRITON, [(3, 64), (3, 1003), (3, 4104)], [torch.float32], [None], LAYOUTS),
        *over(TRITON, [(3, 1000), (3, 4099)], [torch.bfloat16], [torch.float32], LAYOUTS[:2]),
        *over(
            emulated(SIGMOID_REGIMES, "lanes", "cluster_2"),
            *([(9, 64), (9, 1003)], STORAGES, [None, torch.float32], LAYOUTS),
        ),
        *over(emulated(SIGMOID_REGIMES, "warp"), [(2, 64)], [torch.float16], [None], [("far_apart", "far_apart")]),
        *over(GPU, [(9, 64), (9, 1000), (9, 4099), (9, 50257)], FLOATS, [None, torch.float32], LAYOUTS),
    ],
)
def test_layouts(
    kernels: Kernels,
    shape: tuple[int, int],
    dtype: torch.dtype,
    target_dtype: torch.dtype | None,
    layouts: tuple[str, str],
) -> None:
    """Rows that begin anywhere within 16 bytes, the target's alike and otherwise."""
    layout, target_layout = layouts
    check(batch(kernels, shape, "mixed", dtype, target_dtype, layout=layout, target_layout=target_layout))


@pytest.mark.parametrize(
    ("kernels", "shape", "margin"),
    [
        *over(TRITON, [(6, 2), (6, 127), (6, 4099)], (20.0, 100.0, 1e4)),
        *over(emulated(SIGMOID_REGIMES, "lanes", "cluster_2"), [(6, 1), (6, 2), (6, 127)], (20.0, 100.0, 1e4)),
        *over(GPU, [(6, 2), (6, 127), (6, 5000), (6, 50257)], cases.MARGINS),
    ],
)
def test_margins(kernels: Kernels, shape: tuple[int, int], margin: float) -> None:
    """Targets of one class and of two that lead or trail by so many nats."""
    logits, index = cases.margin_case(margin, shape[1], rows=shape[0])
    target = torch.nn.functional.one_hot(index, shape[1]).float()
    target[1::3] = 0.75 * target[1::3] + 0.25 * target.roll(1, 1)[1::3]
    # Of a sum of 1 and many small terms the order decides the last digits.
    check(DenseBatch(kernels, (logits, target), {}), factor=2)


@pytest.mark.parametrize("upstream", ["stride0", "strided"])
@pytest.mark.parametrize(
    ("kernels", "shape"),
    [
        *over(TRITON, [(4, 127), (2, 4099)]),
        *over(emulated(SIGMOID_REGIMES, "lanes", "block"), [(6, 127)]),
        *over(GPU, [(4, 127), (9, 5001)]),
    ],
)
def test_strides_of_upstream(kernels: Kernels, shape: tuple[int, int], upstream: str) -> None:
    up = cases.upstreams(shape[:1], torch.float32)[upstream]
    check(DenseBatch(kernels, dense_cases.random_case(shape), {"label_smoothing": 0.1}, up))


@pytest.mark.parametrize(
    ("kernels", "shape"),
    [
        *over(TRITON, [(0, 5), (0, 5000), (3, 0)]),
        *over(emulated(SIGMOID_REGIMES, "lanes", "cluster_2"), [(0, 5), (3, 0)]),
        *over(GPU, [(0, 5), (0, 5000), (3, 0)]),
    ],
)
def test_nothing_there(kernels: Kernels, shape: tuple[int, int]) -> None:
    one = DenseBatch(kernels, (torch.zeros(shape), torch.zeros(shape)), {"z_loss": 0.1})
    one.run()
    assert (one.losses[0] == 0).all()
    assert one.grads[0].shape == shape


@pytest.mark.parametrize(
    ("kernels", "shape"),
    [
        *over(TRITON, [(9, 7), (9, 4099)]),
        *over(emulated(SIGMOID_REGIMES, *REGIMES), [(9, 7), (9, 259)]),
        *over(GPU, [(9, 7), (9, 259), (9, 5000)]),
    ],
)
def test_infinite_and_undefined(kernels: Kernels, shape: tuple[int, int]) -> None:
    logits, target = dense_cases.random_case(shape)
    target[:] = 0.0
    target[:, :2] = torch.tensor([0.25, 0.75])
    logits[0, 2:] = -torch.inf  # all classes without probability
    logits[1, 3:5] = -torch.inf  # some of them
    logits[2, 1] = -torch.inf  # of one with
    logits[3, 5] = torch.nan
    logits[4, 6] = torch.inf
    logits[5, 1] = torch.inf
    logits[6] = -torch.inf
    target[7, 3] = torch.nan
    target[8] = 0.0  # no class at all
    for options in ({}, {"scale": 1.5, "z_loss": 0.01}):
        one = DenseBatch(kernels, (logits, target), options)
        check(one)
        assert one.losses[0][2] == torch.inf
        assert one.losses[0][[3, 4, 5, 6, 7]].isnan().all()
        assert one.losses[0][[0, 1, 8]].isfinite().all()
        assert all(grad[[0, 1, 2, 8]].isfinite().all() for grad in one.grads)


@pytest.mark.parametrize(
    ("kernels", "shape"),
    [*over(TRITON | emulated(SIGMOID_REGIMES, "lanes"), [(5, 33)]), *over(GPU, [(5, 33), (5, 5000)])],
)
def test_formula_is_torchs(kernels: Kernels, shape: tuple[int, int]) -> None:
    given = dense_cases.options("smoothing_weight", shape[1], shape[0])
    one = DenseBatch(kernels, dense_cases.random_case(shape), given)
    one.run()
    z, y = one.logits.double().requires_grad_(), one.target.double()
    weight = given["weight"].double().to(z.device)
    truth = torch.nn.functional.cross_entropy(
        z, y, weight, reduction="none", label_smoothing=given["label_smoothing"]
    )  # fmt: skip
    truth.backward(one.up.double())
    assert z.grad is not None
    assert_close(one.losses[0], truth.detach(), what="loss", factor=2)
    assert_close(one.grads[0], z.grad, what="gradient", factor=4)
