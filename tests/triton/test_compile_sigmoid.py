"""Promise: the Triton kernels of the sigmoid family compile ahead of time for sm_80, sm_90 and sm_100, without spills.

No GPU is needed: the launchers run as they are, over a driver that stops short of the launch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sigmoid_cases

pytest.importorskip("triton")
sigmoid = pytest.importorskip("longtail.triton_kernels.sigmoid_loss")
from ahead_of_time import (  # noqa: E402
    ARCHS,
    PASSES,
    activate,
    check,
    compiles,
    ex2,
    has_barrier,
    longest_loop,
    recorded,
)  # fmt: skip

pytestmark = compiles
# Several rows per program; rows in one block; in several, beginning anywhere; images.
SHAPES = ((2, 80), (2, 1000), (2, 8191), (2, 32, 1024))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return recorded(monkeypatch, sigmoid, "rows_kernel", "pixels_kernel")


def launch(what: str, shape: tuple[int, ...], kind: str, option_set: str, dtype: torch.dtype, **changes: Any) -> None:
    elementwise = kind != "class"
    logits, target = sigmoid_cases.random_case(shape, kind, dtype)
    tail = sigmoid_cases.operator_options(sigmoid_cases.options(option_set, logits) | changes)
    target = target.flatten().clamp(min=0) if kind == "class" else target
    up = torch.zeros(shape if elementwise else (logits.numel() // shape[1],))
    if what == "loss":
        sigmoid.sigmoid_loss(logits, target, *tail, elementwise)
    elif what == "backward":
        sigmoid.sigmoid_loss_backward(up, logits, target, *tail)
    else:
        sigmoid.sigmoid_loss_and_grad(up, logits, target, *tail, elementwise)


@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize(("arch", "shape"), [(a, s) for a in ARCHS for s in (SHAPES if a == 90 else SHAPES[2:])])
def test_every_option_at_once(
    arch: int, shape: tuple[int, ...], kind: str, compiled: list[Any], tmp_path: Path
) -> None:
    """Loss and gradient at once with every option: the most registers."""
    activate(arch)
    launch("both", shape, kind, "mixed", torch.bfloat16)
    wide = check(compiled[0], tmp_path, kind == "class")
    assert wide["ld"] > 0
    assert wide["st"] > 0
    assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", compiled[0].asm["ptx"]), "rounded, not cut off"


@pytest.mark.parametrize(
    ("shape", "kind", "option_set"),
    [
        *((shape, kind, "balanced") for shape in SHAPES[2:] for kind in ("class", "soft")),
        *((SHAPES[2], kind, "per_class") for kind in ("class", "soft")),
        *((SHAPES[2], "soft", "asymmetric"), (SHAPES[3], "class", "unequal")),
    ],
)
def test_general_kernels(
    shape: tuple[int, ...], kind: str, option_set: str, compiled: list[Any], tmp_path: Path
) -> None:
    activate(90)
    launch("both", shape, kind, option_set, torch.bfloat16 if kind == "class" else torch.float32)
    (kernel,) = compiled
    wide = check(kernel, tmp_path, kind == "class")
    assert wide["ld"] > 0
    assert wide["st"] > 0
    assert not has_barrier(longest_loop(kernel))


def test_whole_exponents_cost_no_exponential(compiled: list[Any]) -> None:
    activate(90)
    for option_set in ("plain", "asymmetric", "unequal"):
        launch("both", (2, 1000), "class", option_set, torch.bfloat16)
    plain, whole, power = map(ex2, compiled)
    assert plain == whole
    assert power == 2 * plain


@pytest.mark.parametrize("kind", ["class", "hard"])
@pytest.mark.parametrize("what", PASSES[:2])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_passes(shape: tuple[int, ...], what: str, kind: str, compiled: list[Any], tmp_path: Path) -> None:
    activate(90)
    launch(what, shape, kind, "mixed_square", torch.float32)
    wide = check(compiled[0], tmp_path, kind == "class")
    assert wide["ld"] > 0
    assert (wide["st"] > 0) == (what != "loss" or kind == "hard")


def test_the_loops_have_no_barrier(compiled: list[Any]) -> None:
    """What a thread adds up stays its own until the end."""
    activate(90)
    launch("both", (2, 8191), "class", "focal", torch.bfloat16)
    launch("both", (2, 80, 1024), "class", "weight", torch.bfloat16)
    for kernel in compiled:
        loop = longest_loop(kernel)
        assert loop.count("ex2.approx") >= 8
        assert not has_barrier(loop)


def test_an_unused_option_costs_no_instruction(compiled: list[Any]) -> None:
    activate(90)
    for option_set in ("plain", "sample_weight", "pos_weight", "alpha", "focal", "focal_half"):
        launch("loss", (2, 1000), "class", option_set, torch.bfloat16)
    counts = [ex2(kernel) for kernel in compiled]
    plain, weighted, positive, alpha, square, power = counts
    assert plain == positive == alpha == square, "one exp per element"
    assert power == weighted == 2 * plain, "and another for gammas other than 0 and 2"


def test_numbers_and_batches_do_not_recompile(compiled: list[Any]) -> None:
    activate(90)
    for what in ("loss", "backward"):
        for rows, gamma in ((2, 0.5), (1, 3.0), (17, 1.0), (16, 5.0)):
            launch(what, (rows, 1000), "class", "mixed", torch.float32, gamma=gamma, alpha=gamma / 10)
    assert len({kernel.hash for kernel in compiled}) == 2, "one kernel for the loss, one for its gradient"
    compiled.clear()
    for x in (0.25, 0.5, 0.75):
        numbers = ("clip", "label_smoothing", "negative_scale", "rebalance_alpha", "rebalance_beta", "rebalance_mu")
        launch("loss", (2, 1000), "class", "balanced", torch.float32, gamma_negative=x, **dict.fromkeys(numbers, x))
        launch("loss", (2, 1000), "class", "asymmetric", torch.float32, gamma_negative=8 * x, gamma=4 * x, clip=x)
    assert len({kernel.hash for kernel in compiled}) == 2


def test_few_kernels_for_all_sizes(compiled: list[Any]) -> None:
    """Per dtype, options and pass: a few widths of rows and of classes, aligned or not; ignore_index costs none."""
    activate(90)
    for classes in (2, 9, 16, 17, 20, 31, 2049, 5000, 5001, 32000, 50257, 128256):
        launch("loss", (2, classes), "class", "plain", torch.float32)
    assert len({kernel.hash for kernel in compiled}) <= 8
    compiled.clear()
    for classes in (19, 80, 150, 1203):
        for pixels in (32, 33, 64, 1024):
            launch("loss", (1, classes, pixels), "class", "plain", torch.float32)
    assert len({kernel.hash for kernel in compiled}) == 2
