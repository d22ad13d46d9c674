"""One batch of images [N, C, P] through the emulated kernels, all passes, against float64 on rows."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from longtail.ops.layout import to_images, to_rows

from .harness import BACKWARD, LOSS, LOSS_AND_GRAD, SHARED, SWEEP, Launch, Plan, launch, poisoned
from .image_layouts import LAYOUTS
from .numerics import Batch, Plans, assert_padding_untouched


def over_pixels(lanes: int, threads: int = 64, vector: bool = True, kept: bool = False) -> Plans:
    """kept: the logits stay in shared memory between their two uses."""
    sweep = Plan(SWEEP, vector, threads, lanes)
    return Plans(sweep, sweep, Plan(SHARED if kept else SWEEP, vector, threads, lanes))


class ImageBatch(Batch):
    """case: rows [N * P, C] and their targets, pixel by pixel; shape: [N, C, P]."""

    def __init__(
        self,
        plans: Plans,
        case: tuple[Tensor, Tensor],
        options: dict[str, Any],
        shape: tuple[int, int, int],
        up: Tensor | None = None,
        layout: str = "contiguous",
        grad_layout: str | None = None,
    ) -> None:
        super().__init__(plans, case, options, up, layout, grad_layout)
        self.shape = torch.Size(shape)
        assert math.prod(shape) == self.logits.numel()

    def launches(self) -> list[Launch]:
        rows, images = len(self.target), to_images(self.logits, self.shape)
        empty = poisoned(self.shape, images.dtype)
        self.z, self.written = (LAYOUTS[self.layout](images) for _ in range(2))
        self.grads = [LAYOUTS[self.grad_layout](empty) for _ in range(2)]
        self.losses = [poisoned((rows,)) for _ in range(3)]
        self.stats = [poisoned((5, rows)).t() for _ in range(3)]
        inputs, in_place = (self.z, self.target, self.tail), (self.written, self.target, self.tail)
        (l0, l1, l2), (s0, s1, s2), (g0, g1), up = self.losses, self.stats, self.grads, self.up
        return [
            launch(LOSS, self.plans.loss, *inputs, loss=l0, stats=s0),
            launch(BACKWARD, self.plans.backward, *inputs, stats=s0, grad=g0, up=up),
            launch(LOSS_AND_GRAD, self.plans.both, *inputs, loss=l1, stats=s1, grad=g1, up=up),
            launch(LOSS_AND_GRAD, self.plans.both, *in_place, loss=l2, stats=s2, grad=self.written, up=up),
        ]

    def check(self, factor: float = 1.0) -> None:
        as_rows = copy.copy(self)
        as_rows.z, as_rows.written = to_rows(self.z), to_rows(self.written)
        as_rows.grads = [to_rows(x) for x in self.grads]
        Batch.check(as_rows, factor)
        for images in (self.z, self.written, *self.grads):
            if "far_apart" not in (self.layout, self.grad_layout):
                assert_padding_untouched(images, "images")
