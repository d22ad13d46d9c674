"""Promise: with class probabilities the softmax operators equal float64, and refuse what needs a target class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
import naive
from batches import ProbabilityBatch, ProbabilityKernels, check, one_thread, probability_case
from emulation.harness import STORAGES
from emulation.plans import SIGMOID_REGIMES, emulated
from interpreted import HALVES, INTERPRETED, refuse_copies
from kernels import CPU, GPU, TRITON, over
from longtail.ops import fallback
from shard_cases import accumulate_tail
from tolerances import assert_close, assert_same

ops = torch.ops.longtail
ALL, LINEAR = "all_of_probabilities", "linear_of_probabilities"
FEW = ("plain", "smoothing_weight", ALL)
# Registers, blocks of 1024 classes and their ends; more than one block; fewer classes than a register.
CPU_ROWS = [(19, 1), (17, 2), (9, 11), (5, 127), (3, 1024), (2, 2500)]
TRITON_ROWS = [(7, 1), (9, 2), (6, 127), (2, 1000), (2, 5000), (2, 5001)]
# Plans of the emulation, which are those of the sigmoid family.
EMULATED_ROWS = [(7, 1), (9, 2), (8, 3), (5, 128), (3, 1000), (2, 5001)]
REGIMES = ("lanes", "warp_of_single_elements", "block", "cluster_2", "single_elements")
GPU_ROWS = [(300, 1), (301, 2), (66, 127), (129, 1000), (33, 4096), (64, 32000), (40, 128256)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        refuse_copies(monkeypatch)


def batch(
    kernels: ProbabilityKernels,
    shape: tuple[int, int],
    option_set: str,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    **how: str,
) -> ProbabilityBatch:
    logits, y = probability_case(shape, dtype, target_dtype)
    return ProbabilityBatch(kernels, (logits, y), cases.options(option_set, shape[1], y[:, 0], dtype), **how)


@pytest.mark.parametrize("option_set", cases.PROBABILITY_SETS)
@pytest.mark.parametrize("shape", [(9, 11), (9, 1)], ids=str)
def test_the_reference_is_the_sum_over_classes(shape: tuple[int, int], option_set: str) -> None:
    """And as torch's where torch has the option; in targets and weights, too, and twice."""
    z, y = cases.random_case(*shape, torch.float64)[0], cases.probabilities(*shape, torch.float64)
    options = cases.options(option_set, shape[1], y[:, 0], torch.float64)
    leaves = [z, y, *(x for name, x in options.items() if name == "weight")]
    up = cases.upstreams(shape[:1], torch.float64)["random"]
    found = []
    references: list[Any] = [longtail.reference.softmax_loss, naive.probability_rows]
    if set(options) <= {"weight", "label_smoothing"}:
        references.append(lambda *data, **o: F.cross_entropy(*data, reduction="none", **o))
    for function in references:
        leaves = [x.detach().requires_grad_() for x in leaves]
        if "weight" in options:
            options["weight"] = leaves[2]
        loss = function(leaves[0], leaves[1], **options)
        grads = torch.autograd.grad(loss, leaves, up, create_graph=True)
        again = torch.autograd.grad((grads[0] * z.cos()).sum(), leaves[0])
        found.append([loss, *grads, *again])
    for other in found[1:]:
        for one, expected in zip(found[0], other, strict=True):
            assert_close(one, expected.detach())
    args = (z, y.detach(), *cases.operator_options(shape[1], {k: torch.as_tensor(v).detach() if isinstance(v, Tensor)
                                                              else v for k, v in options.items()}))  # fmt: skip
    loss, stats = fallback.softmax_loss(*args)
    assert_close(loss, found[0][0].detach())
    assert_close(fallback.softmax_loss_backward(up, *args[:2], stats, *args[2:]), found[0][1].detach())


@pytest.mark.parametrize(
    ("kernels", "shape", "option_set"),
    [
        *over(CPU, [(9, 11), (2, 2500)], cases.PROBABILITY_SETS),
        *over(TRITON, [(6, 127), (2, 5001)], cases.PROBABILITY_SETS),
        *over(emulated(SIGMOID_REGIMES, "lanes", "cluster_2"), [(5, 127)], cases.PROBABILITY_SETS),
        *over(emulated(SIGMOID_REGIMES), EMULATED_ROWS, ("plain", ALL)),
        *over(GPU, GPU_ROWS, cases.PROBABILITY_SETS),
    ],
)
def test_every_option(kernels: ProbabilityKernels, shape: tuple[int, int], option_set: str) -> None:
    check(batch(kernels, shape, option_set))


@pytest.mark.parametrize(
    ("kernels", "shape", "option_set", "dtype", "wide"),
    [
        *over(CPU, CPU_ROWS, FEW, cases.DTYPES, [False]),
        *over(CPU, [(9, 11), (2, 2500)], ("plain", LINEAR), HALVES, [True]),
        *over(TRITON, TRITON_ROWS, FEW, [torch.bfloat16], [False]),
        *over(TRITON, [(6, 127), (2, 5001)], [ALL], [torch.float16], [True]),
        *over(
            emulated(SIGMOID_REGIMES, *REGIMES), [(8, 3), (5, 127), (3, 1000)], ("plain", ALL), HALVES, [False, True]
        ),
        *over(GPU, GPU_ROWS, FEW, HALVES, [False, True]),
    ],
)
def test_every_size_and_type(
    kernels: ProbabilityKernels, shape: tuple[int, int], option_set: str, dtype: torch.dtype, wide: bool
) -> None:
    check(batch(kernels, shape, option_set, dtype, torch.float32 if wide else dtype))


@pytest.mark.parametrize(
    ("kernels", "shape", "margin"),
    [
        *over(CPU, [(8, 1), (8, 2), (8, 19), (8, 1500)], cases.MARGINS),
        *over(TRITON, [(4, 2), (4, 127), (4, 4099)], (0.0, 20.0, 1e4)),
        *over(emulated(SIGMOID_REGIMES, "lanes", "cluster_2"), [(6, 1), (6, 2), (6, 127)], (20.0, 100.0, 1e4)),
        *over(GPU, [(6, 2), (6, 127), (6, 5000)], cases.MARGINS),
    ],
)
def test_margins(kernels: ProbabilityKernels, shape: tuple[int, int], margin: float) -> None:
    """One class far above or below the others, of probability 1 or of some."""
    logits, target = cases.margin_case(margin, shape[1], rows=shape[0])
    y = F.one_hot(target, shape[1]).float()
    for share in (1.0, 0.9):
        soft = share * y + (1 - share) * cases.probabilities(*shape, torch.float32)
        # The last digits of a sum of 1 and thousands of small terms depend on its order.
        check(ProbabilityBatch(kernels, (logits, soft), {"z_loss": 1e-3}), factor=1 if kernels in CPU.values() else 2)


LAYOUTS = [("row_stride", "row_stride"), ("contiguous", "offset"), ("offset", "contiguous"), ("offset", "row_stride")]


@pytest.mark.parametrize(
    ("kernels", "shape", "dtype", "target_dtype", "layouts"),
    [
        *over(CPU, [(9, 64), (3, 1003)], cases.DTYPES, [None], [("row_stride", "offset"), ("offset", "row_stride")]),
        *over(TRITON, [(3, 64), (3, 1003), (3, 4104)], [torch.float32], [None], LAYOUTS),
        *over(TRITON, [(3, 1000), (3, 4099)], [torch.bfloat16], [torch.float32], LAYOUTS[:2]),
        *over(
            emulated(SIGMOID_REGIMES, "lanes", "cluster_2"),
            *([(9, 64), (9, 1003)], STORAGES, [None, torch.float32], LAYOUTS),
        ),
        *over(emulated(SIGMOID_REGIMES, "warp"), [(2, 64)], [torch.float16], [None], [("far_apart", "far_apart")]),
        *over(GPU, [(9, 64), (9, 4099), (9, 50257)], HALVES, [None, torch.float32], LAYOUTS),
    ],
)
def test_layouts(
    kernels: ProbabilityKernels,
    shape: tuple[int, int],
    dtype: torch.dtype,
    target_dtype: torch.dtype | None,
    layouts: tuple[str, str],
) -> None:
    """Rows that begin anywhere within 16 bytes, the target's alike and otherwise."""
    check(batch(kernels, shape, ALL, dtype, target_dtype, layout=layouts[0], target_layout=layouts[1]))


@pytest.mark.parametrize("upstream", ["stride0", "strided"])
@pytest.mark.parametrize(
    ("kernels", "shape"),
    [
        *over(CPU, [(6, 127)]),
        *over(TRITON, [(4, 127), (2, 4099)]),
        *over(emulated(SIGMOID_REGIMES, "lanes", "block"), [(6, 127)]),
        *over(GPU, [(6, 1000)]),
    ],
)
def test_strides_of_upstream(kernels: ProbabilityKernels, shape: tuple[int, int], upstream: str) -> None:
    one = batch(kernels, shape, "smoothing")
    one.up = cases.upstreams(shape[:1], torch.float32)[upstream].to(one.logits.device)
    check(one)


@pytest.mark.parametrize(
    ("kernels", "shape"),
    [
        *over(CPU, [(9, 7), (9, 37), (9, 2100)]),
        *over(TRITON, [(9, 7), (9, 4099)]),
        *over(emulated(SIGMOID_REGIMES, *REGIMES), [(9, 7), (9, 259)]),
        *over(GPU, [(9, 7), (9, 4099)]),
    ],
)
def test_infinite_and_undefined_numbers(kernels: ProbabilityKernels, shape: tuple[int, int]) -> None:
    rows, _ = cases.random_case(*shape, ignore=False)
    y = cases.probabilities(3, shape[1], torch.float32)[:1].expand(shape).clone()
    y[:, 2] = 0.0
    rows[0, 2] = -torch.inf  # of no probability: nothing
    rows[1, 3] = -torch.inf  # of some: the loss is inf
    rows[2, 2] = torch.nan
    rows[3, 3] = torch.inf
    rows[4] = -torch.inf
    rows[5] = -torch.inf
    rows[5, 1] = 1.0  # one class has all mass and all probability
    y[5] = 0.0
    y[5, 1] = 1.0
    y[6] = 0.0  # nothing is wanted
    y[7, -1] = torch.nan
    rows[8, : shape[1] - 1] = -torch.inf  # a maximum that comes last, after classes of no probability
    y[8] = 0.0
    y[8, -1] = 0.7
    for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.ones(shape[1]) * 2.0}):
        one = ProbabilityBatch(kernels, (rows, y), options)
        check(one, factor=2)
        (loss,), (grad,) = one.losses, one.grads
        assert loss.isnan().tolist() == [False, False, True, True, True, False, False, True, False]
        if "label_smoothing" not in options:
            assert loss.isinf().tolist() == [i == 1 for i in range(9)]
            assert grad[[0, 1, 5, 6, 8]].isfinite().all()
            assert loss[5] == loss[6] == 0
    weight = torch.ones(shape[1])
    weight[2] = torch.inf  # times no probability, of a class that may have none
    one = ProbabilityBatch(kernels, (rows[:1], y[:1]), {"weight": weight})
    check(one, factor=2)
    assert one.losses[0].isfinite().all()


@pytest.mark.parametrize(
    ("kernels", "shape"),
    [
        *over(CPU, [(0, 5), (0, 2000), (3, 0), (0, 0)]),
        *over(TRITON, [(0, 5), (0, 5000), (3, 0)]),
        *over(emulated(SIGMOID_REGIMES, "lanes", "cluster_2"), [(0, 5), (3, 0)]),
        *over(GPU, [(0, 5), (3, 0)]),
    ],
)
def test_nothing_to_do(kernels: ProbabilityKernels, shape: tuple[int, int]) -> None:
    one = ProbabilityBatch(kernels, (torch.zeros(shape), torch.zeros(shape)), {"z_loss": 0.1, "label_smoothing": 0.1})
    check(one)
    assert not one.losses[0].any()


@pytest.mark.parametrize("classes", [5, 600, 3000])
def test_a_row_has_the_same_bits_alone_and_on_any_threads(classes: int) -> None:
    z, y = cases.random_case(70, classes)[0], cases.probabilities(70, classes, torch.float32)
    tail, up = cases.operator_options(classes, cases.options(LINEAR, classes, y[:, 0])), torch.randn(70)

    def outcome(part: slice) -> list[Tensor]:
        of = [x[part] if isinstance(x, Tensor) and i == 3 else x for i, x in enumerate(tail)]
        loss, stats = ops.softmax_loss(z[part], y[part], *of)
        return [loss, stats, ops.softmax_loss_backward(up[part], z[part], y[part], stats, *of)]

    every = outcome(slice(None))
    torch.set_num_threads(4)
    for one, other in zip(outcome(slice(None)), every, strict=True):
        assert_same(one, other, "on four threads")
    torch.set_num_threads(1)
    for one, other in zip(outcome(slice(33, 34)), every, strict=True):
        assert_same(one, other[33:34], "alone")


Z, Y, UP = torch.zeros(3, 5), torch.full((3, 5), 0.2), torch.ones(3)
STATS = torch.ones(3, 5)
# name -> (operator, arguments before the options, options, part of the text)
WRONG: dict[str, tuple[str, tuple[Tensor, ...], dict[str, Any], str]] = {
    "short": ("softmax_loss", (Z, Y[:2]), {}, "target"),
    "classes": ("softmax_loss", (Z, Y[:, :4]), {}, "target"),
    "rank": ("softmax_loss", (Z, Y[:, 0]), {}, "target"),
    "dtype": ("softmax_loss", (Z, Y.double()), {}, "target has dtype"),
    "half": ("softmax_loss", (Z.bfloat16(), Y.half()), {}, "target has dtype"),
    "images": ("softmax_loss", (Z[..., None], Y[..., None]), {}, r"\[N, C\]"),
    "transposed": ("softmax_loss", (Z, Y.t().contiguous().t()), {}, "target has last stride"),
    "expanded": ("softmax_loss", (Z, Y[:1].expand(3, 5)), {}, "target has row stride"),
    "stats": ("softmax_loss_backward", (UP, Z, Y, STATS[:, :4]), {}, "stats"),
    "no_stats": ("softmax_loss_backward", (UP, Z, Y, STATS[:0]), {}, "stats"),
    "upstream": ("softmax_loss_backward", (UP[:2], Z, Y, STATS), {}, "grad_loss"),
    "sample_weight": ("softmax_loss", (Z, Y), {"sample_weight": torch.ones(2)}, "sample_weight"),
    "focal_gamma": ("softmax_loss", (Z, Y), {"focal_gamma": 2.0}, "focal_gamma"),
    "complement": ("softmax_loss_backward", (UP, Z, Y, STATS), {"complement_gamma": -1.0}, "complement_coefficient"),
    "class_margin": ("softmax_loss", (Z, Y), {"class_margin": torch.ones(5)}, "class_margin"),
    "coefficient": ("softmax_loss", (Z, Y), {"cross_entropy_coefficient": 0.0}, "cross_entropy_coefficient"),
    "forward": ("softmax_loss_and_grad", (UP, Z, Y), {}, "target"),
    "inplace": ("softmax_loss_and_grad_", (UP, Z, Y), {}, "target"),
    "shard": ("softmax_loss_accumulate", (Z, Y), {}, "target"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name: str) -> None:
    op, data, options, text = WRONG[name]
    coefficient = options.pop("cross_entropy_coefficient", 1.0)
    tail = cases.operator_options(5, options, cross_entropy_coefficient=coefficient)
    if op == "softmax_loss_accumulate":
        tail = accumulate_tail({})
    with pytest.raises(RuntimeError, match=text):
        getattr(ops, op)(*data, *tail)
    if name not in (
        "transposed",
        "expanded",
        "no_stats",
        "stats",
        "upstream",
        "inplace",
    ):
        with longtail.use_backend("reference"), pytest.raises(RuntimeError, match=text.split(" ")[0]):
            getattr(ops, op)(*data, *tail)
