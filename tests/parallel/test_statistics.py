"""Promise: over shared-out classes row statistics are those of the whole, and states (B, L, D) are rows there too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rank_cases_statistics
from ranks import Ranks

SHARDS = {2: [5, 8], 4: [1, 6, 0, 4]}


def check(ranks: Ranks, case: Any, sizes: list[int], *args: Any, **named: Any) -> None:
    """Every rank finds its results right, and all have the same bits of what they share."""
    results = ranks.run(len(sizes), case, sizes, *args, **named)
    assert len(set(results)) == 1, results


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence"])
def test_leading_dimensions(ranks: Ranks, sequence_parallel: bool) -> None:
    for world, shift, reduction in ((2, False, "none"), (2, True, "mean"), (4, True, "none")):
        check(ranks, rank_cases_statistics.leading_case, SHARDS[world], sequence_parallel, shift, reduction)


@pytest.mark.parametrize("gradient", ["backward", "inplace"])
def test_of_local_logits(ranks: Ranks, gradient: str) -> None:
    for sizes, dtype, own in (
        ([5, 8], torch.float64, False),
        ([5, 8], torch.float32, True),
        ([4, 0, 9], torch.bfloat16, False),
        ([1, 6, 0, 4], torch.float64, True),
    ):
        case = rank_cases_statistics.logits_case
        check(ranks, case, sizes, dtype=dtype, gradient=gradient, own_vectors=own)
    check(ranks, case, [2, 3, 4, 5], order=[3, 0, 2, 1], gradient=gradient)
    check(ranks, case, [13], gradient=gradient)
    check(ranks, case, [5, 8], gradient=gradient, tail=True)
    check(ranks, case, [4, 0, 9], dtype=torch.float32, gradient=gradient, own_vectors=True, tail=True)
    check(ranks, case, [5, 8], rows=0, gradient=gradient)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence"])
def test_of_hidden_states(ranks: Ranks, sequence_parallel: bool) -> None:
    case = rank_cases_statistics.linear_case
    for world, named in (
        (2, {}),
        (2, {"shift": True, "chunk_size": None}),
        (2, {"trains": "w"}),
        (2, {"trains": ""}),
        (2, {"tail": True, "shift": True}),
        (4, {"dtype": torch.bfloat16, "trains": "iw"}),
    ):
        check(ranks, case, SHARDS[world], sequence_parallel, **named)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": 2.0}, "ranks disagree on temperature: 1.0 on rank 0, 2.0 on rank 1"),
    "negative": ({"temperature": -2.0}, "rank 1: temperature is -2.0"),
    "scale": ({"scale": 2.0}, "ranks disagree on scale"),
    "compensation": ({"compensation": 2.0}, "ranks disagree on compensation"),
    "num_classes": ({"class_bias": torch.zeros(3)}, "rank 1: class_bias has 3 elements"),
}


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_text_on_every_rank(ranks: Ranks, case: str, linear: bool) -> None:
    given, text = MISTAKES[case]
    results = ranks.run(2, rank_cases_statistics.mistaken, linear, **given)
    assert len(set(results)) == 1, results
    assert text in results[0][1]


def test_linear_mistakes(ranks: Ranks) -> None:
    for given, text in (({"shift": True}, "ranks disagree on"), ({"shift": 1}, "rank 1: shift is a int")):
        results = ranks.run(2, rank_cases_statistics.mistaken, True, **given)
        assert len(set(results)) == 1, results
        assert text in results[0][1]


@pytest.mark.parametrize("placed", ["c", "r", "f", "rc", "cf"])
def test_of_dtensors(ranks: Ranks, placed: str) -> None:
    for plain_target in (False, True):
        results = ranks.run(4 if len(placed) == 2 else 3, rank_cases_statistics.dtensor_case, placed, plain_target)
        assert len(set(results)) == 1, results


@pytest.mark.parametrize("placed", [("f", "r"), ("r", "r"), ("r", "f"), ("rf", "fr"), ("rr", "fr")], ids="-".join)
def test_of_dtensors_of_hidden_states(ranks: Ranks, placed: tuple[str, str]) -> None:
    world = 4 if len(placed[0]) == 2 else 3
    for shift, plain in ((False, False), (True, False), (True, True)):
        results = ranks.run(world, rank_cases_statistics.dtensor_linear_case, *placed, shift, plain)
        assert len(set(results)) == 1, results


def test_dtensor_mistakes(ranks: Ranks) -> None:
    for given, text in (
        ({"temperature": 2.0}, "ranks disagree on temperature"),
        ({"temperature": 0}, "rank 1: temperature is 0.0"),
        ({"gradient": "inplace"}, 'rank 1: gradient is "inplace"'),
    ):
        results = ranks.run(2, rank_cases_statistics.dtensor_refused, **given)
        assert len(set(results)) == 1, results
        assert text in results[0][1]
