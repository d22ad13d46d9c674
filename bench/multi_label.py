"""timm's multi-label losses as contenders, where timm is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import labels
from .contenders import Contender, Problem
from .peers import usable

NAME = "timm"


def losses(problem: Problem) -> dict[str, tuple[str, dict[str, Any]]]:
    """timm's class and its arguments for each loss that it has, as eager.py and longtail compute it."""
    # Its focal_balance of 2 is in the authors' code and not in their paper.
    balanced = {"class_counts": problem.counts, "num_samples": labels.num_samples(problem.counts), "focal_balance": 1.0}
    return {
        "asymmetric": ("AsymmetricLossMultiLabel", {"disable_torch_grad_focal_loss": True, "reduction": "mean"}),
        "distribution_balanced": ("DistributionBalancedLoss", balanced),
        "zlpr": ("ZlprLoss", {}),  # its TwoWayLoss compares the rows of each class, too
    }


def _forward(kind: Any, arguments: dict[str, Any], target: Tensor) -> Callable[[Tensor], Tensor]:
    module = kind(**arguments).to(target.device)

    def forward(logits: Tensor) -> Tensor:
        loss: Tensor = module(logits, target)
        return loss

    return forward


def _peer(problem: Problem, target: Tensor, loss: str, name: str, arguments: dict[str, Any]) -> list[Contender]:
    kind = usable(
        f"timm's {name}",
        f"{NAME}.loss",
        name,
        # A few rows first.
        lambda found: _forward(found, arguments, target[:8])(problem.logits[:8].clone().requires_grad_()),
    )
    return [] if kind is None else [Contender(loss, NAME, _forward(kind, arguments, target))]


def peers(problem: Problem) -> list[Contender]:
    """timm's modules, which compute in float32 as eager.py does."""
    assert problem.labels is not None
    found = []
    for loss, (name, arguments) in losses(problem).items():
        found += _peer(problem, problem.labels.hot, loss, name, arguments)
    return found
