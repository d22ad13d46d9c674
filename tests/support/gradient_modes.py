"""Losses by the way in which they make their gradient, and that gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import longtail

Loss = Callable[[Tensor, str], Tensor]


def softmax(target: Tensor, **options: Any) -> Loss:
    return lambda z, mode: longtail.cross_entropy(z * 1.0, target, gradient=mode, **options)


def sigmoid(target: Tensor, **options: Any) -> Loss:
    options = {"reduction": "mean", **options}
    return lambda z, mode: longtail.sigmoid_focal_loss(z * 1.0, target, gradient=mode, **options)


def gradient(loss: Loss, values: Tensor, mode: str, upstream: float = 1.0) -> Tensor:
    x = values.clone().requires_grad_()
    value = loss(x, mode)
    return torch.autograd.grad(value, x, torch.full_like(value, upstream))[0]
