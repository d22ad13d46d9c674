"""Promise: the CUDA kernels of ZLPR and the two-way loss stay within their memory, miss no barrier and need each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from emulation import build, harness
from emulation.plans import SIGMOID_PIXELS, SIGMOID_REGIMES, launches
from two_way_cases import TwoWayBatch

pytestmark = [pytest.mark.skipif(build.COMPILER is None, reason="needs g++"), pytest.mark.usefixtures("sanitizers")]


def batches() -> Iterable[TwoWayBatch]:
    layouts = zip(harness.STORAGES, ("contiguous", "offset", "row_stride"), strict=True)
    for i, (dtype, layout) in enumerate(layouts):
        for kind in ("class", "soft"):
            for name, shape in (("lanes", (5, 31 + i)), ("block", (3, 603 + i)), ("cluster_2", (2, 140))):
                yield TwoWayBatch.of(SIGMOID_REGIMES[name], shape, kind, "two_way_vectors", dtype, layout=layout)
            for name, shape in (("warps", (2, 9, 40)), ("single_pixels_spread", (2, 9, 19 + i))):
                yield TwoWayBatch.of(SIGMOID_PIXELS[name], shape, kind, "two_way_vectors", dtype)


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_nothing_is_found(flavour: str, tmp_path: Path) -> None:
    chosen = list(batches())[:: 1 if flavour == "address" else 4]
    requests = [one.otherwise() for each in chosen for one in launches(each)]
    harness.run_apart(build.linked(flavour), requests, tmp_path)
    for each in chosen:
        each.check()


def test_every_barrier_is_missed_where_it_is_not(tmp_path: Path) -> None:
    """One block for all tiles of pixels: what one leaves in shared memory is there at the next."""
    batch = TwoWayBatch.of(SIGMOID_PIXELS["warps"], (2, 9, 512), "class", "two_way")
    requests = [one.otherwise() for one in launches(batch)]
    met = [x for x in harness.run_apart(build.linked("thread"), requests, tmp_path) if "two_way" in x]
    assert len(met) == 3
    for barrier in met:
        with pytest.raises(harness.LaunchFailed, match="data race"):
            harness.run_apart(build.linked("thread"), requests, tmp_path, EMULATION_UNORDERED=barrier)
