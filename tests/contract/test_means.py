"""Promise: what a mean divides by is counted exactly, and a mean costs few launches beside those of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import longtail
from kernels import CPU, GPU, TRITON, Operators, over
from longtail.ops import autograd, fallback, operators
from tolerances import assert_close, assert_same

ops = torch.ops.longtail
CLASSES = 50
ROWS = (0, 1, 5, 8193, 70_000)


def targets(rows: int, ignore_index: int) -> Tensor:
    target = torch.randint(CLASSES, (rows,), generator=cases.generator(rows))
    target[::3] = ignore_index
    return target


@pytest.mark.parametrize(("kernels", "rows", "ignore_index"), over(CPU | TRITON | GPU, ROWS, (cases.IGNORE, 2)))
def test_denominators(kernels: Operators, rows: int, ignore_index: int) -> None:
    target = targets(rows, ignore_index)
    counted = target != ignore_index
    for dtype in (torch.float32, torch.float64):
        weight = torch.rand(CLASSES, generator=cases.generator(1), dtype=dtype) + 0.1
        weight[2] = torch.nan if ignore_index == 2 else 0.5  # of no target that counts
        for stride in (1, 3):
            given = target.repeat_interleave(stride)[::stride].to(kernels.device)
            with longtail.use_backend(kernels.backend):
                count = ops.mean_denominator(given, None, ignore_index, CLASSES)
                total = ops.mean_denominator(given, weight.to(kernels.device), ignore_index, CLASSES)
            assert_same(count.cpu(), counted.sum())
            assert_close(total, weight[target[counted]].double().sum())
            assert total.dtype == dtype


@pytest.mark.parametrize("kernels", over(CPU | TRITON))
def test_targets_out_of_bounds_raise(kernels: Operators) -> None:
    for bad in (3, -1, 2**40):
        with longtail.use_backend(kernels.backend), pytest.raises(IndexError, match=f"target {bad} in row 1"):
            ops.mean_denominator(torch.tensor([0, bad]), torch.ones(3), cases.IGNORE, 3)


@pytest.mark.parametrize(("kernels", "rows"), over(CPU | TRITON | GPU, ROWS))
def test_means_and_divisors(kernels: Operators, rows: int) -> None:
    for dtype in (torch.float32, torch.float64):
        loss = torch.rand(rows, generator=cases.generator(2), dtype=dtype) + 0.5
        for number in (torch.tensor(rows), *(torch.tensor(x, dtype=dtype) for x in (-2.5, 0.0, torch.inf, torch.nan))):
            with longtail.use_backend(kernels.backend):
                got = ops.mean_loss(loss.to(kernels.device), number.to(kernels.device))
            expected = fallback.mean_loss(loss.double(), number)
            for one, truth in zip(got, expected, strict=True):
                assert one.dtype == dtype
                assert_close(one, truth)


class Launches(TorchDispatchMode):
    """Counts the operators that launch something on a GPU."""

    FREE = ("view", "expand", "detach", "alias", "empty", "empty_like", "t", "select", "squeeze", "unsqueeze", "slice")

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        if op.namespace == "longtail" and not name.startswith("mean"):
            self.kernels.append(name)
        elif name not in self.FREE:
            # torch copies, and fills the copy.
            self.others += [name] * (2 if name == "masked_fill" else 1)
        return op(*args, **(kwargs or {}))


def launched(
    loss: Callable[..., Tensor], target: Tensor, options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[list[str], int]:
    """The kernels of a loss and its gradient, and how many launches stand beside them."""
    z = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True) * 1.0
    upstream = torch.empty((), device="meta")
    with Launches() as seen:
        torch.autograd.grad(loss(z, target, **options), z, upstream)
    return seen.kernels, len(seen.others)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


WEIGHT = empty(10)
# name -> (function, options, launches beside the kernels in mode "backward", in mode "forward" of bfloat16 and float16)
MEANS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], tuple[int, int, int]]] = {
    "plain": (longtail.cross_entropy, {}, (3, 4, 5)),
    "focal": (longtail.focal_loss, {"gamma": 1.5}, (3, 4, 5)),
    "weight": (longtail.cross_entropy, {"weight": WEIGHT}, (3, 6, 20)),
    "smoothing": (longtail.cross_entropy, {"weight": WEIGHT, "label_smoothing": 0.1}, (3, 6, 23)),
    "number": (longtail.cross_entropy, {"normalizer": 7}, (3, 6, 8)),
    "count": (longtail.cross_entropy, {"normalizer": "count"}, (4, 5, 6)),
    "sigmoid": (longtail.sigmoid_focal_loss, {"reduction": "mean"}, (4, 5, 6)),
    "sigmoid_weight": (longtail.sigmoid_cross_entropy, {"pos_weight": WEIGHT}, (4, 5, 19)),
}


@pytest.mark.parametrize("shape", [(64, 10), (2, 10, 4, 8)], ids=str)
@pytest.mark.parametrize("name", MEANS)
def test_launches(name: str, shape: tuple[int, ...]) -> None:
    function, options, expected = MEANS[name]
    target = empty(shape[0], *shape[2:], dtype=torch.long)
    family = "sigmoid_loss" if name.startswith("sigmoid") else "softmax_loss"
    modes = (("backward", torch.bfloat16), ("forward", torch.bfloat16), ("forward", torch.float16))
    for (mode, dtype), beside in zip(modes, expected, strict=True):
        kernels = [family, f"{family}_backward"] if mode == "backward" else [f"{family}_and_grad", "scale_grad_"]
        found = launched(function, target, {"gradient": mode, **options}, shape, dtype)
        assert found == (kernels, beside), f"{mode} {dtype}"


def outcomes(values: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
    """The loss and its gradient, by autograd and by torch.func."""
    x = values.clone().requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return longtail.cross_entropy(z * 1.0, target, **options) * 2.5

    value = loss(x)
    return [value.detach(), *torch.autograd.grad(value, x), torch.func.grad(loss)(values)]


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_off_the_cpu_a_mean_is_the_same(dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU's mean, on the CPU: also of nothing, and of weights of 0."""
    values, target = cases.random_case(7, 5, dtype)
    wide = cases.vector_dtype(dtype)
    weight = torch.rand(5, generator=cases.generator(4), dtype=wide)
    nothing = torch.full_like(target, cases.IGNORE)
    for of, options in (
        (target, {}), (target, {"weight": weight}), (target, {"weight": weight * 0}), (target, {"normalizer": 3}),
        (target, {"normalizer": 0}), (target, {"normalizer": torch.tensor(3)}), (nothing, {}),
        (nothing, {"normalizer": "count"}),
    ):  # fmt: skip
        expected = outcomes(values, of, gradient=mode, **options)
        with monkeypatch.context() as patch:
            patch.setattr(autograd, "in_one_launch", lambda _logits: True)
            patch.setattr(operators, "direct", lambda *_: False)
            got = outcomes(values, of, gradient=mode, **options)
        for one, other in zip(got, expected, strict=True):
            assert_close(one, other.double(), what=str(options))


def soft(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Class probabilities, of which no row is ignored."""
    y = torch.full_like(logits, 0.1).scatter_(1, target.clamp(min=0)[:, None], 0.6)
    return longtail.cross_entropy(logits, y, **options)


LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "mean": (longtail.cross_entropy, {}),
    "count": (longtail.cross_entropy, {"normalizer": "count"}),
    "number": (longtail.cross_entropy, {"normalizer": 3}),
    "sum": (longtail.cross_entropy, {"reduction": "sum"}),
    "none": (longtail.cross_entropy, {"reduction": "none"}),
    "soft_mean": (soft, {}),
    "soft_count": (soft, {"normalizer": "count"}),
    "soft_none": (soft, {"reduction": "none", "label_smoothing": 0.1}),
    "sigmoid_rows": (longtail.sigmoid_focal_loss, {"reduction": "rows"}),
    "sigmoid_mean": (longtail.sigmoid_focal_loss, {"reduction": "mean"}),
    "sigmoid_none": (longtail.sigmoid_focal_loss, {}),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_who_looks_on_sees_the_public_operators_and_the_same_bits(dtype: torch.dtype, name: str) -> None:
    """Without a dispatch mode the CPU takes a shorter way: also of nothing, and of weights of 0."""
    function, options = LOSSES[name]
    values, target = cases.random_case(7, 5, dtype)
    weight = torch.rand(5, generator=cases.generator(4), dtype=cases.vector_dtype(dtype))
    family = "sigmoid_loss" if name.startswith("sigmoid") else "softmax_loss"

    def outcome(target: Tensor, weight: Tensor | None) -> list[Tensor]:
        x = values.clone().requires_grad_()
        loss = function(x * 1.0, target, weight=weight, **options)
        upstream = torch.rand(loss.shape, generator=cases.generator(5), dtype=loss.dtype)
        return [loss.detach(), *torch.autograd.grad(loss, x, upstream), function(values, target, **options)]

    for of in (target, torch.full_like(target, cases.IGNORE)):
        for weighted in (None, weight, weight * 0):
            got = outcome(of, weighted)
            with Launches() as seen:
                expected = outcome(of, weighted)
            assert seen.kernels == [family, f"{family}_backward", family]
            for one, other in zip(got, expected, strict=True):
                assert_same(one, other, what=f"{weighted}")
