"""Promise: the CUDA kernels of hierarchical cross-entropy stay within their memory, miss no barrier and need each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from batches import one_thread
from emulation import build, harness
from emulation.plans import HIERARCHICAL_REGIMES, launches
from hierarchical_batches import HierarchicalBatch

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")


@pytest.fixture(scope="module", autouse=True)
def _started() -> Iterator[None]:
    for flavour in ("thread", "address"):
        build.objects(flavour)
    with one_thread():
        yield


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


def test_every_barrier_is_missed_where_it_is_not(tmp_path: Path) -> None:
    """One block for all rows: what one leaves in shared memory is there at the next."""
    requests = [one.otherwise() for one in launches(batch("block", (6, 300), 3, True))]
    met = harness.run_apart(build.linked("thread"), requests, tmp_path)
    assert len(met) == 5
    for barrier in met:
        with pytest.raises(harness.LaunchFailed, match="data race"):
            harness.run_apart(build.linked("thread"), requests, tmp_path, EMULATION_UNORDERED=barrier)
