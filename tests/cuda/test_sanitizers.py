"""Promise: the CUDA kernels stay within their memory and miss no barrier, seen by sanitizers, that see planted faults.

Every barrier of the kernels is taken away once: each must be missed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cases
import sigmoid_cases
from batches import Batch, ProbabilityBatch, SigmoidBatch, SoftmaxBatch, probability_case, random_case
from emulation import build, harness
from emulation.plans import (
    SIGMOID_PIXELS,
    SIGMOID_REGIMES,
    Plans,
    in_warp,
    kept,
    launches,
    over_pixels,
    swept,
)

pytestmark = [pytest.mark.skipif(build.COMPILER is None, reason="needs g++"), pytest.mark.usefixtures("sanitizers")]
# A text of the kernels -> what takes its place, in a copy: each is a fault of its kind.
FAULTS = {
    "beyond the row": ("block_rows.cuh", "edge = classes - tail + thread", "edge = classes + 1 - tail + thread"),
    "misaligned": ("vectors.cuh", "(16 - past) % 16 /", "0 * past /"),
}  # fmt: skip


def batch(
    plans: Plans,
    classes: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    rows: int = 6,
    option_set: str = "mixed_tail",
) -> Batch:
    logits, target = random_case((rows, classes), dtype)
    return SoftmaxBatch(plans, (logits, target), cases.options(option_set, classes, target, dtype), layout=layout)


def image_batch(
    plans: Plans, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, option_set: str = "plain"
) -> Batch:
    logits, target = random_case(shape, dtype)
    return SoftmaxBatch(plans, (logits, target), cases.options(option_set, shape[1], target, dtype))


def image_batches() -> Iterable[Batch]:
    for dtype in harness.STORAGES:
        for option_set in ("plain", "mixed", "mixed_tail"):
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
        for classes in (31, 1000, 5001):  # of these, whole chunks in few threads alone
            for dtype in harness.STORAGES:
                yield batch(plans, classes, dtype, "offset", 3, "plain")
    for dtype in harness.STORAGES:
        for option_set in ("plain", "mixed_tail"):
            yield batch(in_warp(32, vector=True, batch=4), 128, dtype, option_set=option_set)
            yield batch(in_warp(8, batch=8), 101, dtype, "offset", option_set=option_set)
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
    "warp": lambda: batch(in_warp(32, vector=True, batch=4), 100),
    "part_of_a_warp": lambda: batch(in_warp(8, batch=8), 100, torch.float16),
    "plain": lambda: batch(swept(2, threads=32), 5001, torch.bfloat16, "offset", option_set="plain"),
    "plain_kept": lambda: batch(kept(2, threads=32), 3001, layout="offset", option_set="plain"),
    "plain_warp": lambda: batch(in_warp(8, vector=True, batch=2), 64, torch.float16, option_set="plain"),
    "images": lambda: image_batch(over_pixels(8), (2, 19, 72), option_set="mixed_tail"),
    "images_kept": lambda: image_batch(over_pixels(8, kept=True), (2, 19, 72), torch.bfloat16),
    "single_pixels": lambda: image_batch(over_pixels(32, vector=False), (3, 19, 35), torch.float16),
}


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
    requests = [one.otherwise() for one in launches(chosen)]
    met = harness.run_apart(build.linked("thread"), requests, folder, **environment)
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
    requests = [one for b in batches for one in launches(b)]
    for dtype in harness.STORAGES:
        for classes, layout in ((1, "row_stride"), (33, "contiguous"), (333, "offset"), (5000, "offset")):
            grad = cases.LAYOUTS[layout](torch.ones(3, classes, dtype=dtype))
            requests += [harness.scaling(grad, torch.rand(3), processors) for processors in (1, 132)]
        for shape in ((2, 5, 16), (3, 70, 7)):
            grad = torch.ones(shape, dtype=dtype)
            requests += [harness.scaling(grad, torch.rand(shape[0] * shape[2]), processors) for processors in (1, 132)]
    harness.run_apart(build.linked("address"), requests, tmp_path)
    for one in batches:
        one.check()


def test_a_row_that_is_not_to_be_read_is_guarded(tmp_path: Path) -> None:
    """As ignored rows are in all runs under AddressSanitizer."""
    seen = batch(swept(), 300)
    hidden = {"EMULATION_HIDDEN": str(int(seen.target[0]))}
    with pytest.raises(harness.LaunchFailed, match="use-after-poison"):
        harness.run_apart(build.linked("address"), launches(seen)[:1], tmp_path, **hidden)


@pytest.mark.parametrize(
    ("fault", "report"), [("beyond the row", "heap-buffer-overflow"), ("misaligned", "misaligned")]
)
def test_planted_faults_are_seen(planted: dict[str, Path], tmp_path: Path, fault: str, report: str) -> None:
    broken = batch(swept(), 301, layout="offset", rows=1)
    with pytest.raises(harness.LaunchFailed, match=report):
        harness.run_apart(build.linked("address", planted=planted[fault]), launches(broken)[:1], tmp_path)
    harness.run_apart(build.linked("address"), launches(broken)[:1], tmp_path)


def sigmoid_batch(
    plans: Plans, shape: tuple[int, ...], kind: str, option_set: str, elementwise: bool,
    dtype: torch.dtype = torch.float32, layout: str = "contiguous",
) -> Batch:  # fmt: skip
    logits, target = sigmoid_cases.random_case(shape, kind, dtype)
    case = sigmoid_cases.poisoned(logits, target), target
    return SigmoidBatch(plans, case, sigmoid_cases.options(option_set, logits), elementwise, layout=layout)


def sigmoid_rows() -> Iterator[Batch]:
    for name in ("lanes", "block", "cluster_2", "single_elements"):
        plans = SIGMOID_REGIMES[name]
        for kind in ("class", "soft"):
            for i, dtype in enumerate(harness.STORAGES):
                layout = ("contiguous", "offset", "row_stride")[i]
                yield sigmoid_batch(plans, (5, 123 + i), kind, "mixed", False, dtype, layout)
                yield sigmoid_batch(plans, (3, 64), kind, "mixed", True, dtype)


def sigmoid_images() -> Iterator[Batch]:
    for name in ("along", "in_a_warp", "warps", "single_pixels_spread"):
        plans = SIGMOID_PIXELS[name]
        for kind in ("class", "soft"):
            for i, dtype in enumerate(harness.STORAGES):
                layout = ("contiguous", "class_stride", "offset")[i]
                yield sigmoid_batch(plans, (2, 5 + i, 35), kind, "mixed", False, dtype, layout)
                yield sigmoid_batch(plans, (2, 3, 64), kind, "mixed", i == 1, dtype, "whole_vectors_apart")


# What is asked for beside a focal loss with one exponent; the sum over a row's labels takes barriers of its own.
GENERAL = {"alpha": None, "gamma": 1.0, "gamma_negative": 4.0, "clip": 0.05, "rebalance_beta": 10.0}
GENERAL_VECTORS = ("weight", "pos_weight", "class_bias", "class_alpha", "class_gamma", "inverse_counts")


def sigmoid_general() -> Iterator[Batch]:
    rows = [(SIGMOID_REGIMES[name], (5, 123)) for name in ("cluster_2", "lanes", "block", "single_elements")]
    pixels = [(SIGMOID_PIXELS[name], (3, 6, 96)) for name in ("warps", "along", "in_a_warp", "single_pixels_spread")]
    for plans, shape in (*rows, *pixels):
        for i, dtype in enumerate(harness.STORAGES):
            logits, target = sigmoid_cases.random_case(shape, ("soft", "class", "hard")[i], dtype)
            vectors = {name: torch.rand(shape[1]) + 0.1 for name in GENERAL_VECTORS}
            case = sigmoid_cases.poisoned(logits, target), target
            layout = ("contiguous", "offset", "contiguous")[i]
            yield SigmoidBatch(plans, case, {**GENERAL, **vectors}, i == 1, layout=layout)


def probability_rows() -> Iterator[Batch]:
    for name in ("lanes", "block", "cluster_2", "single_elements"):
        for i, dtype in enumerate(harness.STORAGES):
            layout, target_dtype = ("contiguous", "offset", "row_stride")[i], (dtype, torch.float32, dtype)[i]
            for option_set, classes in (("plain", 1), ("all_of_probabilities", 123 + i), ("plain", 1000)):
                case = probability_case((5, classes), dtype, target_dtype)
                options = cases.options(option_set, classes, case[1][:, 0])
                yield ProbabilityBatch(SIGMOID_REGIMES[name], case, options, layout=layout, target_layout=layout)


@pytest.mark.parametrize("flavour", ["address", "thread"])
@pytest.mark.parametrize(
    ("batches", "few"),
    [
        (sigmoid_rows, slice(0, None, 3)),
        (sigmoid_images, slice(1, None, 4)),
        (sigmoid_general, slice(0, None, 3)),
        (probability_rows, slice(1, None, 3)),
    ],
)
def test_nothing_is_found_where_every_class_has_a_target(
    batches: Callable[[], Iterable[Batch]], few: slice, flavour: str, tmp_path: Path
) -> None:
    chosen = list(batches())[slice(None) if flavour == "address" else few]
    requests = [one.otherwise() for b in chosen for one in launches(b)]
    harness.run_apart(build.linked(flavour), requests, tmp_path)
    for one in chosen:
        one.check()


def test_nothing_is_read_where_nothing_counts(tmp_path: Path) -> None:
    """Far more classes than the logits have: AddressSanitizer sees whoever looks for them."""
    for counted in (False, True):
        target = torch.full((1, 64), cases.IGNORE)
        target[0, 9] = 0 if counted else cases.IGNORE
        options = {"alpha": None, "gamma": 0.0}
        one = launches(SigmoidBatch(SIGMOID_PIXELS["along"], (torch.zeros(1, 3, 64), target), options, False))[0]
        beyond = replace(one, fields={**one.fields, "num_classes": 1000})
        if counted:
            with pytest.raises(harness.LaunchFailed, match="heap-buffer-overflow"):
                harness.run_apart(build.linked("address"), [beyond], tmp_path)
        else:
            harness.run_apart(build.linked("address"), [beyond], tmp_path)
            assert torch.equal(one.fields["loss"], torch.zeros(64))


@pytest.mark.parametrize("place", [0, 12])
def test_every_barrier_of_label_sums_is_missed_where_it_is_not(place: int, tmp_path: Path) -> None:
    """Over a cluster's rows and over groups of threads that share pixels."""
    chosen = list(sigmoid_general())[place]
    requests = [one.otherwise() for one in launches(chosen)[1:2]]  # the gradient alone: no other sums
    met = harness.run_apart(build.linked("thread"), requests, tmp_path)
    assert len(met) >= 2
    seen = []
    for barrier in met:
        try:
            harness.run_apart(build.linked("thread"), requests, tmp_path, EMULATION_UNORDERED=barrier)
        except harness.LaunchFailed as error:
            seen.append("data race" in str(error))
    assert len(seen) >= 2
    assert all(seen)


def test_both_barriers_over_pixels_are_missed_where_they_are_not(tmp_path: Path) -> None:
    """One before the groups' sums are added, one before the next pixels' are written."""
    chosen = sigmoid_batch(SIGMOID_PIXELS["warps"], (3, 9, 256), "class", "focal", False)
    requests = [one.otherwise() for one in launches(chosen)[:1]]
    met = harness.run_apart(build.linked("thread"), requests, tmp_path)
    assert len(met) == 2
    for barrier in met:
        with pytest.raises(harness.LaunchFailed, match="data race"):
            harness.run_apart(build.linked("thread"), requests, tmp_path, EMULATION_UNORDERED=barrier)
