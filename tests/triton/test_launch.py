"""Promise: what the launchers of images and of the sigmoid family choose is plain Python, and fits the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from longtail.triton_kernels import tuning

import cases
from launches import Launches
from longtail.ops import dispatch
from longtail.options import SigmoidOptions

H200 = 50 * 2**20 // 132


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("classes", [1, 2, 3, 16, 17, 80, 100, 512, 1000, 1025, 2048, 2049, 8191, 50257])
def test_rows_of_elements(classes: int, itemsize: int, heavy: bool) -> None:
    for aligned in (True, False):
        t = tuning.element_rows(classes, itemsize, (classes, classes), aligned, heavy)
        assert t.vec == (16 // itemsize if aligned else 1)
        assert t.edges == (classes % t.vec != 0), "16 bytes for every C"
        assert all(map(power_of_two, (t.rows, t.block, t.lanes, t.warps)))
        assert t.rows * t.block % (t.lanes * t.run) == 0
        assert t.lanes % t.rows == 0
        assert t.block >= classes or t.rows == 1, "only a row alone is walked in blocks"
        assert t.rows * t.block <= 32 * t.warps * tuning.PER_THREAD or t.block == tuning.SMALLEST_BLOCK


def test_rows_of_elements_want_all_matrices_aligned_alike() -> None:
    assert tuning.element_rows(91, 4, (91, 91), True, True).vec == 4
    assert tuning.element_rows(91, 4, (92, 91), True, True).vec == 1
    assert tuning.element_rows(91, 4, (95, 91, 99), True, True).vec == 4
    assert tuning.element_rows(80, 2, (80, 88), True, True) == tuning.element_rows(80, 2, (80, 80), True, True)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_sweeps_of_class_probabilities(itemsize: int) -> None:
    vec = 16 // itemsize
    for classes, strides, edges in (
        (50304, (50304,) * 3, False),
        (50257, (50257, 50257 + vec), True),
        (50304, (50305, 50313), True),
    ):
        s = tuning.dense_sweep(classes, itemsize, strides, True)
        assert (s.vec, s.edges) == (vec, edges)
        assert s.block % (s.lanes * s.vec) == 0, "a lane takes whole vectors"
    assert tuning.dense_sweep(50304, itemsize, (50304, 50305), True).vec == 1, "the target's rows lie otherwise"
    assert tuning.dense_sweep(50304, itemsize, (50304, 50304), False).vec == 1


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("classes", [1, 2, 19, 80, 1203])
def test_pixels_of_elements(classes: int, itemsize: int) -> None:
    for pixels, vec in ((65536, 16 // itemsize), (65025, 1)):
        p = tuning.element_pixels(classes, pixels, itemsize, (classes * pixels, pixels), True, True)
        assert p.vec == vec
        assert p.classes % p.groups == 0
        assert power_of_two(p.pixels)
        assert p.pixels * p.classes == 32 * p.warps * tuning.HEAVY_PER_THREAD
    assert tuning.element_pixels(1, 4096, 4, (4096, 4096), True, False).classes == 1


@pytest.mark.parametrize("vec", [1, 4, 8])
@pytest.mark.parametrize("classes", [1, 2, 19, 21, 33, 64])
def test_tiles_of_pixels(classes: int, vec: int) -> None:
    p = tuning.pixel_tile(classes, vec)
    assert classes <= p.classes < max(2 * classes, 2)
    assert p.vec == min(vec, 4), "eight pixels per lane are too many sums"
    assert p.pixels * p.classes <= 32 * p.warps * tuning.PER_THREAD
    assert tuning.TILE_WARPS <= p.warps <= tuning.TILE_PIXEL_WARPS
    assert p.pixels >= 64, "128 bytes of bfloat16 side by side"


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("classes", [65, 150, 1203, 21843])
def test_sweeps_over_pixels(classes: int, itemsize: int) -> None:
    for twice in (False, True):
        for heavy in (False, True):
            for vec in (1, 16 // itemsize):
                p = tuning.pixel_sweep(classes, itemsize, vec, twice, heavy, H200)
                assert p.classes % p.groups == 0
                assert p.groups * p.pixels <= max(32 * p.warps * p.vec, p.pixels)
                assert all(map(power_of_two, (p.pixels, p.classes, p.groups, p.warps)))


def test_sweeps_that_come_back_keep_their_pixels_in_the_cache() -> None:
    plans = [tuning.pixel_sweep(c, 2, 8, True, False, H200) for c in (70, 150, 600, 1203)]
    assert [p.warps for p in plans] == sorted(p.warps for p in plans)
    for p, c in zip(plans, (70, 150, 600, 1203), strict=True):
        programs = tuning.PIXEL_THREADS // (32 * p.warps)
        assert programs * p.pixels * c * 2 <= tuning.CACHE_SHARE * H200


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    pytest.importorskip("triton")
    from longtail.triton_kernels import sigmoid_loss, softmax_loss

    found = Launches()
    for module, names in (
        (softmax_loss, ("tile_kernel", "sweep_kernel", "pixel_tile_kernel", "pixel_sweep_kernel")),
        (sigmoid_loss, ("rows_kernel", "pixels_kernel")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, found.kernel(name))
    return found


def launch_softmax(logits: torch.Tensor) -> None:
    rows = logits.numel() // logits.shape[1] if logits.numel() else 0
    tail = cases.operator_options(logits.shape[1], {})
    launch = dispatch.implementation("triton", "softmax_loss_and_grad")
    launch(torch.ones(rows), logits, torch.zeros(rows, dtype=torch.long), *tail)


def launch_sigmoid(
    logits: torch.Tensor, target: torch.Tensor, gamma: float = 2.0, elementwise: bool = True, **options: Any
) -> None:
    launch = dispatch.implementation("triton", "sigmoid_loss")
    launch(logits, target, *SigmoidOptions(alpha=0.25, gamma=gamma, **options), elementwise)


@pytest.mark.parametrize(("classes", "kernel"), [(64, "pixel_tile_kernel"), (65, "pixel_sweep_kernel")])
def test_images_follow_the_tuning(classes: int, kernel: str, launches: Launches) -> None:
    launch_softmax(torch.zeros(3, classes, 200))
    ((name, grid, constants),) = launches
    assert name == kernel
    assert grid == (-(-600 // constants["PIXELS"]),), "pixels of several images share a program"
    assert constants["VEC"] == 4


def test_images_see_alignment(launches: Launches) -> None:
    launch_softmax(torch.zeros(2, 5, 33))
    launch_softmax(torch.zeros(2, 5, 40)[:, :, 1:33])
    launch_softmax(torch.zeros(2, 5, 40)[:, :, 4:36])
    assert [constants["VEC"] for _, _, constants in launches] == [1, 1, 4]


def test_the_sigmoid_family_is_specialised_for_what_it_is_given(launches: Launches) -> None:
    z, classes = torch.zeros(3, 40), torch.zeros(3, dtype=torch.long)
    for gamma in (0.0, 2, 1.5, 3.0):
        launch_sigmoid(z, classes, gamma)
    assert [constants["FOCUS"] for _, _, constants in launches] == ["none", "square", "power", "power"]
    assert not any(constants["GENERAL"] for _, _, constants in launches)
    launches.clear()
    for gamma, target, options in (
        (2.0, classes, {"clip": 0.1}),
        (0.0, classes, {"negative_scale": 2.0}),
        (2.5, classes, {"gamma_negative": 0.0}),
        (2.0, z, {"clip": 0.1}),
        (2.0, classes, {"label_smoothing": 0.1}),
        (0.0, classes, {"class_gamma": torch.ones(40)}),
    ):
        launch_sigmoid(z, target, gamma, **options)
    assert [constants["FOCUS"] for _, _, constants in launches] == ["whole", "none", *["power"] * 4]
    assert all(constants["GENERAL"] for _, _, constants in launches)
    launches.clear()
    off = {"gamma_negative": 2.0, "clip": 0.0, "negative_scale": 1.0, "rebalance_alpha": 0.1}
    launch_sigmoid(z, classes, **off)
    assert not launches[0][2]["GENERAL"], "options that change nothing"
    launches.clear()
    launch_sigmoid(z, classes, elementwise=False)
    launch_sigmoid(z, torch.zeros(3, 40))
    seen = [(constants["DENSE"], constants["LOSSES"]) for _, _, constants in launches]
    assert seen == [(False, False), (True, True)]
    assert not any(constants["UPSTREAMS"] for _, _, constants in launches)
    launches.clear()
    launch_sigmoid(torch.zeros(2, 40, 64), torch.zeros(128, dtype=torch.long))
    assert launches[0][0] == "pixels_kernel"


def test_nothing_is_launched_for_nothing(launches: Launches) -> None:
    launch_softmax(torch.zeros(2, 5, 0))
    launch_softmax(torch.zeros(2, 5, 3, dtype=torch.float64))
    launch_sigmoid(torch.zeros(0, 5), torch.zeros(0, 5))
    launch_sigmoid(torch.zeros(2, 5).double(), torch.zeros(2, 5).double())
    assert not launches
