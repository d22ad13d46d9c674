"""One batch of the sigmoid family through the emulated kernels, all passes, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import cases
import sigmoid_cases
from longtail.ops import fallback, layout
from tolerances import assert_close, assert_same

from . import image_layouts
from .harness import BACKWARD, LOSS, LOSS_AND_GRAD, SIGMOID, STORAGES, Launch, Plan, describe, poisoned
from .numerics import LAYOUTS, assert_padding_untouched


def poison(logits: Tensor, target: Tensor) -> Tensor:
    """Rows, pixels or elements that are ignored hold NaN."""
    ignored = target == cases.IGNORE
    return logits.masked_fill(ignored if target.dim() == logits.dim() else ignored.unsqueeze(1), torch.nan)


def as_rows(x: Tensor) -> Tensor:
    return layout.to_rows(x) if x.dim() == 3 else x


def sigmoid_launch(
    pass_: int,
    plan: Plan,
    logits: Tensor,
    target: Tensor,
    options: list[Any],
    *,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
    up: Tensor | None = None,
) -> Launch:
    """options: those of the operators (sigmoid_cases.operator_options), in schema order."""
    weight, pos_weight, sample_weight, by_target, ignore_index, alpha, gamma = options
    dense = target.is_floating_point()
    fields = {
        "storage": STORAGES.index(logits.dtype),
        "rows": layout.row_count(logits),
        "num_classes": logits.shape[1],
        "pixels": logits.shape[2] if logits.dim() == 3 else 0,
        "logits": logits,
        "logits_stride": logits.stride(0),
        "logits_class_stride": logits.stride(1),
        "dense_target" if dense else "target": target,
        "dense_stride" if dense else "target_stride": target.stride(0),
        "dense_class_stride": target.stride(1) if dense else 0,
        "weight": weight,
        "pos_weight": pos_weight,
        "sample_weight": sample_weight,
        "grad_loss": up,
        "grad_loss_stride": up.stride(0) if up is not None and up.dim() == 1 else 0,
        "ignore_index": ignore_index or 0,
        "alpha_positive": 1.0 if alpha is None else alpha,
        "alpha_negative": 1.0 if alpha is None else 1.0 - alpha,
        "gamma": gamma,
        "dense_is_wide": dense and target.dtype != logits.dtype,
        "class_weight_by_target": by_target,
        "ignoring": ignore_index is not None,
        "elementwise_loss": loss is not None and loss.dim() == logits.dim(),
        "elementwise_upstream": up is not None and up.dim() == logits.dim(),
        "loss": loss,
        "grad": grad,
        "grad_stride": 0 if grad is None else grad.stride(0),
        "grad_class_stride": 0 if grad is None else grad.stride(1),
    }
    return Launch(fields, pass_, plan, kind=SIGMOID)


class Batch:
    """Logits and outputs for one run over all passes: loss, backward, both, both in place."""

    def __init__(
        self,
        plan: Plan,
        case: tuple[Tensor, Tensor],
        options: dict[str, Any],
        elementwise: bool,
        up: Tensor | None = None,
        layout: str = "contiguous",
        grad_layout: str | None = None,
    ) -> None:
        self.logits, self.target = case
        self.tail = sigmoid_cases.operator_options(options)
        self.layouts = image_layouts.LAYOUTS if self.logits.dim() == 3 else LAYOUTS
        shape = self.logits.shape if elementwise else (layout.row_count(self.logits),)
        self.up = torch.randn(shape, generator=cases.generator(3)) if up is None else up
        self.plan, self.elementwise, self.layout = plan, elementwise, layout
        self.grad_layout = grad_layout or layout

    def launches(self) -> list[Launch]:
        shape = self.logits.shape if self.elementwise else (layout.row_count(self.logits),)
        lay, unwritten = self.layouts[self.layout], poisoned(self.logits.shape, self.logits.dtype)
        self.z, self.written = lay(self.logits), lay(self.logits)
        self.y = lay(self.target) if self.target.is_floating_point() else self.target.view(-1)
        self.losses = [poisoned(shape) for _ in range(3)]
        self.grads = [self.layouts[self.grad_layout](unwritten) for _ in range(2)]
        loss, grad = self.losses, self.grads
        launches = [
            sigmoid_launch(LOSS, self.plan, self.z, self.y, self.tail, loss=loss[0]),
            sigmoid_launch(BACKWARD, self.plan, self.z, self.y, self.tail, grad=grad[0], up=self.up),
            sigmoid_launch(LOSS_AND_GRAD, self.plan, self.z, self.y, self.tail, loss=loss[1], grad=grad[1], up=self.up),
            sigmoid_launch(
                LOSS_AND_GRAD, self.plan, self.written, self.y, self.tail, loss=loss[2], grad=self.written, up=self.up
            ),
        ]
        # Vectors where the matrices allow them, as the operators do.
        fitting = [replace(self.plan, vector=self.plan.vector and describe(one).alike) for one in launches]
        return [replace(one, plan=plan) for one, plan in zip(launches, fitting, strict=True)]

    def check(self, factor: float = 1.0) -> None:
        """Every output against float64, and whatever is ignored."""
        wide = [x.double() if isinstance(x, Tensor) else x for x in self.tail]
        up, z = as_rows(self.up), as_rows(self.logits)
        dense = self.target.is_floating_point()
        y = as_rows(self.target) if dense else self.target.flatten()
        truth = fallback.sigmoid_loss_and_grad(
            up.double(), z.double(), y.double() if dense else y, *wide, self.elementwise
        )
        eager = fallback.sigmoid_loss_and_grad(up, z, y, *self.tail, self.elementwise)
        for loss in self.losses:
            assert_close(as_rows(loss), truth[0], eager[0], what="loss", factor=factor)
        ignored = torch.zeros_like(y, dtype=torch.bool) if self.tail[4] is None else y == self.tail[4]
        ignored = ignored if dense else ignored[:, None].expand_as(z)
        for grad in (*self.grads, self.written):
            assert_close(as_rows(grad), truth[1], eager[1], what="gradient", factor=factor)
            assert (as_rows(grad)[ignored] == 0).all(), "what is ignored is exactly 0"
            if "far_apart" not in (self.layout, self.grad_layout):
                assert_padding_untouched(grad, "gradient")
        assert_same(self.z, self.logits, "logits")

    def outputs(self) -> list[Tensor]:
        return [x.clone() for x in (*self.losses, *self.grads, self.written)]


def check(run: Callable[[Iterable[Launch]], Any], batch: Batch, factor: float = 1.0) -> None:
    """Both orders of threads and both sizes of grid: right, and the same bits."""
    run(batch.launches())
    batch.check(factor)
    first = batch.outputs()
    run([one.otherwise() for one in batch.launches()])
    for one, other in zip(first, batch.outputs(), strict=True):
        assert_same(one, other, "in another order")
