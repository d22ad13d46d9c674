"""What the tests on a GPU share: batches there, and the sigmoid operators against float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cases
import longtail
import sigmoid_cases
from longtail.ops.layout import to_rows
from tolerances import assert_close

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
IMAGES = ((3, 7, 35), (2, 19, 1024), (1, 1, 4096), (2, 70, 333), (2, 1203, 512))


def cuda(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}


def as_rows(x: Tensor) -> Tensor:
    return to_rows(x) if x.dim() == 3 else x


def check_sigmoid(
    logits: Tensor, target: Tensor, options: dict[str, Any], elementwise: bool, ops: Any = torch.ops.longtail
) -> None:
    """The four operators on the GPU against float64 there."""
    rows = logits.numel() // logits.shape[1]
    logits, target, options = logits.cuda(), target.cuda(), cuda(options)
    up = torch.randn(logits.shape if elementwise else (rows, 1), device="cuda")
    flat = {k: v.flatten() if k == "sample_weight" else v for k, v in options.items()}
    results = []
    for wide in (True, False):
        z = as_rows(logits).double() if wide else as_rows(logits).clone()
        z.requires_grad_()
        y = as_rows(target) if target.is_floating_point() else target.flatten()
        loss = longtail.reference.sigmoid_loss(z, y, elementwise=True, **(cases.to_float64(flat) if wide else flat))
        (grad,) = torch.autograd.grad(loss, z, as_rows(up).to(loss.dtype).expand_as(loss))
        results.append((loss.detach() if elementwise else loss.detach().sum(1), grad))
    (loss, grad), (eager_loss, eager_grad) = results
    up = up if elementwise else up[:, 0]
    y = target if target.is_floating_point() else target.flatten()
    tail = sigmoid_cases.operator_options(options)
    one = ops.sigmoid_loss(logits, y, *tail, elementwise)
    one_grad = ops.sigmoid_loss_backward(up, logits, y, *tail)
    two, two_grad = ops.sigmoid_loss_and_grad(up, logits, y, *tail, elementwise)
    written = logits.clone()
    three = ops.sigmoid_loss_and_grad_(up, written, y, *tail, elementwise)
    for value in (one, two, three):
        assert_close(as_rows(value) if elementwise else value, loss, eager_loss, what="loss")
    for value in (one_grad, two_grad, written):
        assert_close(as_rows(value), grad, eager_grad, what="gradient")


def poisoned(logits: Tensor, target: Tensor) -> Tensor:
    ignored = target == cases.IGNORE
    return logits.masked_fill(ignored if target.shape == logits.shape else ignored.unsqueeze(1), torch.nan)
