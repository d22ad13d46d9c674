"""Promise: the six operators, called directly, keep their schemas, fakes, statistics and fallback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
import naive
from tolerances import assert_close

ops = torch.ops.longtail
NAMES = ("softmax_loss", "softmax_loss_backward", "softmax_loss_and_grad", "softmax_loss_and_grad_")
OPTIONS = ("plain", "smoothing_weight", "focal", "complement", "mixed")


def arguments(
    name: str, option_set: str = "mixed", dtype: torch.dtype = torch.float32, rows: int = 7, classes: int = 11
) -> list[Any]:
    """Arguments of one of the four loss operators, with one ignored row and a random upstream gradient."""
    logits, target = cases.random_case(rows, classes, dtype)
    logits = cases.poison_ignored(logits, target)
    tail = cases.operator_options(classes, cases.options(option_set, classes, target, dtype))
    up = cases.upstreams((rows,), cases.vector_dtype(dtype))["random"]
    if name == "softmax_loss":
        return [logits, target, *tail]
    if name == "softmax_loss_backward":
        return [up, logits, target, ops.softmax_loss(logits, target, *tail)[1], *tail]
    return [up, logits, target, *tail]


def opcheck(operator: Any, args: list[Any]) -> None:
    results = torch.library.opcheck(operator.default, tuple(args))
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("option_set", ["plain", "mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck_losses(name: str, option_set: str, backend: str) -> None:
    with longtail.use_backend(backend):
        opcheck(getattr(ops, name), arguments(name, option_set))


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0])], ids=["count", "weight"])
def test_opcheck_mean_denominator(weight: Tensor | None) -> None:
    opcheck(ops.mean_denominator, [torch.tensor([0, -100, 2, 2]), weight, -100, 3])


@pytest.mark.parametrize("upstream", ["random", "stride0"])
def test_opcheck_scale_grad(upstream: str) -> None:
    up = cases.upstreams((4,), torch.float32)[upstream]
    for target in (None, torch.tensor([0, -100, 2, 2])):
        opcheck(ops.scale_grad_, [torch.randn(4, 6), up, target, -100])


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
def test_operators_against_the_definition(option_set: str, dtype: torch.dtype) -> None:
    rows, classes = 7, 11
    up, logits, target, *tail = arguments("softmax_loss_and_grad", option_set, dtype, rows, classes)
    options = cases.to_float64(cases.options(option_set, classes, target, dtype))
    true_loss, true_grad = naive.rows_and_grad(logits, target, up, **options)
    loss, stats = ops.softmax_loss(logits, target, *tail)
    both_loss, both_stats, both_grad = ops.softmax_loss_and_grad(up, logits, target, *tail)
    written = logits.clone()
    in_loss, in_stats = ops.softmax_loss_and_grad_(up, written, target, *tail)
    grad = ops.softmax_loss_backward(up, logits, target, stats, *tail)
    for value in (loss, both_loss, in_loss):
        assert value.dtype == cases.vector_dtype(dtype)
        assert_close(value, true_loss, what="loss", factor=2)
    for value in (both_stats, in_stats):
        assert_close(value, stats.double(), what="stats")
    for value in (grad, both_grad, written):
        assert value.dtype == dtype
        assert_close(value, true_grad, what="gradient", factor=2)


@pytest.mark.parametrize("upstream", ["random", "stride0", "strided"])
@pytest.mark.parametrize("name", ["softmax_loss_backward", "softmax_loss_and_grad", "softmax_loss_and_grad_"])
def test_upstream_strides(name: str, upstream: str) -> None:
    args = arguments(name)
    args[0] = cases.upstreams((7,), torch.float32)[upstream]
    results = []
    for up in (args[0], args[0].clone(memory_format=torch.contiguous_format)):
        call = [up, args[1].clone(), *args[2:]]
        result = getattr(ops, name)(*call)
        results.append({"softmax_loss_backward": result, "softmax_loss_and_grad_": call[1]}.get(name, result[-1]))
    assert results[0][0].abs().max() > 0
    assert_close(results[0], results[1].double())


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("classes", [1, 2, 3, 16, 17, 127, 1000])
def test_statistics_columns(classes: int, dtype: torch.dtype) -> None:
    """m, d, t over the other classes, u_g, and U = sum of omega_j (u_j - u_g), 0 without smoothing."""
    logits, target = cases.random_case(9, classes, dtype)
    for option_set in ("plain", "smoothing_weight", "class_margin"):
        options = cases.options(option_set, classes, target, dtype)
        _, stats = ops.softmax_loss(logits, target, *cases.operator_options(classes, options))
        assert stats.shape == (9, 5)
        assert stats.dtype == cases.vector_dtype(dtype)
        counted = target != cases.IGNORE
        assert torch.equal(stats[~counted], torch.zeros_like(stats[~counted])), "ignored rows are zero"
        g = target[counted]
        wide = cases.to_float64(options)
        u = naive.effective_logits(logits[counted].double(), g, class_margin=wide.get("class_margin"))
        u_g = u.gather(1, g[:, None])
        omega = wide.get("weight", torch.ones(classes, dtype=torch.float64))
        total = (omega * (u - u_g)).sum(1) if "label_smoothing" in options else torch.zeros(len(g))
        m, d, t, stat_g, stat_u = stats[counted].unbind(1)
        assert_close(stat_g, u_g[:, 0], what="u_g")
        assert_close(stat_u, total.double(), (omega * (u - u_g)).float().sum(1), what="U", factor=3)
        if classes == 1:
            assert torch.equal(torch.stack([d, t]), torch.zeros(2, len(g), dtype=d.dtype))
            continue
        others = u.scatter(1, g[:, None], -torch.inf)
        best = others.amax(1, keepdim=True)
        e = (others - best).exp()
        assert_close(m, best[:, 0], what="m")
        assert_close(d, e.sum(1), what="d")
        assert_close(t, (e * (others - best).nan_to_num(neginf=0)).sum(1), what="t")


@pytest.mark.parametrize("ignore", [-100, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.name)
def test_mean_denominator(dtype: torch.dtype, ignore: int) -> None:
    target = torch.tensor([0, 2, 1, 0, 2, 2])
    weight = torch.tensor([0.25, 3.0, 1.5], dtype=dtype)
    counted = target != ignore
    count = ops.mean_denominator(target, None, ignore, 3)
    total = ops.mean_denominator(target, weight, ignore, 3)
    assert count.dtype == torch.int64
    assert count.item() == counted.sum().item()
    assert total.shape == ()
    assert total.dtype == dtype
    assert_close(total, weight[target[counted]].double().sum())
    with pytest.raises(IndexError):
        ops.mean_denominator(torch.tensor([0, 3]), weight, ignore, 3)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("option_set", OPTIONS)
@pytest.mark.parametrize("name", ["softmax_loss", "softmax_loss_backward", "softmax_loss_and_grad"])
def test_fallback_equals_kernel(name: str, option_set: str, dtype: torch.dtype) -> None:
    args = arguments(name, option_set, dtype)
    outcomes = []
    for backend in ("cpu", "reference"):
        with longtail.use_backend(backend):
            outcome = getattr(ops, name)(*args)
        outcomes.append([outcome] if isinstance(outcome, Tensor) else outcome)
    for kernel, fallback in zip(*outcomes, strict=True):
        assert kernel.dtype == fallback.dtype
        assert_close(kernel, fallback.double(), factor=4)


WRONG: dict[str, tuple[str, int, Any]] = {
    "target_short": ("softmax_loss", 1, torch.zeros(6, dtype=torch.long)),
    "target_int32": ("softmax_loss", 1, torch.zeros(7, dtype=torch.int32)),
    "target_rank": ("softmax_loss", 1, torch.zeros(7, 1, dtype=torch.long)),
    "logits_rank": ("softmax_loss", 0, torch.zeros(7, 11, 1, 1)),
    "images_short": ("softmax_loss", 0, torch.zeros(7, 11, 2)),
    "images_last": ("softmax_loss", 0, torch.zeros(1, 7, 11).movedim(1, 2)),
    "logits_integer": ("softmax_loss", 0, torch.zeros(7, 11, dtype=torch.long)),
    "logits_transposed": ("softmax_loss", 0, torch.zeros(11, 7).t()),
    "weight_short": ("softmax_loss", 2, torch.ones(10)),
    "weight_float64": ("softmax_loss", 2, torch.ones(11).double()),
    "weight_strided": ("softmax_loss", 2, torch.ones(22)[::2]),
    "class_bias_rank": ("softmax_loss", 3, torch.ones(1, 11)),
    "class_margin_long": ("softmax_loss", 4, torch.ones(12)),
    "sample_weight_short": ("softmax_loss", 5, torch.ones(6)),
    "target_outside": ("softmax_loss", 1, torch.full((7,), 11)),
    "upstream_short": ("softmax_loss_backward", 0, torch.ones(6)),
    "upstream_scalar": ("softmax_loss_backward", 0, torch.ones(())),
    "upstream_bfloat16": ("softmax_loss_backward", 0, torch.ones(7, dtype=torch.bfloat16)),
    "stats_columns": ("softmax_loss_backward", 3, torch.ones(7, 4)),
    "stats_rows": ("softmax_loss_backward", 3, torch.ones(6, 5)),
    "stats_float64": ("softmax_loss_backward", 3, torch.ones(7, 5).double()),
    "both_upstream_short": ("softmax_loss_and_grad", 0, torch.ones(3)),
    "inplace_target_short": ("softmax_loss_and_grad_", 2, torch.zeros(3, dtype=torch.long)),
}


@pytest.mark.parametrize("case", WRONG)
def test_inconsistent_arguments_raise(case: str) -> None:
    """An error, never a read outside a tensor."""
    name, position, value = WRONG[case]
    args = arguments(name)
    args[position] = value
    with pytest.raises((RuntimeError, ValueError, IndexError, TypeError)):
        getattr(ops, name)(*args)


def test_scale_grad_of_wrong_length_raises() -> None:
    with pytest.raises((RuntimeError, ValueError)):
        ops.scale_grad_(torch.ones(4, 3), torch.ones(3), None, -100)
    with pytest.raises((RuntimeError, ValueError)):
        ops.scale_grad_(torch.ones(4, 3), torch.ones(4), torch.zeros(3, dtype=torch.long), -100)
