"""Promise: the linear loss over shared-out classes is that of the whole: loss, gradients, and the loss's bits."""

from __future__ import annotations

from typing import Any

import pytest

import rank_cases
from ranks import Ranks

SHARDS = {2: [5, 8], 3: [4, 0, 9], 4: [1, 6, 0, 4]}


def check(ranks: Ranks, sizes: list[int], *args: Any, **named: Any) -> None:
    results = ranks.run(len(sizes), rank_cases.linear_case, sizes, *args, **named)
    assert len(set(results)) == 1, results


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence"])
@pytest.mark.parametrize("world", SHARDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_worlds(ranks: Ranks, reduction: str, world: int, sequence_parallel: bool) -> None:
    for option_set in ("plain", "mixed"):
        check(ranks, SHARDS[world], option_set, reduction=reduction, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("chunk_size", [1, 5, 24, 100, None])
def test_chunks(ranks: Ranks, chunk_size: int | None) -> None:
    for sequence_parallel in (False, True):
        check(ranks, SHARDS[2], "mixed", chunk_size=chunk_size, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("trains", ["", "i", "w", "b", "wb"])
def test_what_needs_no_gradient(ranks: Ranks, trains: str) -> None:
    for gradient in ("auto", "backward"):
        check(ranks, SHARDS[2], "focal", trains=trains, gradient=gradient)
    if "b" not in trains:
        check(ranks, SHARDS[2], "focal", trains=trains, bias=False)
