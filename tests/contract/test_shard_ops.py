"""Promise: the steps of a loss, taken by shards of the classes, make the loss and the gradient of the whole rows."""

from __future__ import annotations

import pytest
import torch

import cases
import longtail
import naive
from operator_arguments import SHARD, shard
from shard_cases import ELSEWHERE, accumulate_tail, apply_tail, run_shards
from tolerances import assert_close, assert_same

ops = torch.ops.longtail


def check_shards(classes: int, splits: tuple[list[int], ...], option_set: str, dtype: torch.dtype, rows: int) -> None:
    logits, target = cases.random_case(rows, classes, dtype)
    logits = cases.poison_ignored(logits, target)
    options = cases.options(option_set, classes, target, dtype)
    up = cases.upstreams((rows,), cases.vector_dtype(dtype))["random"]
    loss, grad = naive.rows_and_grad(logits, target, up, **cases.to_float64(options))
    for k, sizes in enumerate(splits):
        _, got_loss, got_grad = run_shards(logits, target, up, sizes, options, inplace=k % 2 == 1)
        assert got_grad.dtype == dtype
        assert_close(got_loss, loss, what=f"loss of {classes} as {sizes}", factor=4)
        assert_close(got_grad, grad, what=f"gradient of {classes} as {sizes}", factor=4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
def test_shards_make_the_whole(option_set: str, dtype: torch.dtype, backend: str) -> None:
    with longtail.use_backend(backend):
        check_shards(11, ([11], [4, 7], [1, 0, 9, 1], [0, 11]), option_set, dtype, rows=7)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("option_set", ["mixed", "mixed_linear"])
def test_shards_of_several_blocks_and_of_one_class(option_set: str, dtype: torch.dtype) -> None:
    check_shards(2500, ([1, 1500, 0, 999],), option_set, dtype, rows=3)
    check_shards(1, ([1], [0, 1]), option_set, dtype, rows=3)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("option_set", ["plain", "smoothing_weight", "mixed"])
def test_combined_statistics_are_those_of_whole_rows(option_set: str, dtype: torch.dtype) -> None:
    logits, target = cases.random_case(9, 1100, dtype)
    options = cases.options(option_set, 1100, target, dtype)
    up = cases.upstreams((9,), cases.vector_dtype(dtype))["random"]
    _, whole = ops.softmax_loss(logits, target, *cases.operator_options(1100, options))
    for sizes in ([500, 600], [1, 1099], [300, 300, 0, 500]):
        stats, _, _ = run_shards(logits, target, up, sizes, options, inplace=False)
        assert_close(stats, whole.double(), what=f"stats of {sizes}", factor=8)


@pytest.mark.parametrize("margin", cases.MARGINS)
def test_margins_keep_their_digits(margin: float) -> None:
    """Also where the target's shard is hopeless, or alone in its mass; and far from zero."""
    logits, target = cases.margin_case(margin, 10)
    for shift in (0.0, 1e4):
        z = logits + shift
        for option_set in ("focal", "smoothing_weight", "complement"):
            options = cases.options(option_set, 10, target)
            up = cases.upstreams((6,), torch.float32)["random"]
            loss, grad = naive.rows_and_grad(z, target, up, **cases.to_float64(options))
            _, got_loss, got_grad = run_shards(z, target, up, [4, 6], options, inplace=False)
            assert_close(got_loss, loss, what="loss", factor=4)
            assert_close(got_grad, grad, what="gradient", factor=4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_infinite_and_missing_logits(backend: str) -> None:
    z = torch.randn(8, 6, dtype=torch.float64, generator=cases.generator(3))
    target = torch.tensor([0, 1, 2, 3, 4, 5, 0, 3])
    z[0, 3:] = -torch.inf  # a shard without mass
    z[1, :3] = -torch.inf  # the target's shard without mass, target at -inf
    z[2, 0] = -torch.inf  # the shard's first logit, where another's reference would be
    z[3, 0] = -torch.inf
    z[4, :4] = -torch.inf
    z[5, 2] = torch.nan
    z[6, 1:] = -torch.inf  # p_g = 1
    up = torch.randn(8, dtype=torch.float64, generator=cases.generator(4))
    for option_set in ("plain", "focal", "complement"):
        options = cases.options(option_set, 6, target, torch.float64)
        whole = ops.softmax_loss_and_grad(up, z, target, *cases.operator_options(6, options))
        with longtail.use_backend(backend):
            _, loss, grad = run_shards(z, target, up, [3, 3], options, inplace=False)
        assert_close(loss, whole[0], what=f"{option_set}: loss", factor=4)
        rows = torch.arange(8) != 5  # every gradient of a row with NaN is NaN, or of no use
        assert_close(grad[rows], whole[2][rows], what=f"{option_set}: gradient", factor=4)
        assert grad[5].isnan().all()


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_layouts_and_written_places(dtype: torch.dtype) -> None:
    """Row strides and unaligned rows; nothing between rows is written."""
    args = shard("softmax_loss_apply", dtype)
    expected = ops.softmax_loss_apply(*args)
    buffer = torch.full((7, 20), 3.0, dtype=dtype)
    view = buffer[:, 5:16]
    view.copy_(args[0])
    assert_same(ops.softmax_loss_apply(view, *args[1:]), expected)
    ops.softmax_loss_apply_(view, *args[1:])
    assert_same(view.contiguous(), expected)
    assert (buffer[:, :5] == 3).all()
    assert (buffer[:, 16:] == 3).all()


def test_ignored_rows_are_exactly_zero() -> None:
    for backend in ("cpu", "reference"):
        with longtail.use_backend(backend):
            for name in SHARD[:2]:
                args = shard(name)
                result = getattr(ops, name)(*args)
                ignored = args[1] == cases.IGNORE
                assert ignored.any()
                assert_same(result[ignored], torch.zeros_like(result[ignored]))


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_classes_and_no_rows(backend: str, classes: int) -> None:
    with longtail.use_backend(backend):
        for target in (torch.tensor([ELSEWHERE, cases.IGNORE]), torch.zeros(0, dtype=torch.int64)):
            z = torch.randn(len(target), classes)
            stats = ops.softmax_loss_accumulate(z, target, *accumulate_tail({}, smoothing=True))
            assert stats.shape == (len(target), 5)
            if classes == 0 and len(target):
                empty = torch.tensor([[-torch.inf, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
                assert_same(stats, empty)
            grad = ops.softmax_loss_apply(z, target, stats, *apply_tail({}))
            assert grad.shape == z.shape


@pytest.mark.parametrize("outside", [-2, 11])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", SHARD)
def test_targets_out_of_range(name: str, backend: str, outside: int) -> None:
    args = shard(name)
    args[1][3] = outside
    with longtail.use_backend(backend), pytest.raises(IndexError, match=f"target {outside} in row 3"):
        getattr(ops, name)(*args)
