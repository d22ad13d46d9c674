"""Promise: what the Triton launchers choose is plain Python, and `backends()` says why Triton is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from longtail.triton_kernels import tuning
from torch import Tensor

import cases
import longtail
from launches import Launches
from longtail.ops import dispatch, operators, plain
from longtail.ops import triton as triton_backend

H200 = 50 * 2**20 // 132
B200 = 126 * 2**20 // 148


@pytest.fixture(autouse=True)
def _fresh_answers() -> Iterator[None]:
    before, question = dict(dispatch._kernels), triton_backend.missing
    question.cache_clear()
    yield
    question.cache_clear()
    dispatch._kernels.clear()
    dispatch._kernels.update(before)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("classes", [1, 2, 3, 16, 17, 100, 127, 128, 512, 513, 1000, 1024, 1025, 4000, 4096])
def test_tiles_hold_whole_rows(classes: int, itemsize: int) -> None:
    for aligned in (True, False):
        tile = tuning.tile(classes, itemsize, (classes, classes), aligned)
        assert classes <= tile.block < max(2 * classes, 17)
        assert tile.block & (tile.block - 1) == tile.rows & (tile.rows - 1) == tile.warps & (tile.warps - 1) == 0
        assert tile.rows * tile.block <= 32 * tile.warps * tuning.PER_THREAD
        wide = aligned and (classes >= tuning.EDGE_CLASSES or classes % (16 // itemsize) == 0)
        assert tile.vec == (16 // itemsize if wide else 1)
        assert tile.edges == (classes % tile.vec != 0)


def test_short_rows_share_a_program() -> None:
    assert tuning.tile(10, 2, (10,), True).rows >= tuning.tile(100, 2, (100,), True).rows > 1
    assert tuning.tile(1000, 2, (1000,), True).rows == 1


def test_tiles_want_every_stride_aligned() -> None:
    assert tuning.tile(1000, 2, (1000, 1000), True).vec == 8
    assert tuning.tile(1000, 2, (1001, 1000), True).vec == 1
    assert tuning.tile(1000, 2, (1000, 1004), True).vec == 1
    assert tuning.tile(1004, 4, (1004, 1004), True).vec == 4


@pytest.mark.parametrize("classes", [5000, 50257, 128256, 262144])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_sweeps(itemsize: int, classes: int) -> None:
    for twice in (False, True):
        for heavy in (False, True):
            sweep = tuning.sweep(classes, itemsize, (classes, classes), True, twice, heavy, H200)
            assert sweep.vec == 16 // itemsize
            assert sweep.edges == (classes % sweep.vec != 0)
            assert sweep.lanes == 32 * sweep.warps <= 1024
            assert sweep.block % (sweep.lanes * sweep.vec) == 0, "a lane takes whole vectors"


def test_sweeps_that_come_back_keep_their_rows_in_the_cache() -> None:
    warps = [tuning.sweep(c, 2, (c, c), True, True, False, H200).warps for c in (5000, 32000, 128256)]
    assert warps == [8, 16, 32], "the longer the row, the fewer in flight"
    assert tuning.sweep(32000, 2, (32000,) * 2, True, True, False, B200).warps < warps[1], "more cache, more rows"
    assert tuning.sweep(128256, 2, (128256,) * 2, True, False, False, H200).warps == tuning.SWEEP_WARPS


def test_sweeps_cope_with_any_alignment() -> None:
    def sweep(strides: tuple[int, ...], aligned: bool = True) -> tuple[int, bool]:
        plan = tuning.sweep(50304, 2, strides, aligned, False, False, H200)
        return plan.vec, plan.edges

    assert sweep((50304, 50304)) == (8, False)
    assert sweep((50305,)) == (8, True)
    assert sweep((50305, 50305)) == (8, True)
    assert sweep((50312, 50304)) == (8, False)
    assert sweep((50305, 50304)) == (1, False), "logits and gradient are never aligned together"
    assert sweep((50304, 50304), aligned=False) == (1, False)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    pytest.importorskip("triton")
    from longtail.triton_kernels import softmax_loss

    found = Launches()
    for name in ("tile_kernel", "sweep_kernel"):
        monkeypatch.setattr(softmax_loss, name, found.kernel(name))
    return found


def launch(logits: Tensor, **options: Any) -> None:
    n, c = logits.shape
    tail, target = cases.operator_options(c, options), torch.zeros(n, dtype=torch.long)
    dispatch.implementation("triton", "softmax_loss")(logits, target, *tail)
    dispatch.implementation("triton", "softmax_loss_and_grad")(torch.ones(n), logits, target, *tail)


@pytest.mark.parametrize(("classes", "kernel"), [(1, "tile_kernel"), (4096, "tile_kernel"), (4097, "sweep_kernel")])
def test_the_launchers_follow_the_tuning(classes: int, kernel: str, launches: Launches) -> None:
    launch(torch.zeros(5, classes))
    assert [name for name, _, _ in launches] == [kernel, kernel]
    for _, grid, constants in launches:
        assert grid[0] == (5 if kernel == "sweep_kernel" else -(-5 // constants["ROWS"]))
        assert constants["num_warps"] in (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize(
    ("classes", "kernel"), [(1, "dense_tile_kernel"), (4096, "dense_tile_kernel"), (4097, "dense_sweep_kernel")]
)
def test_class_probabilities_have_kernels_of_their_own(
    classes: int, kernel: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longtail.triton_kernels import softmax_dense

    for name in ("dense_tile_kernel", "dense_sweep_kernel"):
        monkeypatch.setattr(softmax_dense, name, launches.kernel(name))
    logits, tail = torch.zeros(5, classes), cases.operator_options(classes, {})
    for target in (logits, logits.double()):
        of = (logits.to(target.dtype), target, *tail)
        _, stats = dispatch.implementation("triton", "softmax_loss")(*of)
        up = torch.ones(5, dtype=target.dtype)
        dispatch.implementation("triton", "softmax_loss_backward")(up, *of[:2], stats, *tail)
    assert [name for name, _, _ in launches] == [kernel, kernel], "float64 is the reference's"


def test_the_launchers_see_alignment(launches: Launches) -> None:
    wide = torch.zeros(3, 5008)
    launch(wide[:, :5000])
    launch(wide[:, 1:5001])
    assert [(c["VEC"], c["EDGES"]) for _, _, c in launches] == [(4, False)] * 2 + [(1, False)] * 2
    launches.clear()
    launch(torch.zeros(3, 5001))
    launch(torch.zeros(3, 5003)[:, :5001])
    seen = [(c["VEC"], c["EDGES"]) for _, _, c in launches]
    assert seen == [(4, True)] * 3 + [(1, False)], "the gradient's rows lie closer together than the logits'"


def test_nothing_is_launched_for_no_rows_or_for_float64(launches: Launches) -> None:
    launch(torch.zeros(0, 5000))
    launch(torch.zeros(2, 50, dtype=torch.float64))
    assert not launches


def test_rows_and_images_of_three_types_are_served() -> None:
    for shape in ((2, 3), (2, 3, 4)):
        for dtype in cases.DTYPES:
            assert triton_backend.serves(torch.zeros(shape, dtype=dtype)) == (dtype != torch.float64)
    assert not triton_backend.serves(torch.zeros(3))
    assert not triton_backend.serves(torch.zeros(2, 3, 4, 5))


def status() -> tuple[bool, str]:
    return longtail.backends()["triton"]


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_triton_comes_before_the_backends_that_serve_everything() -> None:
    names = list(longtail.backends())
    assert names.index("triton") < names.index("cpu") < names.index("reference")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert status() == (False, "Triton is not installed: pip install triton")
    with pytest.raises(ValueError, match="Triton is not installed"), longtail.use_backend("triton"):
        pass
    assert dispatch.selected(torch.device("cuda")) == "reference"


def test_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    no_gpu(monkeypatch)
    assert status() == (False, "no CUDA or ROCm device")
    assert dispatch.selected(torch.device("cpu")) == "cpu"


def gpu(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])


def test_on_an_old_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    gpu(monkeypatch, (7, 5))
    available, detail = status()
    assert not available
    assert "8.0" in detail
    assert "7.5" in detail


def test_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    gpu(monkeypatch, (7, 5), (9, 0))
    assert status() == (True, f"Triton {triton.__version__}, GPU kernels")
    assert dispatch.selected(torch.device("cuda", 1)) == "triton"
    assert dispatch.selected(torch.device("cpu")) == "cpu", "never chosen for CPU tensors by itself"
    with longtail.use_backend("triton"), pytest.raises(ValueError, match="serves cuda tensors"):
        longtail.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert dispatch.kernel("softmax_loss", torch.device("cuda")) is not None


def test_every_operator_has_a_triton_kernel() -> None:
    pytest.importorskip("triton")
    from longtail.triton_kernels import OPERATORS

    assert set(operators.SCHEMAS) == set(OPERATORS)
    for operator, module in OPERATORS.items():
        launcher = triton_backend.operator(operator)
        assert launcher is not None
        assert launcher.__module__ == f"longtail.triton_kernels.{module}"
        assert callable(plain.operator(operator))


def test_an_operator_without_a_kernel_runs_on_the_next_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "operator", lambda _: None)
    monkeypatch.setattr(plain, "operator", lambda op: op)
    assert dispatch.implementation("triton", "mean_denominator") == "mean_denominator"


def test_one_launch_counts_the_rows_unless_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from longtail.triton_kernels import means

    found = Launches()
    for name in ("denominator_kernel", "mean_kernel"):
        monkeypatch.setattr(means, name, found.kernel(name))
    for rows in (0, 1, tuning.MEAN_ROWS, tuning.MEAN_ROWS + 1, 2**20):
        means.mean_denominator(torch.zeros(rows, dtype=torch.long), torch.ones(3), cases.IGNORE, 3)
    assert [grid for _, grid, _ in found] == [(1,), (1,), (1,), (5,), (64,)]
    found.clear()
    for rows in (0, tuning.MEAN_ROWS, 2**20):
        means.mean_loss(torch.zeros(rows), torch.ones(()))
    assert [grid for _, grid, _ in found] == [(1,)] * 3


@pytest.mark.parametrize("hidden", [False, True])
def test_importing_does_not_import_triton(hidden: bool) -> None:
    body = (
        "import sys\n"
        f"if {hidden}: sys.modules['triton'] = None\n"
        "import longtail, torch\n"
        "x = torch.zeros(2, 3, requires_grad=True)\n"
        "longtail.cross_entropy(x, torch.tensor([0, 1])).backward()\n"
        "assert sys.modules.get('triton') is None\n"
        "print(longtail.backends()['triton'].detail)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LONGTAIL_", "TRITON_"))}
    done = subprocess.run([sys.executable, "-c", body], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("not installed" in done.stdout) or not hidden
