"""Promise: the CUDA kernels stay within their memory and miss no barrier, seen by sanitizers, that see planted faults.

Every barrier of the kernels is taken away once: each must be missed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import cases
from emulation import build, harness
from emulation.image_numerics import ImageBatch, over_pixels
from emulation.numerics import Batch, Plans, in_warp, kept, one_thread, swept

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")
# A text of the kernels -> what takes its place, in a copy: each is a fault of its kind.
FAULTS = {
    "beyond the row": ("block_rows.cuh", "edge = classes - tail + thread", "edge = classes + 1 - tail + thread"),
    "misaligned": ("vectors.cuh", "(16 - past) % 16 /", "0 * past /"),
}  # fmt: skip


def batch(
    plans: Plans, classes: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", rows: int = 6
) -> Batch:
    logits, target = cases.random_case(rows, classes, dtype)
    options = cases.options("mixed", classes, target, dtype)
    return Batch(plans, (cases.poison_ignored(logits, target), target), options, layout=layout)


def image_batch(
    plans: Plans, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, option_set: str = "plain"
) -> Batch:
    n, classes, pixels = shape
    logits, target = cases.random_case(n * pixels, classes, dtype)
    case = cases.poison_ignored(logits, target), target
    return ImageBatch(plans, case, cases.options(option_set, classes, target, dtype), shape)


def image_batches() -> Iterable[Batch]:
    for dtype in harness.STORAGES:
        for option_set in ("plain", "mixed"):
            for plans in (over_pixels(8), over_pixels(16, kept=True)):
                for shape in ((2, 1, 8), (3, 7, 16), (1, 70, 24)):
                    yield image_batch(plans, shape, dtype, option_set)
            for plans in (over_pixels(32, vector=False), over_pixels(32, vector=False, kept=True)):
                for shape in ((2, 2, 1), (3, 7, 5), (1, 70, 33)):
                    yield image_batch(plans, shape, dtype, option_set)


def address_batches() -> Iterable[Batch]:
    yield from image_batches()
    regimes = (swept(), swept(2), swept(4), swept(16, threads=32), kept(), kept(2), kept(16), swept(2, vector=False))
    for plans in regimes:
        for classes, layout in (
            (1, "offset"),
            (3, "contiguous"),
            (31, "row_stride"),
            (333, "offset"),
            (1000, "offset"),
        ):
            for dtype in harness.STORAGES:
                yield batch(plans, classes, dtype, layout, rows=3)
    for dtype in harness.STORAGES:
        yield batch(in_warp(32, vector=True), 128, dtype)
        yield batch(in_warp(8), 101, dtype, "offset")
        yield batch(in_warp(32), 1, dtype, "row_stride")


# Few teams of blocks for their rows: what one row leaves in shared memory is there at the next.
THREAD_BATCHES = {
    "block": lambda: batch(swept(), 300),
    "cluster_2": lambda: batch(swept(2), 301, layout="row_stride"),
    "cluster_4": lambda: batch(swept(4, threads=32), 300, torch.bfloat16),
    "kept_1": lambda: batch(kept(), 301, torch.bfloat16, "offset"),
    "kept_2": lambda: batch(kept(2), 300),
    "kept_4": lambda: batch(kept(4, threads=32), 300, torch.float16, "offset"),
    "single_elements": lambda: batch(swept(2, vector=False), 100),
    "warp": lambda: batch(in_warp(32, vector=True), 100),
    "part_of_a_warp": lambda: batch(in_warp(8), 100, torch.float16),
    "images": lambda: image_batch(over_pixels(8), (2, 19, 72), option_set="mixed"),
    "images_kept": lambda: image_batch(over_pixels(8, kept=True), (2, 19, 72), torch.bfloat16),
    "single_pixels": lambda: image_batch(over_pixels(32, vector=False), (3, 19, 35), torch.float16),
}


@pytest.fixture(scope="module", autouse=True)
def _started() -> Iterator[None]:
    for flavour in ("thread", "address"):
        build.objects(flavour)
    with one_thread():
        yield


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of kernels with one fault each; they begin to compile."""
    folders = {}
    for fault, (name, text, replacement) in FAULTS.items():
        folder = tmp_path_factory.mktemp("planted")
        shutil.copytree(build.KERNELS.parent, folder / "csrc", ignore=shutil.ignore_patterns("cpu"))
        path = folder / "csrc" / "cuda" / name
        before = path.read_text()
        assert before.count(text) == 1, f"{name} no longer has what is to be broken: {text}"
        path.write_text(before.replace(text, replacement))
        folders[fault] = path.parent
        build.objects("address", planted=path.parent)
    return folders


def races(name: str, folder: Path, **environment: str) -> set[str]:
    """All passes of a batch under ThreadSanitizer, which raises if there is a race. The barriers that were met."""
    chosen = THREAD_BATCHES[name]()
    launches = [one.otherwise() for one in chosen.launches()]
    met = harness.run_apart(build.linked("thread"), launches, folder, **environment)
    chosen.check()
    return set(met)


@pytest.mark.parametrize("name", THREAD_BATCHES)
def test_no_race(name: str, tmp_path: Path) -> None:
    races(name, tmp_path)


def test_every_barrier_is_missed_where_it_is_not(tmp_path: Path) -> None:
    """Without its ordering of memory there is a race; those without one hold blocks back until all have started."""
    met = {name: races(name, tmp_path) for name in ("block", "cluster_2", "kept_1", "kept_2", "warp", "images")}
    barriers = set().union(*met.values())
    assert len(barriers) >= 4

    def missed(barrier: str) -> bool:
        where = next(name for name in met if barrier in met[name])
        folder = tmp_path / barrier
        folder.mkdir()
        try:
            races(where, folder, EMULATION_UNORDERED=barrier)
        except harness.LaunchFailed as error:
            return "data race" in str(error)
        return False

    with ThreadPoolExecutor(2) as pool:
        others = [barrier for barrier, seen in zip(barriers, pool.map(missed, barriers), strict=True) if not seen]
    with pytest.raises(harness.LaunchFailed, match="a block that has not started"):
        races("cluster_2", tmp_path, EMULATION_SKIPPED=" ".join(others))


def test_nothing_beyond_its_memory(tmp_path: Path) -> None:
    batches = list(address_batches())
    launches = [one for b in batches for one in b.launches()]
    for dtype in harness.STORAGES:
        for classes, layout in ((1, "row_stride"), (333, "offset"), (5000, "offset")):
            grad = cases.LAYOUTS[layout](torch.ones(3, classes, dtype=dtype))
            launches += [harness.scaling(grad, torch.rand(3), processors) for processors in (1, 132)]
        for shape in ((2, 5, 16), (3, 70, 7)):
            grad = torch.ones(shape, dtype=dtype)
            launches += [harness.scaling(grad, torch.rand(shape[0] * shape[2]), processors) for processors in (1, 132)]
    harness.run_apart(build.linked("address"), launches, tmp_path)
    for one in batches:
        one.check()


def test_a_row_that_is_not_to_be_read_is_guarded(tmp_path: Path) -> None:
    """As ignored rows are in all runs under AddressSanitizer."""
    seen = batch(swept(), 300)
    hidden = {"EMULATION_HIDDEN": str(int(seen.target[0]))}
    with pytest.raises(harness.LaunchFailed, match="use-after-poison"):
        harness.run_apart(build.linked("address"), seen.launches()[:1], tmp_path, **hidden)


@pytest.mark.parametrize(
    ("fault", "report"), [("beyond the row", "heap-buffer-overflow"), ("misaligned", "misaligned")]
)
def test_planted_faults_are_seen(planted: dict[str, Path], tmp_path: Path, fault: str, report: str) -> None:
    broken = batch(swept(), 301, layout="offset", rows=1)
    with pytest.raises(harness.LaunchFailed, match=report):
        harness.run_apart(build.linked("address", planted=planted[fault]), broken.launches()[:1], tmp_path)
    harness.run_apart(build.linked("address"), broken.launches()[:1], tmp_path)
