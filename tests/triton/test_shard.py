"""Promise: a shard's statistics and gradient, and those of a row joined from its shards, seen in the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from interpreted import FACTOR, interpreted, rerun, starts_it
from longtail.ops import fallback
from shard_cases import ELSEWHERE, VECTORS, effective_row, expected_grad, expected_stats, run_shards, shard_case
from tolerances import assert_close, assert_same

pytest.importorskip("triton")
shard = pytest.importorskip("longtail.triton_kernels.softmax_shard")
SIZES = (1, 2, 3, 64, 127, 1000, 4099)


def numbers(options: dict[str, Any]) -> tuple[float, ...]:
    return options.get("scale", 1.0), options.get("softcap") or 0.0, options.get("compensation", 0.0)


def accumulate(logits: Tensor, target: Tensor, options: dict[str, Any], smoothing: bool) -> Tensor:
    """By the terms of the classes here."""
    vectors = [options.get(name) for name in VECTORS]
    found: Tensor = shard.softmax_loss_accumulate(
        logits, target, *vectors, None, cases.IGNORE, smoothing, *numbers(options)
    )
    return found


@interpreted
@pytest.mark.parametrize("option_set", ["plain", "smoothing_weight", "mixed_tail", "tail_linear"])
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
@pytest.mark.parametrize("option_set", ["plain", "mixed_tail"])
@pytest.mark.parametrize("classes", SIZES)
def test_apply(classes: int, option_set: str, dtype: torch.dtype) -> None:
    """In place, too, where the target's logit is one of those that are written over."""
    logits, target = shard_case(classes, dtype)
    options = cases.options(option_set, classes, target, dtype)
    row_grad = torch.randn(6, 5, generator=cases.generator(2))
    for i, g in enumerate(target.tolist()):
        row_grad[i, 0] = torch.nan if g == cases.IGNORE else effective_row(logits[i], g, options).max() + 2.0
    vectors = [options.get(name) for name in VECTORS if name != "class_margin"]
    tail = (row_grad, *vectors, None, cases.IGNORE, *numbers(options))
    for layout in ("contiguous", "row_stride", "offset"):
        z = cases.LAYOUTS[layout](logits)
        grad = shard.softmax_loss_apply(z, target, *tail)
        truth = expected_grad(logits, target, row_grad, options)
        assert_close(grad, truth, what="gradient", factor=2 * FACTOR[dtype])
        assert (grad[2] == 0).all()
        shard.softmax_loss_apply_(z, target, *tail)
        assert_same(z, grad)


@interpreted
@pytest.mark.parametrize("option_set", ["plain", "target_scale", "mitigation", "seesaw", "mixed_tail"])
def test_shards_join_to_the_row(option_set: str) -> None:
    """By the terms of each row's class, wherever it is."""
    logits, target = cases.random_case(6, 130)
    logits = cases.poison_ignored(logits, target)
    options = cases.options(option_set, 130, target)
    up = cases.upstreams((6,), torch.float32)["random"]
    wide = cases.operator_options(130, cases.to_float64(options))
    loss, stats, grad = fallback.softmax_loss_and_grad(up.double(), logits.double(), target, *wide)
    for sizes, inplace in (([70, 60], False), ([1, 129], True)):
        with longtail.use_backend("triton"):
            got_stats, got_loss, got_grad = run_shards(logits, target, up, sizes, options, inplace)
        assert_close(got_stats, stats, what="stats", factor=8)
        assert_close(got_loss, loss, what="loss", factor=4)
        assert_close(got_grad, grad, what="gradient", factor=4)


@interpreted
def test_terms_stand_in_for_the_class() -> None:
    """Those of a row's own class change no bit; others are taken before it."""
    logits, target = cases.random_case(5, 130, ignore=False)
    options = cases.options("tail_linear", 130, target)
    vectors = [options.get(name) for name in VECTORS]
    tail = (cases.IGNORE, True, *numbers(options))
    x = (logits * 0.7).gather(1, target[:, None])[:, 0] * options["class_scale"][target]
    x = x * options["target_scale"][target] + options["class_bias"][target]
    terms = torch.stack([options["target_scale"][target], options["class_mitigation"][target], x], 1)
    own = shard.softmax_loss_accumulate(logits, target, *vectors, None, *tail)
    assert_same(shard.softmax_loss_accumulate(logits, target, *vectors, terms, *tail), own)
    nothing = torch.tensor([1.0, -torch.inf, torch.inf]).repeat(5, 1)
    bare = {name: options[name] for name in ("class_bias", "class_margin", "class_scale", "scale")}
    assert_same(
        shard.softmax_loss_accumulate(logits, target, *vectors, nothing, *tail), accumulate(logits, target, bare, True)
    )


@interpreted
@pytest.mark.parametrize("classes", [3, 127, 4099])
def test_given_terms(classes: int) -> None:
    """Also of a row whose class is elsewhere: what its U is relative to is the first class with the terms' share."""
    logits, target = shard_case(classes)
    options = cases.options("mixed_tail", classes, target)
    terms = torch.randn(6, 3, generator=cases.generator(3))
    terms[3:, 2] -= 2.0
    vectors = [options[name] for name in VECTORS]
    row_grad = torch.randn(6, 5, generator=cases.generator(2)) + torch.tensor([20.0, 0.0, 0.0, 0.0, 0.0])
    tail = (terms, cases.IGNORE, True, *numbers(options))
    for operator, data in (
        ("accumulate", (logits, target, *vectors, *tail)),
        ("apply", (logits, target, row_grad, *vectors[:2], *vectors[3:], *tail[:2], *tail[3:])),
    ):
        wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in data]
        found, truth, eager = (
            getattr(of, f"softmax_loss_{operator}")(*values)
            for of, values in ((shard, data), (fallback, wide), (fallback, data))
        )
        assert_close(found, truth, eager, what=operator, factor=4)


@interpreted
def test_none_of_the_classes() -> None:
    target = torch.tensor([ELSEWHERE, cases.IGNORE])
    z, vectors = torch.zeros(2, 0), [torch.zeros(0)] * 5
    stats = shard.softmax_loss_accumulate(z, target, *vectors, None, None, cases.IGNORE, True, 1.0, 0.0, 0.6)
    assert stats.tolist() == [[-torch.inf, 0.0, 0.0, 0.0, 0.0], [0.0] * 5]
    assert shard.softmax_loss_apply(z, target, stats, *vectors, None, cases.IGNORE, 1.0, 0.0, 0.6).shape == z.shape


@interpreted
def test_wrong_arguments_raise() -> None:
    logits, target, row_grad = torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), torch.zeros(3, 5)
    none, few = (None,) * 6, torch.ones(4)
    tail, numbers = (None, cases.IGNORE, False, 1.0, 0.0, 0.0), (cases.IGNORE, 1.0, 0.0, 0.0)
    terms = (torch.zeros(3, 2), torch.zeros(2, 3), torch.zeros(3, 3).double(), torch.zeros(3, 6)[:, ::2])
    wrong = [
        lambda: shard.softmax_loss_accumulate(logits, target[1:], *none, *tail),
        lambda: shard.softmax_loss_accumulate(logits[None], target, *none, *tail),
        *(
            lambda i=i: shard.softmax_loss_accumulate(logits, target, *none[:i], few, *none[i + 1 :], *tail)
            for i in range(6)
        ),
        *(lambda t=t: shard.softmax_loss_accumulate(logits, target, *none, t, *tail[1:]) for t in terms),
        lambda: shard.softmax_loss_accumulate(logits, target + 5, *none, *tail),
        lambda: shard.softmax_loss_accumulate(logits, target - 2, *none, *tail),
        lambda: shard.softmax_loss_apply(logits, target, row_grad[:, :4], *none, *numbers),
        lambda: shard.softmax_loss_apply(logits, target, row_grad[1:], *none, *numbers),
        *(lambda t=t: shard.softmax_loss_apply_(logits, target, row_grad, *none[1:], t, *numbers) for t in terms),
    ]
    for call in wrong:
        with pytest.raises(RuntimeError, match="longtail"):
            call()


@starts_it
def test_in_a_process_of_its_own() -> None:
    rerun(Path(__file__), Path(__file__).with_name("test_target_terms.py"))
