"""Promise: over shared-out classes row statistics are those of the whole, and states (B, L, D) are rows there too."""

from __future__ import annotations

from typing import Any

import pytest

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
