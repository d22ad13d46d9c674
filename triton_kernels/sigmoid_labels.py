"""The sum of inverse_counts over the labels of a row with a target for each element, ignored ones aside.

The distribution-balanced loss needs it before its sweep: a loop over the targets alone.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .loss_math import over_lanes_sum
from .softmax_pixels import of_class
from .softmax_rows import edges


@triton.jit
def labels(targets, classes, loaded, ignored, x):
    y = tl.load(targets, mask=loaded, other=0.0).to(tl.float32)
    if ignored is not None:
        y = tl.where(y == ignored, 0.0, y)
    return y * tl.load(x.inverse_counts + classes, mask=loaded, other=0.0)


@triton.jit
def row_labels(
    y_row, y_body, head, body, classes, exists, ignored, x,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, RUN: tl.constexpr, VEC: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    """[ROWS, 1]; y_row, y_body: pointers to the first target of each row, and of its body."""
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, classes // VEC * VEC, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        found = labels(y_body + cols, head + cols, (cols < body) & exists, ignored, x)
        total += over_lanes_sum(found.reshape(ROWS * BLOCK // (LANES * RUN), LANES, RUN))
    total = tl.sum(total.reshape(ROWS, LANES // ROWS), 1)[:, None]
    if EDGES:
        cols = edges(head, body, classes, VEC)
        total += tl.sum(labels(y_row + cols, cols, (cols < classes) & exists, ignored, x), 1)[:, None]
    return total


@triton.jit
def pixel_labels(
    y_image, class_stride, classes, exists, ignored, x,
    PIXELS: tl.constexpr, CLASSES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """[1, PIXELS]; y_image: pointers to the targets of class 0."""
    total = tl.zeros([CLASSES, PIXELS], tl.float32)
    for start in range(0, classes, CLASSES):
        cls = start + tl.arange(0, CLASSES)[:, None]
        total += labels(of_class(y_image, cls, class_stride, VEC), cls, (cls < classes) & exists, ignored, x)
    return tl.sum(total, 0)[None, :]
