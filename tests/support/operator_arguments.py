"""Arguments of each operator, by name, with some rows ignored and a random upstream gradient."""

from __future__ import annotations

from typing import Any

import torch

import cases
import sigmoid_cases
from shard_cases import ELSEWHERE, accumulate_tail, apply_tail

ops = torch.ops.longtail
SOFTMAX = ("softmax_loss", "softmax_loss_backward", "softmax_loss_and_grad", "softmax_loss_and_grad_")
SIGMOID = ("sigmoid_loss", "sigmoid_loss_backward", "sigmoid_loss_and_grad", "sigmoid_loss_and_grad_")
SHARD = ("softmax_loss_accumulate", "softmax_loss_apply", "softmax_loss_apply_")


def softmax(
    name: str, option_set: str = "mixed", dtype: torch.dtype = torch.float32, rows: int = 7, classes: int = 11
) -> list[Any]:
    """Of one of the operators over rows, whose ignored ones are poisoned."""
    logits, target = cases.random_case(rows, classes, dtype)
    logits = cases.poison_ignored(logits, target)
    tail = cases.operator_options(classes, cases.options(option_set, classes, target, dtype))
    up = cases.upstreams((rows,), cases.vector_dtype(dtype))["random"]
    if name == "softmax_loss":
        return [logits, target, *tail]
    if name == "softmax_loss_backward":
        return [up, logits, target, ops.softmax_loss(logits, target, *tail)[1], *tail]
    return [up, logits, target, *tail]


def probabilities(name: str, dtype: torch.dtype = torch.float32, rows: int = 7, classes: int = 11) -> list[Any]:
    """Of one of the two operators that take them."""
    logits, _ = cases.random_case(rows, classes, dtype, ignore=False)
    y = cases.probabilities(rows, classes, dtype)
    tail = cases.operator_options(classes, cases.options("all_of_probabilities", classes, y[:, 0], dtype))
    if name == "softmax_loss":
        return [logits, y, *tail]
    up = cases.upstreams((rows,), cases.vector_dtype(dtype))["random"]
    return [up, logits, y, ops.softmax_loss(logits, y, *tail)[1], *tail]


def sigmoid(
    name: str,
    kind: str = "class",
    shape: tuple[int, ...] = (7, 11),
    elementwise: bool = False,
    dtype: torch.dtype = torch.float32,
    option_set: str = "mixed",
) -> list[Any]:
    logits, target = sigmoid_cases.random_case(shape, kind, dtype)
    tail = sigmoid_cases.operator_options(sigmoid_cases.options(option_set, logits))
    target = target.flatten() if kind == "class" else target
    rows = logits.numel() // shape[1]
    up = torch.randn(shape if elementwise else (rows,), generator=cases.generator(5)).to(cases.vector_dtype(dtype))
    if name == "sigmoid_loss":
        return [logits, target, *tail, elementwise]
    if name == "sigmoid_loss_backward":
        return [up, logits, target, *tail]
    return [up, logits, target, *tail, elementwise]


def shard(name: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Arguments of a shard's operator: a local target, one elsewhere, ignored rows with NaN."""
    logits, target = cases.random_case(7, 11, dtype)
    logits = cases.poison_ignored(logits, target)
    target[0] = ELSEWHERE
    wide = cases.vector_dtype(dtype)
    options = cases.options("mixed_tail", 11, target, dtype)
    if name == "softmax_loss_accumulate":
        return [logits, target, *accumulate_tail(options, smoothing=True)]
    row_grad = torch.randn(7, 5, generator=cases.generator(5)).to(wide)
    return [logits, target, row_grad, *apply_tail(options)]
