"""The numbers that :mod:`goals` judges measured rows by."""

from __future__ import annotations

import math
from typing import NamedTuple

from . import gpu
from .suite import (
    CPU,
    FEW_IMAGES,
    FEW_ROWS,
    IMAGES,
    LARGE,
    MULTI_LABEL,
    PAGES,
    SIGMOID,
    STATISTICS,
    TAIL,
    Shape,
)

NO_MEMORY = 0.02  # of the logits: room for one number per row, and for the allocator's own pages
LINEAR_MEMORY = 1 / 8  # of the logits

OF_ELEMENTS = ("asymmetric", "distribution_balanced")
"""Losses of several labels a row that have goals: sums over elements, as sigmoid focal loss, their measure."""


class Speed(NamedTuple):
    """How many times as fast as a rival a loss is to be, in the rival's gradient mode; one without has "backward"."""

    section: str
    loss: str
    rival: str
    least: float
    shape: Shape | None = None  # (N, C) of float32 logits; None: every problem of the section


def _of_images(shape: Shape) -> Shape:
    """(N, C) as the rows have it, where N counts pixels."""
    n, c, *pixels = shape
    return n * math.prod(pixels), c


FASTER = (
    Speed(CPU.section, "plain", "eager", 2, LARGE),
    Speed(CPU.section, "family", "eager", 15, LARGE),
    Speed(CPU.section, "family", "compiled", 6, LARGE),
    Speed(STATISTICS.section, "statistics", "eager", 10),
    Speed(STATISTICS.section, "statistics", "compiled", 4),
    *(Speed(TAIL.section, loss, "eager", 15, LARGE) for loss in TAIL.losses[1:]),
    *(
        Speed(SIGMOID.section, loss, rival, least, SIGMOID.shapes[0])
        for loss in SIGMOID.losses
        for rival, least in (("eager", 8), ("compiled", 2.5))
    ),
    *(
        Speed(MULTI_LABEL.section, loss, rival, least, MULTI_LABEL.shapes[0])
        for loss in OF_ELEMENTS
        for rival, least in (("eager", 15), ("compiled", 2.5))
    ),
    *(Speed(plan.section, "focal", "eager", 3) for plan in (FEW_ROWS, FEW_IMAGES)),
    Speed(IMAGES.section, "focal", "eager", 6, _of_images(IMAGES.shapes[-1])),
    Speed(gpu.GPU.section, "plain", "liger", 1.2),
    Speed(gpu.GPU.section, "complement", "compiled", 4),
    Speed(gpu.GPU.section, "complement", "eager", 15),
)


class Cost(NamedTuple):
    """Times of another contender of the same problem that ours may take at most."""

    what: str
    most: float
    section: str
    losses: tuple[str, ...]
    gradient: str
    shape: Shape
    dtype: str = "float32"
    of: str = "median_ms"  # or another column
    rival: tuple[str, str] = ("", "copy")  # loss, contender; in place where it is ours, if no mode is named
    ours: str = "longtail"
    rival_gradient: str = "inplace"


KEPT = "longtail, kept pages"
COSTS = (
    Cost("in place: time of a copy", 1.2, CPU.section, ("plain", "family"), "inplace", LARGE),
    Cost("in place, bfloat16: time of a copy", 2.2, CPU.section, ("plain", "family"), "inplace", LARGE, "bfloat16"),
    *(
        Cost(
            *(f"everything in place, {dtype}: time of plain", 1.5, CPU.section, ("everything",), "inplace", LARGE),
            *(dtype, "median_ms", ("plain", "longtail")),
        )
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Cost(
            *(f"time of plain, {dtype}", 1.15, STATISTICS.section, ("statistics",), "backward", LARGE),
            *(dtype, "median_ms", ("plain", "longtail"), "longtail", "backward"),
        )
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Cost(
            *(f"{what}, {dtype}: time of plain", most, TAIL.section, losses, "inplace", LARGE),
            *(dtype, "median_ms", ("plain", "longtail")),
        )
        for what, most, losses in (
            ("in place", 1.1, ("vector_scaling", "immax", "seesaw", "hierarchical")),
            ("classes of the tree shuffled, in place", 1.25, ("hierarchical_shuffled",)),
        )
        for dtype in ("float32", "bfloat16")
    ),
    Cost(
        *("gradient in forward, its pages kept: time of in place", 1.1, PAGES.section, ("family",), "forward", LARGE),
        *("float32", "median_ms", ("family", KEPT), KEPT),
    ),
    Cost("loss alone: time of a copy", 0.55, CPU.section, ("plain", "family"), "backward", LARGE, of="forward_ms"),
    Cost("backward: time of a copy", 1.1, CPU.section, ("plain", "family"), "backward", LARGE, of="backward_ms"),
    Cost(
        *("backward, its pages kept: time of a copy", 1.1, PAGES.section, ("family",), "backward", LARGE),
        *("float32", "backward_ms", ("", "copy, kept pages"), KEPT),
    ),
    Cost("in place: time of a copy", 1.3, SIGMOID.section, ("sigmoid_focal",), "inplace", SIGMOID.shapes[0]),
    Cost("dense, in place: time of a copy", 1.5, SIGMOID.section, ("dense_focal",), "inplace", SIGMOID.shapes[0]),
    *(
        Cost(
            *(f"{loss} {where}, {dtype}: time of sigmoid focal", 1.3, MULTI_LABEL.section, (loss,), gradient),
            shape=MULTI_LABEL.shapes[0],
            dtype=dtype,
            rival=(MULTI_LABEL.losses[0], "longtail"),
            rival_gradient=gradient,
        )
        for loss in OF_ELEMENTS
        for where, gradient in (("in place", "inplace"), ("in the default mode", "backward"))
        for dtype in ("float32", "bfloat16")
    ),
    Cost("in place: time of a copy", 2.5, IMAGES.section, ("focal",), "inplace", _of_images(IMAGES.shapes[0])),
)

CALLS = {
    "plain": "plain",
    "focal": "plain",
    "balanced": "balanced",
    "dense_sigmoid": "dense_sigmoid",
    "sigmoid_focal": "dense_sigmoid",
}
"""Losses of the section of calls, and the one whose eager call theirs are measured in."""

EAGER = {"plain": "cross-entropy", "balanced": "weighted cross-entropy", "dense_sigmoid": "binary cross-entropy"}
"""What those are."""

LINEAR = {
    ("mean", "float32"): 1.06,
    ("mean", "bfloat16"): 1.15,
    ("none", "float32"): 1.4,
    ("none", "bfloat16"): 1.4,
    ("statistics", "float32"): 1.45,
}
"""Times of three bare GEMMs, by dtype and reduction, or of the statistics of rows."""
