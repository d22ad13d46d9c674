"""The fused linear loss, the loss of whole logits and the float64 truth, over one problem."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import longtail
from tolerances import assert_close

N, D = 20, 16
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(classes: int = 13, dtype: torch.dtype = torch.float32, rows: int = N, seed: int = 0) -> Data:
    """Features [rows, D], weight [classes, D], bias [classes], targets [rows] of which some are ignored."""
    g = cases.generator(seed)
    x, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((rows, D), (classes, D), (classes,)))
    target = torch.randint(classes, (rows,), generator=g)
    if rows > 1:
        target[1::5] = cases.IGNORE
    return x.to(dtype), (weight * 0.7).to(dtype), bias.to(dtype), target


class Calls(TorchDispatchMode):
    """Names and results of the operators that run, those within the losses' too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen.append((func.name(), out))
        return out


def moved(x: Tensor, last: float) -> Tensor:
    """What stands at the next position; written apart from the code: position by position."""
    out = torch.full_like(x, last)
    for i in range(x.shape[-1] - 1):
        out[..., i] = x[..., i + 1]
    return out


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def fused(data: Data, upstream: Tensor | None = None, **options: Any) -> list[Tensor]:
    """Loss and the gradients of features, weight and bias."""
    x, weight, bias = leaves(*data[:3])
    loss = longtail.linear_cross_entropy(x, weight, data[3], linear_bias=bias, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight, bias), upstream)]


def plain(data: Data, upstream: Tensor | None = None, **options: Any) -> list[Tensor]:
    """The same, from whole logits."""
    x, weight, bias = leaves(*data[:3])
    loss = longtail.cross_entropy(F.linear(x, weight, bias), data[3], **options)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight, bias), upstream)]


def truth(data: Data, upstream: Tensor | None = None, **options: Any) -> list[Tensor]:
    """The same, from the float64 reference."""
    x, weight, bias = leaves(*(t.double() for t in data[:3]))
    options = cases.to_float64(options)
    loss = longtail.reference.cross_entropy(x @ weight.T + bias, data[3], **options)
    up = None if upstream is None else upstream.double()
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight, bias), up)]


def assert_results(actual: list[Tensor], expected: list[Tensor], eager: list[Tensor], factor: float = 1.0) -> None:
    """Each result as one row: the bound is the largest error of eager PyTorch in all of it."""
    for what, *results in zip(("loss", "input", "weight", "bias"), actual, expected, eager, strict=True):
        assert results[0].shape == results[1].shape
        got, want, same = (x.reshape(1, -1) for x in results)
        assert_close(got, want, same, what=what, factor=factor)
