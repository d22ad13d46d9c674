"""Hierarchical cross-entropy of hidden states: the fused loss, that of whole logits, and the paper's formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cases
import hierarchy_cases
import linear_cases
import longtail
from linear_cases import leaves

N, ALPHA = 12, 0.3


class Problem(NamedTuple):
    """Poisoned where ignored."""

    x: Tensor
    linear_weight: Tensor
    linear_bias: Tensor
    target: Tensor
    hierarchy: longtail.Hierarchy
    names: list[hierarchy_cases.Path]

    @classmethod
    def of(cls, name: str = "small", dtype: torch.dtype = torch.float32, rows: int = N) -> Problem:
        """``name``: of one of the trees."""
        hierarchy, names = hierarchy_cases.tree(name)
        x, weight, bias, target = linear_cases.problem(len(names), dtype, rows)
        return cls(cases.poison_ignored(x, target), weight, bias, target, hierarchy, names)

    def clear(self) -> Problem:
        """Zeros where ignored: whole logits have no other way to hide those rows from the weight."""
        return self._replace(x=self.x.masked_fill((self.target == cases.IGNORE)[:, None], 0.0))

    def vectors(self, *names: str) -> dict[str, Any]:
        """All class vectors and sample weights, or some of them."""
        found = hierarchy_cases.vectors(len(self.names), len(self.target), self.x.dtype)
        return {name: found[name] for name in names or found}


def fused(problem: Problem, up: Tensor | None = None, *, device: str = "cpu", **options: Any) -> list[Tensor]:
    """Loss and the gradients of states, weight and bias, on the CPU."""
    x, weight, bias = (t.detach().clone().to(device).requires_grad_() for t in problem[:3])
    given = {k: t.to(device) if isinstance(t, Tensor) else t for k, t in ({"alpha": ALPHA} | options).items()}
    loss = longtail.linear_hierarchical_cross_entropy(
        x, weight, problem.target.to(device), problem.hierarchy, linear_bias=bias, **given
    )
    grads = torch.autograd.grad(loss, (x, weight, bias), None if up is None else up.to(device))
    return [t.detach().cpu() for t in (loss, *grads)]


def plain(problem: Problem, up: Tensor | None = None, **options: Any) -> list[Tensor]:
    """The same, from whole logits."""
    problem = problem.clear()
    x, weight, bias = leaves(*problem[:3])
    logits = F.linear(x, weight, bias)
    loss = longtail.hierarchical_cross_entropy(
        logits, problem.target, problem.hierarchy, **({"alpha": ALPHA} | options)
    )
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight, bias), up)]


def formulas(
    problem: Problem, wide: torch.dtype, ways: Sequence[tuple[str, Any, Tensor]], **vectors: Tensor
) -> list[list[Tensor]]:
    """The same, as the paper writes it, in ``wide``: for each (reduction, normalizer, upstream gradient)."""
    problem = problem.clear()
    x, weight, bias = leaves(*(t.to(wide) for t in problem[:3]))
    rows = hierarchy_cases.losses(F.linear(x, weight, bias), problem.target, problem.names, ALPHA, **vectors)
    counted = problem.target[problem.target != cases.IGNORE]
    found = []
    for reduction, normalizer, up in ways:
        divisor: Any = 1.0
        if reduction == "mean":
            weights = vectors.get("weight", torch.ones(len(problem.names))).to(wide)
            divisor = weights[counted].sum() if normalizer is None else normalizer
            divisor = len(counted) if isinstance(divisor, str) else divisor
        loss = rows if reduction == "none" else rows.sum() / divisor
        grads = torch.autograd.grad(loss, (x, weight, bias), up.to(wide), retain_graph=True)
        found.append([loss.detach(), *grads])
    return found


def upstream(reduction: str, rows: int, dtype: torch.dtype, kind: str = "random") -> Tensor:
    return cases.upstreams((rows,) if reduction == "none" else (), cases.vector_dtype(dtype))[kind]


class Head(nn.Module):
    """A head of the same weights every time, and its loss: of the rows, weighted, in mode "none"."""

    def __init__(self, mode: str, name: str = "small", fuses: bool = True, **options: Any) -> None:
        super().__init__()
        data = Problem.of(name)
        self.weight, self.bias = nn.Parameter(data.linear_weight), nn.Parameter(data.linear_bias)
        self.hierarchy, self.reduction, self.fuses, self.options = data.hierarchy, "mean", fuses, options
        if mode == "none":
            self.reduction = "none"
        elif fuses:
            self.options = options | {"gradient": mode}

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        given = {"alpha": ALPHA, "reduction": self.reduction} | self.options
        if self.fuses:
            loss = longtail.linear_hierarchical_cross_entropy(
                x, self.weight, target, self.hierarchy, linear_bias=self.bias, chunk_size=5, **given
            )
        else:
            loss = longtail.hierarchical_cross_entropy(
                F.linear(x, self.weight, self.bias), target, self.hierarchy, **given
            )
        return (loss * torch.arange(1.0, len(x) + 1)).sum() if self.reduction == "none" else loss


def states(rows: int = N, name: str = "small") -> tuple[Tensor, Tensor]:
    data = Problem.of(name, rows=rows).clear()
    return data.x, data.target
