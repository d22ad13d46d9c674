"""Promise: a shard's statistics and gradient, and those of a row joined from its shards, seen in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import shard_cases
from interpreted import FACTOR, interpreted, rerun, starts_it
from shard_cases import ELSEWHERE, expected_grad, expected_stats, shard_case
from tolerances import assert_close, assert_same

pytest.importorskip("triton")
shard = pytest.importorskip("longtail.triton_kernels.softmax_shard")
SIZES = (1, 2, 3, 64, 127, 1000, 4099)


def vectors(options: dict[str, Any], *names: str) -> list[Tensor | None]:
    return [options.get(name) for name in names]


def accumulate(logits: Tensor, target: Tensor, options: dict[str, Any], smoothing: bool) -> Tensor:
    scale, softcap = options.get("scale", 1.0), options.get("softcap") or 0.0
    first = vectors(options, "weight", "class_bias", "class_margin")
    found: Tensor = shard.softmax_loss_accumulate(logits, target, *first, cases.IGNORE, smoothing, scale, softcap)
    return found


@interpreted
@pytest.mark.parametrize("option_set", ["plain", "smoothing_weight", "mixed", "mixed_linear"])
@pytest.mark.parametrize("classes", SIZES)
def test_accumulate(classes: int, option_set: str) -> None:
    logits, target = shard_case(classes)
    options = cases.options(option_set, classes, target)
    for smoothing in (False, True):
        stats = accumulate(logits, target, options, smoothing)
        truth = expected_stats(logits, target, options, smoothing)
        assert_close(stats, truth, what="stats", factor=8 if smoothing else 2)
        assert (stats[2] == 0).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=cases.name)
@pytest.mark.parametrize("option_set", ["plain", "mixed"])
@pytest.mark.parametrize("classes", SIZES)
def test_apply(classes: int, option_set: str, dtype: torch.dtype) -> None:
    logits, target = shard_case(classes, dtype)
    options = cases.options(option_set, classes, target, dtype)
    row_grad = torch.randn(6, 5, generator=cases.generator(2))
    row_grad[:, 0] = torch.where(target[:, None] == cases.IGNORE, 0.0, logits.float()).amax(1) + 2.0
    row_grad[2] = torch.nan
    scale, softcap = options.get("scale", 1.0), options.get("softcap") or 0.0
    tail = (row_grad, *vectors(options, "weight", "class_bias"), cases.IGNORE, scale, softcap)
    for layout in ("contiguous", "row_stride", "offset"):
        z = cases.LAYOUTS[layout](logits)
        grad = shard.softmax_loss_apply(z, target, *tail)
        truth = expected_grad(logits, target, row_grad, options)
        assert_close(grad, truth, what="gradient", factor=2 * FACTOR[dtype])
        assert (grad[2] == 0).all()
        shard.softmax_loss_apply_(z, target, *tail)
        assert_same(z, grad)


@interpreted
@pytest.mark.parametrize("option_set", ["plain", "mixed"])
def test_shards_join_to_the_row(option_set: str) -> None:
    """m, d and t of two shards, combined, are the whole row's."""
    classes = 130
    logits, target = cases.random_case(6, classes, ignore=False)
    options = cases.options(option_set, classes, target)
    whole = accumulate(logits, target, options, False)
    pieces = []
    for part in (slice(0, 70), slice(70, classes)):
        local = target - part.start
        local = torch.where((local >= 0) & (local < part.stop - part.start), local, ELSEWHERE)
        cut = {k: v[part].contiguous() if k.startswith(("class", "weight")) else v for k, v in options.items()}
        pieces.append(accumulate(logits[:, part].contiguous(), local, cut, False).double())
    assert_close(shard_cases.joined(*pieces)[:, :3].float(), whole[:, :3].double(), factor=4)
    second = target >= 70
    assert_same(torch.where(second, pieces[1][:, 3], pieces[0][:, 3]), whole[:, 3].double())


@interpreted
def test_wrong_arguments_raise() -> None:
    logits, target, row_grad = torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), torch.zeros(3, 5)
    tail = (cases.IGNORE, False, 1.0, 0.0)
    wrong = [
        lambda: shard.softmax_loss_accumulate(logits, target[1:], None, None, None, *tail),
        lambda: shard.softmax_loss_accumulate(logits[None], target, None, None, None, *tail),
        lambda: shard.softmax_loss_accumulate(logits, target, torch.ones(4), None, None, *tail),
        lambda: shard.softmax_loss_accumulate(logits, target + 5, None, None, None, *tail),
        lambda: shard.softmax_loss_accumulate(logits, target - 2, None, None, None, *tail),
        lambda: shard.softmax_loss_apply(logits, target, row_grad[:, :4], None, None, cases.IGNORE, 1.0, 0.0),
        lambda: shard.softmax_loss_apply(logits, target, row_grad[1:], None, None, cases.IGNORE, 1.0, 0.0),
    ]
    for call in wrong:
        with pytest.raises(RuntimeError, match="longtail"):
            call()


@starts_it
def test_in_a_process_of_its_own() -> None:
    rerun(__file__)
