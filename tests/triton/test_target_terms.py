"""Promise: what a target's class does to the other logits holds at the limits, too, seen in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cases
from batches import SoftmaxBatch, check, one_thread
from interpreted import interpreted, refuse_copies
from kernels import TRITON
from longtail.ops.layout import to_images
from tolerances import assert_same

pytest.importorskip("triton")
SHAPES = [(6, 127), (3, 4099), (2, 5, 4), (1, 70, 6)]  # a tile and a sweep of rows and of images
KERNELS = TRITON["triton"]


def shaped(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return to_images(rows, torch.Size(shape)) if len(shape) == 3 else rows


def rows_of(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[2] if len(shape) == 3 else 1)


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_copies(monkeypatch)


@interpreted
@pytest.mark.parametrize("option_set", ["seesaw", "tail_linear"])
@pytest.mark.parametrize("margin", [20.0, 100.0, 1e4])
@pytest.mark.parametrize("shape", [(4, 1), (4, 2), *SHAPES[:3]])
def test_margins(shape: tuple[int, ...], margin: float, option_set: str) -> None:
    """Both ways; compensation makes a target that trails by 1e4 trail by three times that."""
    rows, target = cases.margin_case(margin, shape[1], rows=rows_of(shape))
    with one_thread():
        check(SoftmaxBatch(KERNELS, (shaped(rows, shape), target), cases.options(option_set, shape[1], target)))


@interpreted
@pytest.mark.parametrize("option_set", ["seesaw", "target_scale", "vector_scaling"])
@pytest.mark.parametrize("shape", SHAPES)
def test_infinite_logits_and_mitigations(shape: tuple[int, ...], option_set: str) -> None:
    n, classes = rows_of(shape), shape[1]
    rows, target = cases.random_case(n, classes, ignore=False)
    options = cases.options(option_set, classes, target)
    target[2] = cases.IGNORE
    rows[0, target[0]] = -torch.inf  # then 0 is what the others are compared with
    rows[1] = -torch.inf
    rows[1, target[1]] = 1.0
    rows[2] = torch.nan
    if n > 4:
        rows[3, (target[3] + 1) % classes] = -torch.inf
        rows[4] = torch.nan
    if option_set == "seesaw":
        options["class_mitigation"][target[:2]] = -torch.inf  # classes never seen yet, the target's own among them
    one = SoftmaxBatch(KERNELS, (shaped(rows, shape), target), options)
    with one_thread():
        check(one)
    assert one.losses[0][:3].tolist() == [torch.inf, 0.0, 0.0]


@interpreted
@pytest.mark.parametrize("shape", [(2, 3), *SHAPES])
def test_scales_of_any_sign(shape: tuple[int, ...]) -> None:
    """Places beside the row's classes, where the logits stand at -inf, stay out of it."""
    rows, target = cases.random_case(rows_of(shape), shape[1], ignore=False)
    scales = torch.randn(2, shape[1], generator=cases.generator(1))
    scales[1, target[0]], scales[1, target[1]] = 0.0, -0.8
    options = {"class_scale": scales[0], "target_scale": scales[1]}
    with one_thread():
        check(SoftmaxBatch(KERNELS, (shaped(rows, shape), target), options))


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_neutral_terms_change_no_bit(shape: tuple[int, ...]) -> None:
    rows, target = cases.random_case(rows_of(shape), shape[1])
    logits = shaped(cases.poison_ignored(rows, target), shape)
    options = cases.options("mixed", shape[1], target)
    ones, same = torch.ones(shape[1]), torch.full((shape[1],), -1.7)
    neutral = {"class_scale": ones, "target_scale": ones, "class_mitigation": same}
    batches = [SoftmaxBatch(KERNELS, (logits, target), options | extra) for extra in ({}, neutral)]
    with one_thread():
        for one in batches:
            one.run()
    for found, expected in zip(batches[1].outputs(), batches[0].outputs(), strict=True):
        assert_same(found, expected)
