"""Promise: the linear loss over shared-out classes is that of the whole: loss, gradients, and the loss's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cases
import rank_cases
from ranks import Ranks

SHARDS = {2: [5, 8], 3: [4, 0, 9], 4: [1, 6, 0, 4]}


def check(ranks: Ranks, sizes: list[int], *args: Any, **named: Any) -> None:
    results = ranks.run(len(sizes), rank_cases.linear_case, sizes, *args, **named)
    assert len(set(results)) == 1, results


@pytest.mark.parametrize("gradient", ["auto", "backward"])
@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
def test_every_option(ranks: Ranks, option_set: str, gradient: str) -> None:
    check(ranks, SHARDS[3], option_set, gradient=gradient)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence"])
@pytest.mark.parametrize("world", SHARDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_worlds(ranks: Ranks, reduction: str, world: int, sequence_parallel: bool) -> None:
    for option_set in ("plain", "mixed"):
        check(ranks, SHARDS[world], option_set, reduction=reduction, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=cases.name)
def test_dtypes(ranks: Ranks, dtype: torch.dtype, sequence_parallel: bool) -> None:
    for reduction in ("mean", "none"):
        check(ranks, SHARDS[2], "smoothing_weight", dtype, reduction, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=cases.name)
def test_class_vectors_of_the_local_classes(ranks: Ranks, dtype: torch.dtype) -> None:
    for gradient in ("auto", "backward"):
        for option_set in ("weight", "smoothing_weight"):
            check(ranks, SHARDS[3], option_set, dtype, local_vectors=True, gradient=gradient)


@pytest.mark.parametrize("chunk_size", [1, 5, 24, 100, None])
def test_chunks(ranks: Ranks, chunk_size: int | None) -> None:
    for sequence_parallel in (False, True):
        check(ranks, SHARDS[2], "mixed", chunk_size=chunk_size, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("rows", [0, 2])
def test_few_rows(ranks: Ranks, rows: int) -> None:
    for sequence_parallel in (False, True):
        check(ranks, SHARDS[2], "mixed", rows=rows, reduction="sum", sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("trains", ["", "i", "w", "b", "wb"])
def test_what_needs_no_gradient(ranks: Ranks, trains: str) -> None:
    for gradient in ("auto", "backward"):
        check(ranks, SHARDS[2], "focal", trains=trains, gradient=gradient)
    if "b" not in trains:
        check(ranks, SHARDS[2], "focal", trains=trains, bias=False)
