"""Promise: the linear loss over shared-out classes is that of the whole: loss, gradients, and the loss's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence"])
def test_one_chunk_where_it_takes_less_memory(ranks: Ranks, sequence_parallel: bool) -> None:
    """By a GPU's plan: 2 N C bytes of bfloat16 logits, and 4 C D of a total; D is 10."""
    for rows, totals in ((20, [torch.bfloat16]), (24, [torch.float32] * 4)):
        given = {"dtype": torch.bfloat16, "rows": rows, "sequence_parallel": sequence_parallel}
        assert ranks.run(2, rank_cases.linear_totals, SHARDS[2], **given) == [totals] * 2
    float32 = ranks.run(2, rank_cases.linear_totals, SHARDS[2], dtype=torch.float32, rows=20)
    assert float32 == [[torch.float32] * 4] * 2


@pytest.mark.parametrize("trains", ["", "i", "w", "b", "wb"])
def test_what_needs_no_gradient(ranks: Ranks, trains: str) -> None:
    for gradient in ("auto", "backward"):
        check(ranks, SHARDS[2], "focal", trains=trains, gradient=gradient)
    if "b" not in trains:
        check(ranks, SHARDS[2], "focal", trains=trains, bias=False)
