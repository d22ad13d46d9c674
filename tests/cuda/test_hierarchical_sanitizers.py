"""Promise: the CUDA kernels of hierarchical cross-entropy stay within their memory, miss no barrier and need each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from emulation import build, harness
from emulation.plans import HIERARCHICAL_REGIMES, launches, shard_backward
from hierarchical_batches import HierarchicalBatch, tree
from hierarchical_shards import ShardedBatch

pytestmark = [pytest.mark.skipif(build.COMPILER is None, reason="needs g++"), pytest.mark.usefixtures("sanitizers")]


def batch(
    name: str, shape: tuple[int, int], depth: int, shuffled: bool, dtype: torch.dtype = torch.float32, layout: str = ""
) -> HierarchicalBatch:
    plans = HIERARCHICAL_REGIMES[name]
    return HierarchicalBatch.of(plans, shape, depth, shuffled, dtype, layout=layout or "contiguous")


def batches() -> Iterable[HierarchicalBatch]:
    layouts = zip(harness.STORAGES, ("contiguous", "offset", "row_stride"), strict=True)
    for i, (dtype, layout) in enumerate(layouts):
        for shuffled in (False, True):
            yield batch("one_warp", (3, 1), 1, shuffled, dtype, layout)
            yield batch("one_warp", (5, 31 + i), 2, shuffled, dtype, layout)
            yield batch("block", (3, 1003 + i), 8, shuffled, dtype, layout)
            yield batch("single_elements", (3, 123), 3, shuffled, dtype, layout)


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_nothing_is_found(flavour: str, tmp_path: Path) -> None:
    chosen = list(batches())[:: 1 if flavour == "address" else 3]
    requests = [one.otherwise() for each in chosen for one in launches(each)]
    harness.run_apart(build.linked(flavour), requests, tmp_path)
    for each in chosen:
        each.check()


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_nothing_is_found_in_shards(flavour: str, tmp_path: Path) -> None:
    """Also where another has the target, and where the gradient takes the place of the logits."""
    requests = []
    for name, sizes, layout in (("block", (130, 170), "offset"), ("single_elements", (0, 1, 32), "row_stride")):
        for shuffled in (False, True):
            plans, hierarchy = HIERARCHICAL_REGIMES[name], tree(sum(sizes), 3, shuffled)
            whole = ShardedBatch.cut(plans, hierarchy, sizes, 3, torch.bfloat16, layout=layout)
            whole.run()
            for shard in whole.shards():
                found = [*launches(shard)[:1], *shard_backward(shard, plans, whole.stats[0])]
                requests += [one.otherwise() for one in found]
    harness.run_apart(build.linked(flavour), requests, tmp_path)


def test_every_barrier_is_missed_where_it_is_not(tmp_path: Path) -> None:
    """One block for all rows: what one leaves in shared memory is there at the next."""
    requests = [one.otherwise() for one in launches(batch("block", (6, 300), 3, True))]
    met = harness.run_apart(build.linked("thread"), requests, tmp_path)
    assert len(met) == 5
    for barrier in met:
        with pytest.raises(harness.LaunchFailed, match="data race"):
            harness.run_apart(build.linked("thread"), requests, tmp_path, EMULATION_UNORDERED=barrier)
