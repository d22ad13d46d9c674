"""Promise: losses are right at the limits of the arithmetic, and no logits are overwritten for bad targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import limit_cases
import longtail
from batches import Kernels, one_thread
from emulation.harness import STORAGES
from emulation.plans import PIXELS as IMAGE_REGIMES
from emulation.plans import REGIMES, emulated, over_pixels
from interpreted import FACTOR, HALVES
from kernels import CPU, TRITON, Operators, over
from linear_cases import fused, problem
from longtail.options import SigmoidOptions
from shard_cases import apply_tail, run_shards
from tolerances import assert_close, assert_same

ops = torch.ops.longtail


ROWS = emulated(REGIMES, "warp", "block", "cluster_2", "kept_2", "single_elements")
PIXELS = {
    **emulated(IMAGE_REGIMES, "alone", "shared_classes", "kept"),
    "emulated-single": over_pixels(32, 64, vector=False),
}
INTERPRETED_DTYPES = tuple(FACTOR)


@pytest.mark.parametrize(
    ("kernels", "shape", "dtype", "few"),
    [
        *over(CPU, [(0, 1), (0, 2), (0, 9), (0, 67), (0, 9, 3)], cases.DTYPES, [False]),
        # What options make of a row is the same code at every size and type, and the interpreter is slow.
        *over(TRITON, [(0, 2), (0, 9), (0, 9, 3)], [torch.float32], [False]),
        *over(TRITON, [(0, 9), (0, 9, 3)], HALVES, [True]),
        *over(TRITON, [(0, 4099), (0, 70, 1)], [torch.float32], [True]),
        *over(ROWS, [(0, 2), (0, 9), (0, 259)], STORAGES, [False]),
        *over(emulated(REGIMES, "warp_of_vectors"), [(0, 8), (0, 256)], STORAGES, [False]),
        *over(emulated(REGIMES, "block", "kept_2"), [(0, 5003)], STORAGES, [True]),  # whole chunks
        *over(PIXELS, [(0, 2, 8), (0, 9, 8), (0, 70, 8)], STORAGES, [False]),
    ],
)
def test_operators(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype, few: bool) -> None:
    with one_thread():
        limit_cases.check_operators(kernels, shape, dtype, 2 * kernels.gradient_factor(dtype), few)


@pytest.mark.parametrize(("kernels", "dtype"), [*over(CPU, cases.DTYPES), *over(TRITON, INTERPRETED_DTYPES)])
def test_shards(kernels: Operators, dtype: torch.dtype) -> None:
    up, factor = torch.tensor(-1.25, dtype=cases.vector_dtype(dtype)), 4 * kernels.gradient_factor(dtype)
    for name, (logits, target, options, coefficient), loss, grad in limit_cases.problems(9, dtype):
        if coefficient == 1.0:
            given = {k: v for k, v in options.items() if v is not None}
            with longtail.use_backend(kernels.backend):
                _, got, got_grad = run_shards(logits, target, up.expand(len(target)), [4, 5], given, inplace=True)
            limit_cases.check(f"{name} {dtype}", [got], [got_grad], loss, grad * -1.25, factor=factor)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_log_sum_exp_of_every_row(dtype: torch.dtype) -> None:
    logits, target = limit_cases.rows(9, dtype)
    _, stats = longtail.cross_entropy(logits, target, return_stats=True)
    defined = ~(logits.gather(1, target[:, None])[:, 0] == torch.inf) & ~(logits == -torch.inf).all(1)
    assert_close(stats.lse[defined], logits.double().logsumexp(1)[defined])


@pytest.mark.parametrize("target_logit", [-20.0, -1e4, -1e18, -torch.inf])
def test_derivatives_of_the_reference(target_logit: float) -> None:
    """Those that autograd takes through its steps, and again of those."""
    x = torch.tensor([[0.3, target_logit, -0.7, 1.1]], dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    pairs = (
        (longtail.reference.softmax.posterior(longtail.reference.softmax.accumulate(x, torch.tensor([1]))).lse ** 2, x),
        (y.logsumexp(1) ** 2, y),
    )
    first = [torch.autograd.grad(value.sum(), leaf, create_graph=True)[0] for value, leaf in pairs]
    assert_close(first[0], first[1].detach())
    second = [torch.autograd.grad(one[0, 0], leaf)[0] for one, (_, leaf) in zip(first, pairs, strict=True)]
    assert_close(second[0], second[1])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "cross_entropy": longtail.cross_entropy,
    "focal": longtail.focal_loss,
    "complement": longtail.complement_cross_entropy,
    "entropy": longtail.complement_entropy,
}


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_weight_of_no_target_has_no_say(name: str, backend: str, mode: str) -> None:
    """To the bit, in every dtype, layout and reduction."""
    for dtype in cases.DTYPES:
        for shape in ((6, 7), (2, 7, 5)):
            logits = torch.randn(shape, generator=cases.generator(1)).to(dtype)
            target = torch.randint(6, (shape[0], *shape[2:]), generator=cases.generator(2))
            target.view(-1)[1::4] = cases.IGNORE
            for reduction in ("mean", "sum", "none"):
                results = []
                for value in (1.0, torch.inf if reduction == "sum" else torch.nan):
                    x = logits.clone().requires_grad_()
                    weight = limit_cases.weights(7, value, dtype)
                    options = {"weight": weight, "reduction": reduction, "gradient": mode}
                    with longtail.use_backend(backend):
                        loss = FUNCTIONS[name](x * 1.0, target, **options)
                        results.append((loss.detach(), *torch.autograd.grad(loss.sum() * 1.5, x)))
                assert results[0][0].isfinite().all()
                for expected, got in zip(*results, strict=True):
                    assert_same(got, expected, f"{dtype} {shape} {reduction}")


@pytest.mark.parametrize("odd", [torch.inf, torch.nan])
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_weight_of_no_target_has_no_say_in_the_linear_loss(backend: str, chunk_size: int | None, odd: float) -> None:
    for dtype in cases.DTYPES:
        data = problem(130, dtype)
        data[3][data[3] == 129] = 0
        for gradient in ("forward", "backward"):
            options = {"chunk_size": chunk_size, "gradient": gradient, "complement_gamma": -1.0}
            with longtail.use_backend(backend):
                expected, got = (fused(data, weight=limit_cases.weights(130, w, dtype), **options) for w in (1.0, odd))
            for one, other in zip(got, expected, strict=True):
                assert other.isfinite().all()
                assert_same(one, other, f"{dtype} {gradient}")


@pytest.mark.parametrize(("kernels", "dtype"), [*over(CPU, cases.DTYPES), *over(TRITON, INTERPRETED_DTYPES)])
def test_a_weight_of_no_positive_has_no_say(kernels: Operators, dtype: torch.dtype) -> None:
    with longtail.use_backend(kernels.backend):
        limit_cases.check_weights_of_positives(dtype)


@pytest.mark.parametrize("odd", [torch.inf, torch.nan])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_under_label_smoothing_every_weight_shows(backend: str, odd: float) -> None:
    logits, target = cases.random_case(6, 7, ignore=False)
    weight = limit_cases.weights(7, odd, torch.float32)
    with longtail.use_backend(backend):
        loss = longtail.cross_entropy(logits, target % 6, weight, reduction="none", label_smoothing=0.1)
    assert not loss.isfinite().any()


@pytest.mark.parametrize("up", [torch.inf, -torch.inf])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_infinite_upstream_gradient_is_torchs(backend: str, up: float) -> None:
    """But for the targets, where torch has inf - inf."""
    logits, target = cases.random_case(6, 7)
    unseen = (target == cases.IGNORE)[:, None] | torch.nn.functional.one_hot(target.clamp(min=0), 7).bool()
    results = []
    for function in (torch.nn.functional.cross_entropy, longtail.cross_entropy):
        for x in (logits.clone().requires_grad_(), logits.T.contiguous()[None].requires_grad_()):
            rows = x.dim() == 2
            with longtail.use_backend(backend):
                loss = function(x, target if rows else target[None], reduction="none").flatten()
            (grad,) = torch.autograd.grad(loss, x, torch.full((6,), up))
            results.append((grad if rows else grad[0].T).masked_fill(unseen, 0.0))
    for grad in results[1:]:
        assert_same(grad, results[0])


def in_place_calls(shape: tuple[int, ...], dtype: torch.dtype, bad: int) -> list[tuple[str, Tensor, tuple[Any, ...]]]:
    """(operator, its logits, its arguments): the last of many targets is out of bounds."""
    rows = shape[0] * (shape[2] if len(shape) == 3 else 1)
    target = torch.randint(shape[1], (rows,), generator=cases.generator(1))
    target[-1] = bad
    up = torch.ones((), dtype=cases.vector_dtype(dtype)).expand(rows)
    found: list[tuple[str, Tensor, tuple[Any, ...]]] = []
    for stride in (1, 2):
        z = torch.randn(shape, generator=cases.generator(2)).to(dtype)
        g = target.repeat_interleave(stride)[::stride]
        softmax = (up, z, g, *cases.operator_options(shape[1], {}))
        found.append(("softmax_loss_and_grad_", z, softmax))
        for elementwise, clip in ((False, 0.0), (True, 0.0), (False, 0.05)):
            z = z.clone()
            options = SigmoidOptions(ignore_index=cases.IGNORE, gamma=2.0, clip=clip)
            sigmoid = (up, z, g, *options, elementwise)
            found.append(("sigmoid_loss_and_grad_", z, sigmoid))
        if len(shape) == 2 and bad != -1:
            z = z.clone()
            row_grad = torch.ones(rows, 5, dtype=up.dtype)
            found.append(("softmax_loss_apply_", z, (z, g, row_grad, *apply_tail({}))))
    return found


@pytest.mark.parametrize("bad", [-1, -7, 11, 2**40])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(64, 11), (70_000, 11), (3, 11, 700)])
def test_bad_targets_leave_the_logits_as_they_are(shape: tuple[int, ...], backend: str, bad: int) -> None:
    for dtype in cases.DTYPES if shape[0] < 70_000 else (torch.float32,):
        for name, logits, arguments in in_place_calls(shape, dtype, bad):
            before = logits.clone()
            with longtail.use_backend(backend), pytest.raises(IndexError, match=f"target {bad} in row"):
                getattr(ops, name)(*arguments)
            assert_same(logits, before, f"{name} {dtype}")
