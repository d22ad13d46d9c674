"""Rows and images with several labels, and losses with their gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import cases

KINDS = ("class", "hard", "soft", "bool")
TWICE = r"(?i)twice|second|double|once"


def data(shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits; class indices, or targets of their shape, of which the second row has no label, the third every one."""
    g = cases.generator(len(shape))
    z = (3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
    if kind == "class":
        return z, torch.randint(shape[1], (shape[0], *shape[2:]), generator=g)
    y = torch.rand(shape, generator=g, dtype=torch.float64)
    y = torch.where(y < 0.4, y / 0.4, (y < 0.7).double()) if kind == "soft" else (y < 0.3).double()
    y[1:2], y[2:3] = 0, 1
    return z, y.bool() if kind == "bool" else y.to(cases.vector_dtype(dtype))


def dense(y: Tensor, z: Tensor) -> Tensor:
    """A target of each element, in float64."""
    return y.double() if y.shape == z.shape else F.one_hot(y, z.shape[1]).movedim(-1, 1).double()


def with_grad(call: Callable[[Tensor], Tensor], z: Tensor, up: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss of what is no leaf, and its gradient, of a random upstream gradient unless one is given."""
    x = z.clone().requires_grad_()
    loss = call(x * 1.0)
    up = torch.randn(loss.shape, generator=cases.generator(7), dtype=torch.float64) if up is None else up
    return loss.detach(), torch.autograd.grad(loss, x, up.to(loss.dtype))[0]


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """Losses of elements, (N, C, ...), by the family's reductions."""
    return {"mean": loss.mean, "sum": loss.sum, "rows": lambda: loss.sum(1), "none": lambda: loss}[reduction]()
