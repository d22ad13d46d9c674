"""Promise: the linear loss of DTensors is that of the whole tensors; the FSDP2 recipe trains as one process."""

from __future__ import annotations

from typing import Any

import pytest

import rank_cases_dtensor_linear
from ranks import Ranks

# input, weight: replicated, tensor parallel, sequence parallel, data parallel, and on a 2 x 2 mesh their mixtures.
PLACED = [("f", "f"), ("f", "r"), ("r", "r"), ("r", "f")]
PLACED_2D = [("rf", "fr"), ("rr", "fr"), ("rr", "ff"), ("fr", "rf"), ("ff", "fr")]


def check(ranks: Ranks, placed: tuple[str, str], *args: Any, **named: Any) -> None:
    world = 4 if len(placed[0]) == 2 else 3
    results = ranks.run(world, rank_cases_dtensor_linear.linear_case, *placed, *args, **named)
    assert len(set(results)) == 1, results


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("placed", [*PLACED, *PLACED_2D], ids="-".join)
def test_placements(ranks: Ranks, placed: tuple[str, str], reduction: str) -> None:
    for option_set in ("plain", "mixed"):
        check(ranks, placed, option_set, reduction)


def test_few_classes_and_rows(ranks: Ranks) -> None:
    check(ranks, ("f", "r"), "mixed", classes=2)
    check(ranks, ("r", "f"), "mixed", rows=2)
    check(ranks, ("rf", "fr"), "weight", rows=1)


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "features": ("c", "r", {}, "expected on one mesh dimension linear_weight Shard(0) (classes)"),
    "classes_twice": ("ff", "rr", {}, "expected on one mesh dimension"),
    "order": ("rr", "rf", {}, "comes last"),
    "uneven_sequence": ("r", "r", {"rows": 7}, "expected a multiple of the 3 ranks"),
    "plain_weight": ("r", "", {}, "linear_weight is a plain tensor"),
    "option": ("r", "f", {"softcap": -1.0}, "softcap is -1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(ranks: Ranks, case: str) -> None:
    *placed, changes, text = REFUSED[case]
    for result in ranks.run(
        4 if len(placed[0]) == 2 else 3, rank_cases_dtensor_linear.linear_refused, *placed, **changes
    ):
        assert text in result


def test_backward_passes_in_different_orders(ranks: Ranks) -> None:
    for results in ranks.run(3, rank_cases_dtensor_linear.backward_in_two_orders):
        assert all(kind == "RuntimeError" and "in different orders" in text for kind, text in results)


@pytest.mark.parametrize("world", [2, 4])
def test_fsdp2_recipe(ranks: Ranks, world: int) -> None:
    ranks.run(world, rank_cases_dtensor_linear.fsdp_recipe)
