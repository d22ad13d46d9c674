"""Promise: `linear_cross_entropy` is `cross_entropy(input @ linear_weight.T + linear_bias)`, whatever the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from linear_cases import N, assert_results, fused, leaves, plain, problem, truth
from longtail.linear import classes as linear_classes
from longtail.linear import rows as linear_rows
from tolerances import assert_close, assert_same

CHUNKS = (1, 7, N, N + 1)


@pytest.mark.parametrize("gradient", ["forward", "backward", "none"])
@pytest.mark.parametrize("option_set", cases.DERIVED_SETS)
def test_gradcheck(option_set: str, gradient: str) -> None:
    x, weight, bias, target = problem(6, torch.float64, rows=5)
    options = cases.options(option_set, 6, target, torch.float64)
    options |= {"reduction": "none"} if gradient == "none" else {"gradient": gradient}

    def loss(*leaf: Tensor) -> Tensor:
        return longtail.linear_cross_entropy(leaf[0], leaf[1], target, linear_bias=leaf[2], chunk_size=2, **options)

    if gradient != "forward":
        assert torch.autograd.gradcheck(loss, leaves(x[:, :4], weight[:, :4], bias))
        return
    # One backward only: against the mode just checked, with an upstream gradient that is not one.
    once, again = leaves(x, weight, bias), leaves(x, weight, bias)
    got = torch.autograd.grad(loss(*once) * -1.7, once)
    options["gradient"] = "backward"
    for a, b in zip(got, torch.autograd.grad(loss(*again) * -1.7, again), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
def test_equals_the_loss_of_whole_logits(option_set: str, reduction: str, dtype: torch.dtype) -> None:
    data = problem(13, dtype)
    options = cases.options(option_set, 13, data[3], dtype) | {"reduction": reduction}
    shape = (N,) if reduction == "none" else ()
    up = cases.upstreams(shape, cases.vector_dtype(dtype))["random"]
    expected, eager = truth(data, up, **options), plain(data, up, **options)
    for chunk_size in (None, 7):
        actual = fused(data, up, chunk_size=chunk_size, **options)
        assert [t.dtype for t in actual] == [t.dtype for t in eager]
        assert actual[2].abs().max() > 0
        assert_results(actual, expected, eager, factor=1 if dtype.itemsize > 2 else 2)


@pytest.mark.parametrize("chunk_size", [1, 7, N, N + 1])
@pytest.mark.parametrize("gradient", ["auto", "backward", "none"])
@pytest.mark.parametrize("upstream", ["random", "stride0", "strided"])
def test_chunk_size_changes_nothing(chunk_size: int, gradient: str, upstream: str) -> None:
    data = problem(13, torch.float64)
    options = cases.options("mixed", 13, data[3], torch.float64)
    options |= {"reduction": "none"} if gradient == "none" else {"gradient": gradient}
    up = cases.upstreams((N,) if gradient == "none" else (), torch.float64)[upstream]
    expected = fused(data, up, **options)
    assert_results(fused(data, up, chunk_size=chunk_size, **options), expected, expected)


@pytest.mark.parametrize("margin", [0.0, 20.0, 100.0, 1e4])
def test_margins(margin: float) -> None:
    """Logits as the standing cases have them, by an identity projection."""
    logits, target = cases.margin_case(margin, 9, torch.float32)
    options = {"focal_gamma": 1.5, "complement_gamma": -1.0}
    up = cases.upstreams((6,), torch.float32)["random"]
    data = (logits, torch.eye(9), torch.zeros(9), target)
    expected, eager = truth(data, up, reduction="none", **options), plain(data, up, reduction="none", **options)
    assert_results(fused(data, up, reduction="none", chunk_size=4, **options), expected, eager)


def test_statistics() -> None:
    x, weight, bias, target = problem()
    _, expected = longtail.cross_entropy(F.linear(x, weight, bias), target, return_stats=True)
    for leaf in (x, x.clone().requires_grad_()):
        loss, stats = longtail.linear_cross_entropy(
            leaf, weight, target, linear_bias=bias, chunk_size=6, return_stats=True
        )
        assert loss.requires_grad == leaf.requires_grad
        for name in ("lse", "log_prob", "complement_entropy"):
            assert not getattr(stats, name).requires_grad
            assert_close(getattr(stats, name), getattr(expected, name).double(), what=name, factor=4)
        assert_same(stats.correct, expected.correct)


@pytest.mark.parametrize("normalizer", ["count", 3.5, torch.tensor(11)])
def test_normalizer(normalizer: Any) -> None:
    data = problem()
    assert_results(
        fused(data, normalizer=normalizer, chunk_size=6), *[plain(data, normalizer=normalizer)] * 2, factor=4
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=cases.name)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_ignored_rows_take_no_product(reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    data = problem(13, dtype)
    options = cases.options("mixed", 13, data[3], dtype) | {"reduction": reduction}
    up = cases.upstreams((N,) if reduction == "none" else (), cases.vector_dtype(dtype))["random"]
    seen = []
    for module in (linear_rows, linear_classes):
        make = module.make_logits
        monkeypatch.setattr(module, "make_logits", lambda x, *rest, make=make: (seen.append(len(x)), make(x, *rest)))
    filtered = fused(data, up, **options)
    counted = int((data[3] != cases.IGNORE).sum())
    assert 0 < counted < N
    assert set(seen) == {counted}
    monkeypatch.setattr(linear_rows, "_counted", lambda *_: None)  # as on a GPU: cleared, not left out
    assert_results(filtered, fused(data, up, **options), plain(data, up, **options))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_ignored_rows_reach_no_gradient(bad: float, reduction: str) -> None:
    x, weight, bias, target = problem()
    x[target == cases.IGNORE] = bad
    up = cases.upstreams((N,) if reduction == "none" else (), torch.float32)["random"]
    clean = x.masked_fill((target == cases.IGNORE)[:, None], 0.0)
    actual = fused((x, weight, bias, target), up, reduction=reduction, chunk_size=7)
    expected = fused((clean, weight, bias, target), up, reduction=reduction, chunk_size=7)
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)
    assert not actual[1][target == cases.IGNORE].any()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name)
def test_nothing_counted(dtype: torch.dtype, reduction: str) -> None:
    for rows in (0, 4):
        x, weight, bias, target = problem(5, dtype, rows)
        target.fill_(cases.IGNORE)
        loss, *grads = fused((x, weight, bias, target), torch.ones((rows,) if reduction == "none" else ()),
                             reduction=reduction)  # fmt: skip
        assert loss.isnan().all() if reduction == "mean" else not loss.any()
        if reduction != "mean":
            assert not any(g.any() for g in grads)
        for grad, leaf in zip(grads, (x, weight, bias), strict=True):
            assert grad.shape == leaf.shape
            assert grad.dtype == leaf.dtype


@pytest.mark.parametrize(("classes", "rows"), [(1, 6), (2, 6), (127, 9), (262144, 6)])
def test_numbers_of_classes(classes: int, rows: int) -> None:
    data = problem(classes, rows=rows)
    options: dict[str, Any] = {"complement_gamma": -1.0, "focal_gamma": 0.5, "label_smoothing": 0.1}
    up = torch.tensor(1.5)
    # Two chunks of several rows: the vendor adds up a single row's products over all classes less exactly.
    assert_results(fused(data, up, chunk_size=3, **options), truth(data, up, **options), plain(data, up, **options))


LAYOUTS = {**cases.LAYOUTS, "wide_stride": lambda x: x.repeat(1, 2)[:, : x.shape[1]]}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [0, 1])
def test_layouts(layout: str, which: int) -> None:
    data = list(problem())
    data[which] = LAYOUTS[layout](data[which])
    x, weight, bias = (t.detach().requires_grad_() for t in data[:3])
    loss = longtail.linear_cross_entropy(x, weight, data[3], linear_bias=bias, chunk_size=7)
    actual = [loss.detach(), *torch.autograd.grad(loss * 2, (x, weight, bias))]
    expected = plain(tuple(data), torch.tensor(2.0))
    assert_results(actual, expected, expected, factor=4)


def test_transposed_weight_keeps_its_gradient_uncopied() -> None:
    """A weight stored [D, C]: its gradient is laid out alike, so that the parameter takes it as it is."""
    x, weight, _, target = problem()
    stored = weight.T.contiguous().T.requires_grad_()
    longtail.linear_cross_entropy(x, stored, target, chunk_size=6).backward()
    assert stored.grad.stride() == stored.stride()


def test_wider_accumulation() -> None:
    data = problem(13, torch.float32)
    actual = fused(data, chunk_size=3, accumulate_dtype=torch.float64)
    assert actual[2].dtype == torch.float32
    assert_results(actual, truth(data), plain(data))


@pytest.mark.parametrize("mode", ["auto", "backward"])
def test_float16_mean_survives_a_loss_scale(mode: str) -> None:
    """A mean over many rows folded into a float16 gradient would be subnormal, or zero, before the scale."""
    rows, scale = 4096, 65536.0
    x, weight, bias, target = problem(50, torch.float16, rows)
    data = (x, weight * 0.1, bias, target)
    actual = fused(data, torch.tensor(scale), gradient=mode)
    expected = truth(data, torch.tensor(scale))
    for got, want in zip(actual[1:], expected[1:], strict=True):
        assert got.isfinite().all()
        assert (got.double() - want).norm() < 4e-3 * want.norm()
