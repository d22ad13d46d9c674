"""Promise: the Triton kernels of ZLPR and the two-way loss compile ahead of time for each GPU, without spills.

No GPU is needed: the launchers run as they are, over a driver that stops short of the launch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import two_way_cases

pytest.importorskip("triton")
two_way = pytest.importorskip("longtail.triton_kernels.two_way_loss")
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
    return recorded(monkeypatch, two_way, "two_way_rows_kernel", "two_way_pixels_kernel")


def launch(what: str, shape: tuple[int, ...], kind: str, name: str, dtype: torch.dtype, **changes: Any) -> None:
    logits, target = two_way_cases.random_case(shape, kind, dtype)
    tail = two_way_cases.operator_options(two_way_cases.options(name, logits) | changes)
    target = target.flatten().clamp(min=0) if kind == "class" else target
    rows = logits.numel() // shape[1]
    up = torch.zeros(rows)
    if what == "loss":
        two_way.two_way_loss(logits, target, *tail)
    elif what == "backward":
        stats = torch.zeros(4, rows).t() if len(shape) == 3 else torch.zeros(rows, 4)
        two_way.two_way_loss_backward(up, logits, target, stats, *tail)
    else:
        two_way.two_way_loss_and_grad(up, logits, target, *tail)


@pytest.mark.parametrize("kind", ["class", "soft"])
@pytest.mark.parametrize(("arch", "shape"), [(a, s) for a in ARCHS for s in (SHAPES if a == 90 else SHAPES[2:])])
def test_every_option_at_once(
    arch: int, shape: tuple[int, ...], kind: str, compiled: list[Any], tmp_path: Path
) -> None:
    """Loss and gradient at once with every option: the most registers."""
    activate(arch)
    launch("both", shape, kind, "two_way_vectors", torch.bfloat16)
    wide = check(compiled[0], tmp_path, kind == "class")
    if len(shape) == 2:  # lanes of images have fewer pixels
        assert wide["ld"] > 0
        assert wide["st"] > 0
    assert re.search(r"cvt\.rn\.bf16(x2)?\.f32", compiled[0].asm["ptx"]), "rounded, not cut off"


@pytest.mark.parametrize("kind", ["class", "hard"])
@pytest.mark.parametrize("what", PASSES[:2])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_passes(shape: tuple[int, ...], what: str, kind: str, compiled: list[Any], tmp_path: Path) -> None:
    activate(90)
    launch(what, shape, kind, "zlpr", torch.float32)
    wide = check(compiled[0], tmp_path, kind == "class")
    if len(shape) == 2:
        assert wide["ld"] > 0
        assert (wide["st"] > 0) == (what != "loss")


def test_the_loops_have_no_barrier(compiled: list[Any]) -> None:
    """What a thread adds up stays its own until the end."""
    activate(90)
    for kind in ("class", "soft"):
        launch("loss", (2, 8191), kind, "zlpr", torch.bfloat16)
        launch("loss", (2, 80, 1024), kind, "two_way", torch.bfloat16)
    for kernel in compiled:
        loop = longest_loop(kernel)
        assert loop.count("ex2.approx") >= 8
        assert not has_barrier(loop)


def test_a_class_costs_one_exponential_where_it_is_on_one_side(compiled: list[Any]) -> None:
    activate(90)
    for kind in ("class", "soft"):
        launch("backward", (2, 8192), kind, "zlpr", torch.bfloat16)
    of_class, of_elements = (longest_loop(kernel).count("ex2.approx") for kernel in compiled)
    assert of_elements == 2 * of_class or (of_class <= 9 and of_elements == 16)
    assert ex2(compiled[0]) < ex2(compiled[1])


def test_numbers_and_batches_do_not_recompile(compiled: list[Any]) -> None:
    activate(90)
    for what in ("loss", "backward"):
        for rows, temperature in ((2, 0.5), (1, 3.0), (17, 2.0), (16, 5.0)):
            launch(what, (rows, 1000), "class", "two_way_vectors", torch.float32, positive_temperature=temperature)
    assert len({kernel.hash for kernel in compiled}) == 2, "one kernel for the loss, one for its gradient"
