"""Promise: the softmax operators, called directly, give the losses, gradients and statistics of the definition."""

from __future__ import annotations

import pytest
import torch

import cases
import naive
from operator_arguments import softmax as arguments
from tolerances import assert_close

ops = torch.ops.longtail


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


def test_scale_grad_of_wrong_length_raises() -> None:
    with pytest.raises((RuntimeError, ValueError)):
        ops.scale_grad_(torch.ones(4, 3), torch.ones(3), None, -100)
    with pytest.raises((RuntimeError, ValueError)):
        ops.scale_grad_(torch.ones(4, 3), torch.ones(4), torch.zeros(3, dtype=torch.long), -100)
