"""Promise: a loss over classes shared out among ranks is the loss of the whole, bit for bit the same on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cases
import rank_cases
from ranks import Ranks

SHARDS = {2: [5, 8], 3: [4, 0, 9], 4: [1, 6, 0, 4]}


def check(ranks: Ranks, sizes: list[int], *args: Any, **named: Any) -> None:
    """Every rank finds its loss and gradient right, and all have the same bits."""
    results = ranks.run(len(sizes), rank_cases.cross_entropy_case, sizes, *args, **named)
    assert len(set(results)) == 1, results


@pytest.mark.parametrize("odd", [torch.inf, torch.nan])
@pytest.mark.parametrize("gradient", cases.MODES)
def test_a_weight_of_no_target_has_no_say(ranks: Ranks, gradient: str, odd: float) -> None:
    _, target = cases.random_case(7, 13, seed=7)
    absent = min(set(range(13)) - set(target.tolist()))
    weight = torch.rand(13, generator=cases.generator(1), dtype=torch.float64) + 0.5
    weight[absent] = odd
    for option_set in ("plain", "complement"):
        for local_vectors in (False, True):
            extra = {"weight": weight}
            check(ranks, SHARDS[2], option_set, local_vectors=local_vectors, gradient=gradient, extra=extra)


def test_ranges_in_any_order(ranks: Ranks) -> None:
    check(ranks, [4, 0, 9], "mixed", order=[2, 1, 0])
    for option_set in ("smoothing_weight", "mixed_tail"):
        check(ranks, [2, 3, 4, 5], option_set, order=[3, 0, 2, 1], local_vectors=True)


def test_all_targets_on_one_rank(ranks: Ranks) -> None:
    for owner in (0, 2):
        check(ranks, SHARDS[3], "mixed", one_owner=owner)


@pytest.mark.parametrize("option_set", ["vector_scaling", "target_scale", "mitigation", "seesaw"])
def test_class_vectors_of_all_classes_and_of_a_ranks_own_make_the_same_bits(ranks: Ranks, option_set: str) -> None:
    found = [
        ranks.run(3, rank_cases.cross_entropy_case, SHARDS[3], option_set, dtype=torch.float32, local_vectors=local)
        for local in (False, True)
    ]
    assert len(set(found[0] + found[1])) == 1, found


@pytest.mark.parametrize("option_set", ["target_scale", "seesaw", "mixed_tail"])
@pytest.mark.parametrize("local", [False, True], ids=["full", "local"])
def test_infinite_and_saturated_logits(ranks: Ranks, local: bool, option_set: str) -> None:
    for gradient in ("backward", "inplace"):
        results = ranks.run(3, rank_cases.saturated_case, [3, 0, 4], option_set, local, gradient)
        assert len(set(results)) == 1, results


def test_one_rank(ranks: Ranks) -> None:
    check(ranks, [13], "mixed")


@pytest.mark.parametrize("world", [2, 3])
def test_counts_over_ranks(ranks: Ranks, world: int) -> None:
    ranks.run(world, rank_cases.counting)


@pytest.mark.parametrize("name", ["sample_weight", *rank_cases.VECTORS])
@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_constants_that_change_before_backward(ranks: Ranks, kind: str, name: str) -> None:
    """An error, as in one process; and nothing holds them longer than the gradient needs them."""
    for text in ranks.run(2, rank_cases.constants_that_change, kind, name):
        assert "modified by an inplace operation" in text


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gradient", ["backward", "forward"])
@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_under_checkpoint(ranks: Ranks, kind: str, gradient: str, reentrant: bool) -> None:
    ranks.run(2, rank_cases.checkpointed, kind, gradient, reentrant)
