"""Promise: states (B, L, D) are rows, without a copy, and `shift` moves targets: each position predicts the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from linear_cases import assert_results, fused, leaves, moved, problem
from tolerances import assert_close, assert_same

SHAPE = (2, 2, 5)  # of the 20 rows


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("option_set", ["plain", "mixed"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_states_of_sequences(reduction: str, option_set: str, shift: bool) -> None:
    x, weight, bias, target = problem(13, torch.float64)
    target = target.view(SHAPE)
    target[0, 0, 2] = target[0, 1, 4] = cases.IGNORE
    options = cases.options(option_set, 13, target.reshape(-1), torch.float64) | {"reduction": reduction}
    options["sample_weight"] = torch.rand(SHAPE, generator=cases.generator(3), dtype=torch.float64) + 0.5
    rows = dict(options)
    wanted = moved(target, cases.IGNORE) if shift else target
    rows["sample_weight"] = (moved(options["sample_weight"], 0) if shift else options["sample_weight"]).reshape(-1)
    shape = SHAPE if reduction == "none" else ()
    up = cases.upstreams(shape, torch.float64)["random"]
    expected = fused((x, weight, bias, wanted.reshape(-1)), up.reshape(-1) if up.dim() else up, chunk_size=6, **rows)
    actual = fused((x.view(*SHAPE, -1), weight, bias, target), up, chunk_size=6, shift=shift, **options)
    assert actual[0].shape == shape
    assert actual[1].shape == (*SHAPE, x.shape[1])
    if shift:
        last = actual[1][..., -1, :]
        assert_same(last, torch.zeros_like(last))
        if reduction == "none":
            assert_same(actual[0][..., -1], torch.zeros(SHAPE[:-1], dtype=torch.float64))
    actual = [actual[0].reshape(expected[0].shape), actual[1].reshape(expected[1].shape), *actual[2:]]
    assert_results(actual, expected, expected)


@pytest.mark.parametrize("shift", [False, True])
def test_statistics_and_the_module(shift: bool) -> None:
    x, weight, _, target = problem()
    x, target = x.view(*SHAPE, -1), target.view(SHAPE)
    head = longtail.LinearCrossEntropyLoss(x.shape[-1], 13, shift=shift, return_stats=True)
    with torch.no_grad():
        head.linear.weight.copy_(weight)
    loss, stats = head(x, target)
    wanted = moved(target, cases.IGNORE) if shift else target
    logits = F.linear(x, weight).movedim(-1, 1)
    expected, expected_stats = longtail.cross_entropy(logits, wanted, return_stats=True)
    assert_close(loss, expected.double(), factor=4)
    for got, want in zip(stats[:5], expected_stats[:5], strict=True):
        assert got.shape == SHAPE
        assert_close(got, want.double(), factor=8)
    assert_same(stats.correct, expected_stats.correct)
    found = longtail.linear_row_statistics(x, weight, target, shift=shift)
    for got, want in zip(found, stats, strict=True):
        assert_same(got, want)


def test_one_sequence_of_each_length() -> None:
    weight = torch.randn(5, 3, dtype=torch.float64)
    for length in (0, 1, 2, 3):
        x, target = torch.randn(length, 3, dtype=torch.float64), torch.arange(length)
        loss = longtail.linear_cross_entropy(x, weight, target, shift=True, reduction="none")
        expected = F.cross_entropy(x[:-1] @ weight.T, target[1:], reduction="none") if length > 1 else x.new_zeros(0)
        assert_close(loss, F.pad(expected, (0, length - len(expected))))
        mean = longtail.linear_cross_entropy(x, weight, target, shift=True)
        assert mean.isnan() if length < 2 else torch.isclose(mean, expected.mean())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_narrow_targets(dtype: torch.dtype) -> None:
    """uint8 holds no -100."""
    x, weight, bias, target = problem()
    target = target.clamp(min=0)
    want = fused((x, weight, bias, target), shift=True)
    for a, b in zip(fused((x, weight, bias, target.to(dtype)), shift=True), want, strict=True):
        assert_same(a, b)


def test_no_state_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    family = longtail.linear.loss.SOFTMAX
    watched = family._replace(loss=lambda x, *rest: (seen.append(x.data_ptr()), family.loss(x, *rest))[1])
    monkeypatch.setattr(longtail.linear.loss, "SOFTMAX", watched)
    x, weight, _, target = problem()
    states = x.view(2, 10, -1)
    longtail.linear_cross_entropy(states, weight, target.view(2, 10), shift=True)
    assert seen == [x.data_ptr()]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_class_probabilities(reduction: str) -> None:
    x, weight, bias, _ = problem(13, torch.float64)
    p = torch.rand(20, 13, dtype=torch.float64).softmax(1)
    v = torch.rand(20, dtype=torch.float64)
    up = cases.upstreams((20,) if reduction == "none" else (), torch.float64)["random"]
    want = fused((x, weight, bias, p), up, reduction=reduction, sample_weight=v)
    shaped = up.view(SHAPE) if up.dim() else up
    states = (x.view(*SHAPE, -1), weight, bias, p.view(*SHAPE, -1))
    got = fused(states, shaped, reduction=reduction, sample_weight=v.view(SHAPE))
    for a, b in zip(got, want, strict=True):
        assert_close(a.reshape(b.shape), b)


X, W, T = torch.zeros(2, 4, 3), torch.zeros(5, 3), torch.zeros(2, 4, dtype=torch.int64)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "flat_target": ((X, W, T.flatten()), {}, ValueError, r"target has shape \[8\], expected \[2, 4\]"),
    "k": ((X, torch.zeros(5, 2, 3), T), {}, ValueError, "K-dimensional"),
    "shifted_k": ((X[0], torch.zeros(5, 2, 3), T.T), {"shift": True}, ValueError, "shift is True"),
    "shifted_row": ((X[0, 0], W, T[0, 0]), {"shift": True}, ValueError, r"expected at least \(L, D\) with shift"),
    "shifted_probabilities": ((X, W, torch.rand(2, 4, 5)), {"shift": True}, ValueError, "shift is True"),
    "shift": ((X, W, T), {"shift": 1}, TypeError, "shift is a int, expected a bool"),
    "weights": ((X, W, T), {"sample_weight": torch.ones(8)}, ValueError, r"\[8\], expected \[2, 4\]"),
    "shifted_weights": ((X, W, T), {"sample_weight": torch.ones(8), "shift": True}, ValueError, r"expected \[2, 4\]"),
    "learned_weights": (
        (X, W, T), {"sample_weight": torch.ones(2, 4, requires_grad=True), "shift": True}, ValueError, "requires grad"
    ),
    "bounds": ((X, W, T + 5), {"shift": True}, IndexError, "target 5 in row 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    data, given, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        longtail.linear_cross_entropy(*data, **given)


def test_compiled_and_exported() -> None:
    x, weight, _, target = problem(13, torch.float64)
    data = leaves(x.view(2, 10, -1), weight)

    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return longtail.linear_cross_entropy(x, weight, target, shift=True, label_smoothing=0.1)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return loss(x, weight, target)

    target = target.view(2, 10)
    want = torch.autograd.grad(loss(*data, target), data)
    batch = torch.export.Dim("batch", min=2)
    shapes = ({0: batch}, None, {0: batch})
    exported = torch.export.export(Module(), (*data, target), dynamic_shapes=shapes).module()
    for function in (torch.compile(loss, fullgraph=True, backend="aot_eager"), exported):
        for got, expected in zip(torch.autograd.grad(function(*data, target), data), want, strict=True):
            assert_close(got, expected)
