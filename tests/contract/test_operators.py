"""Promise: the operators, called directly, keep schemas and fakes, equal their fallback, refuse what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import longtail
import operator_arguments
import sigmoid_cases
from longtail.ops.layout import to_images
from operator_arguments import SHARD, SIGMOID, SOFTMAX
from tolerances import assert_close, assert_same

ops = torch.ops.longtail
SIGMOID_SHAPES = ((7, 11), (2, 5, 6))
UP = cases.upstreams((4,), torch.float32)
TARGET = torch.tensor([0, -100, 2, 2])


def image_arguments(name: str) -> list[Any]:
    """Of a softmax operator, or of scale_grad_, over images."""
    up, rows, target, *tail = operator_arguments.softmax("softmax_loss_and_grad", rows=6, classes=5)
    logits = to_images(rows, torch.Size((2, 5, 3)))
    if name == "scale_grad_":
        return [torch.randn(2, 5, 3), up, target, -100]
    if name == "softmax_loss":
        return [logits, target, *tail]
    stats = [ops.softmax_loss(logits, target, *tail)[1]] if name == "softmax_loss_backward" else []
    return [up, logits, target, *stats, *tail]


def arguments(name: str, how: Any) -> list[Any]:
    if how == "images":
        return image_arguments(name)
    if how == "probabilities":
        return operator_arguments.probabilities(name)
    if name in SOFTMAX:
        return operator_arguments.softmax(name, how)
    return operator_arguments.sigmoid(name, *how) if name in SIGMOID else operator_arguments.shard(name)


CALLS: list[tuple[str, Any]] = [
    *((name, option_set) for name in SOFTMAX for option_set in ("plain", "mixed")),
    *((name, "images") for name in (*SOFTMAX, "scale_grad_")),
    *((name, "probabilities") for name in SOFTMAX[:2]),
    *(
        (name, (kind, shape, kind == "soft"))
        for name in SIGMOID
        for kind in ("class", "soft")
        for shape in SIGMOID_SHAPES
    ),
    *((name, "") for name in SHARD),
]


def opcheck(name: str, args: list[Any]) -> None:
    results = torch.library.opcheck(getattr(ops, name).default, tuple(args))
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("name", "how"), CALLS, ids=str)
def test_opcheck(name: str, how: Any, backend: str) -> None:
    with longtail.use_backend(backend):
        opcheck(name, arguments(name, how))


@pytest.mark.parametrize("how", ["mixed", "images"])
def test_opcheck_row_stats(how: str) -> None:
    logits, *rest = arguments("softmax_loss", how)
    opcheck("softmax_row_stats", [logits.requires_grad_(), *rest])


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0])], ids=["count", "weight"])
def test_opcheck_mean_denominator(weight: Tensor | None) -> None:
    opcheck("mean_denominator", [TARGET, weight, -100, 3])


@pytest.mark.parametrize("denominator", [torch.tensor(3), torch.tensor(0.0)], ids=["count", "weight"])
def test_opcheck_mean_loss(denominator: Tensor) -> None:
    opcheck("mean_loss", [torch.randn(4), denominator])


@pytest.mark.parametrize("upstream", ["random", "stride0"])
@pytest.mark.parametrize("target", [None, TARGET], ids=["all", "ignoring"])
def test_opcheck_scale_grad(target: Tensor | None, upstream: str) -> None:
    opcheck("scale_grad_", [torch.randn(4, 6), UP[upstream], target, -100])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize(
    ("name", "option_set"),
    [
        *((name, x) for name in SOFTMAX[:3] for x in ("plain", "smoothing_weight", "focal", "complement", "mixed")),
        *((name, "") for name in SHARD[:2]),
    ],
)
def test_fallback_equals_kernel(name: str, option_set: str, dtype: torch.dtype) -> None:
    outcomes = []
    for backend in ("cpu", "reference"):
        with longtail.use_backend(backend):
            if name in SHARD:
                outcome = getattr(ops, name)(*operator_arguments.shard(name, dtype))
            else:
                outcome = getattr(ops, name)(*operator_arguments.softmax(name, option_set, dtype))
        outcomes.append([outcome] if isinstance(outcome, Tensor) else outcome)
    for kernel, fallback in zip(*outcomes, strict=True):
        assert kernel.dtype == fallback.dtype
        assert_close(kernel, fallback.double(), factor=4)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("shape", SIGMOID_SHAPES, ids=str)
@pytest.mark.parametrize("kind", sigmoid_cases.TARGETS)
def test_fallback_equals_the_sigmoid_kernels(
    kind: str, shape: tuple[int, ...], elementwise: bool, dtype: torch.dtype
) -> None:
    for option_set in sigmoid_cases.sets_for(kind):
        outcomes = []
        for backend in ("cpu", "reference"):
            with longtail.use_backend(backend):
                args = operator_arguments.sigmoid("sigmoid_loss_and_grad", kind, shape, elementwise, dtype, option_set)
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


# name -> (operator, which argument, in its place)
WRONG: dict[str, tuple[str, int, Any]] = {
    "softmax_target_short": ("softmax_loss", 1, torch.zeros(6, dtype=torch.long)),
    "softmax_target_int32": ("softmax_loss", 1, torch.zeros(7, dtype=torch.int32)),
    "softmax_target_rank": ("softmax_loss", 1, torch.zeros(7, 1, dtype=torch.long)),
    "softmax_logits_rank": ("softmax_loss", 0, torch.zeros(7, 11, 1, 1)),
    "softmax_images_short": ("softmax_loss", 0, torch.zeros(7, 11, 2)),
    "softmax_images_last": ("softmax_loss", 0, torch.zeros(1, 7, 11).movedim(1, 2)),
    "softmax_logits_integer": ("softmax_loss", 0, torch.zeros(7, 11, dtype=torch.long)),
    "softmax_logits_transposed": ("softmax_loss", 0, torch.zeros(11, 7).t()),
    "softmax_weight_short": ("softmax_loss", 2, torch.ones(10)),
    "softmax_weight_float64": ("softmax_loss", 2, torch.ones(11).double()),
    "softmax_weight_strided": ("softmax_loss", 2, torch.ones(22)[::2]),
    "softmax_class_bias_rank": ("softmax_loss", 3, torch.ones(1, 11)),
    "softmax_class_margin_long": ("softmax_loss", 4, torch.ones(12)),
    "softmax_class_scale_short": ("softmax_loss", 5, torch.ones(10)),
    "softmax_target_scale_float64": ("softmax_loss", 6, torch.ones(11).double()),
    "softmax_class_mitigation_strided": ("softmax_loss", 7, torch.ones(22)[::2]),
    "softmax_sample_weight_short": ("softmax_loss", 8, torch.ones(6)),
    "softmax_target_outside": ("softmax_loss", 1, torch.full((7,), 11)),
    "softmax_upstream_short": ("softmax_loss_backward", 0, torch.ones(6)),
    "softmax_upstream_scalar": ("softmax_loss_backward", 0, torch.ones(())),
    "softmax_upstream_bfloat16": ("softmax_loss_backward", 0, torch.ones(7, dtype=torch.bfloat16)),
    "softmax_stats_columns": ("softmax_loss_backward", 3, torch.ones(7, 4)),
    "softmax_stats_rows": ("softmax_loss_backward", 3, torch.ones(6, 5)),
    "softmax_stats_float64": ("softmax_loss_backward", 3, torch.ones(7, 5).double()),
    "softmax_both_upstream_short": ("softmax_loss_and_grad", 0, torch.ones(3)),
    "softmax_inplace_target_short": ("softmax_loss_and_grad_", 2, torch.zeros(3, dtype=torch.long)),
    "sigmoid_target_short": ("sigmoid_loss", 1, torch.zeros(6, dtype=torch.long)),
    "sigmoid_target_int32": ("sigmoid_loss", 1, torch.zeros(7, dtype=torch.int32)),
    "sigmoid_target_narrow": ("sigmoid_loss", 1, torch.zeros(7, 11, dtype=torch.bfloat16)),
    "sigmoid_target_dense_short": ("sigmoid_loss", 1, torch.zeros(7, 10)),
    "sigmoid_target_transposed": ("sigmoid_loss", 1, torch.zeros(11, 7).t()),
    "sigmoid_target_outside": ("sigmoid_loss", 1, torch.full((7,), 11)),
    "sigmoid_logits_rank": ("sigmoid_loss", 0, torch.zeros(7, 11, 1, 1)),
    "sigmoid_logits_short": ("sigmoid_loss", 0, torch.zeros(7, 11, 2)),
    "sigmoid_logits_integer": ("sigmoid_loss", 0, torch.zeros(7, 11, dtype=torch.long)),
    "sigmoid_logits_transposed": ("sigmoid_loss", 0, torch.zeros(11, 7).t()),
    "sigmoid_weight_short": ("sigmoid_loss", 2, torch.ones(10)),
    "sigmoid_pos_weight_float64": ("sigmoid_loss", 3, torch.ones(11).double()),
    "sigmoid_sample_weight_short": ("sigmoid_loss", 4, torch.ones(6)),
    "sigmoid_by_target_without_weight": ("sigmoid_loss", 2, None),
    "sigmoid_upstream_short": ("sigmoid_loss_backward", 0, torch.ones(6)),
    "sigmoid_upstream_scalar": ("sigmoid_loss_backward", 0, torch.ones(())),
    "sigmoid_upstream_dense_short": ("sigmoid_loss_backward", 0, torch.ones(7, 10)),
    "sigmoid_upstream_strided": ("sigmoid_loss_backward", 0, torch.ones(11, 7).t()),
    "sigmoid_inplace_upstream_short": ("sigmoid_loss_and_grad_", 0, torch.ones(3)),
    "mean_loss_rows": ("mean_loss", 0, torch.ones(4, 1)),
    "mean_loss_bfloat16": ("mean_loss", 0, torch.ones(4).bfloat16()),
    "mean_loss_denominator": ("mean_loss", 1, torch.ones(1)),
    "shard_images": ("softmax_loss_accumulate", 0, torch.zeros(7, 11, 2)),
    "shard_images_apply": ("softmax_loss_apply", 0, torch.zeros(7, 11, 2)),
    "shard_target_short": ("softmax_loss_accumulate", 1, torch.zeros(6, dtype=torch.long)),
    "shard_weight_long": ("softmax_loss_accumulate", 2, torch.ones(12)),
    "shard_bias_short": ("softmax_loss_apply", 4, torch.ones(10)),
    "shard_class_scale_short": ("softmax_loss_apply", 5, torch.ones(10)),
    "shard_target_scale_long": ("softmax_loss_accumulate", 6, torch.ones(12)),
    "shard_terms_narrow": ("softmax_loss_accumulate", 8, torch.ones(7, 2)),
    "shard_terms_short": ("softmax_loss_apply", 8, torch.ones(6, 3)),
    "shard_row_grad_narrow": ("softmax_loss_apply", 2, torch.ones(7, 4)),
    "shard_row_grad_short": ("softmax_loss_apply_", 2, torch.ones(6, 5)),
    "shard_row_grad_transposed": ("softmax_loss_apply_", 2, torch.ones(5, 7).t()),
    "shard_row_grad_float64": ("softmax_loss_apply", 2, torch.ones(7, 5).double()),
}


@pytest.mark.parametrize("case", WRONG)
def test_inconsistent_arguments_raise(case: str) -> None:
    """An error, never a read outside a tensor."""
    name, position, value = WRONG[case]
    if name in SIGMOID:
        args = operator_arguments.sigmoid(name, option_set="by_target" if "by_target" in case else "mixed")
    else:
        args = arguments(name, "mixed")
    args[position] = value
    kinds = RuntimeError if name in SHARD else (RuntimeError, ValueError, IndexError, TypeError)
    with pytest.raises(kinds, match=r"expected|contiguous" if name in SHARD else None):
        getattr(ops, name)(*args)


class AsksForEntropy(TorchDispatchMode):
    """What softmax operators are told of ``entropy``."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[bool] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in op._schema.arguments]
        if "entropy" in names:
            self.told.add(args[names.index("entropy")])
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("asks", [True, False], ids=["stats", "loss"])
def test_who_returns_statistics_asks_for_entropy(asks: bool, mode: str) -> None:
    """Else kernels on a GPU may leave it out; those of the CPU never do."""
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(3, 3)
    how: dict[str, Any] = {"gradient": mode, "return_stats": asks}
    module = longtail.CrossEntropyLoss(**how)  # which tries its options
    losses = {
        "rows": lambda: longtail.cross_entropy(x * 1.0, TARGET, **how),
        "images": lambda: longtail.cross_entropy((x * 1.0).view(2, 3, 2), TARGET.view(2, 2), **how),
        "module": lambda: module(x * 1.0, TARGET),
        "linear": lambda: longtail.linear_cross_entropy(x, weight, TARGET, **how),
    }
    for name, loss in losses.items():
        with AsksForEntropy() as seen:
            found = loss()
            torch.autograd.grad(found[0] if asks else found, x)
        assert seen.told == {asks}, name
