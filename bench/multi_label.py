"""timm's multi-label losses as contenders, where timm is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import labels
from .contenders import Contender, Problem
from .peers import usable


def losses(problem: Problem) -> dict[str, tuple[str, dict[str, Any]]]:
    """timm's class and its arguments for each loss that it has, as eager.py and longtail compute it."""
    # balance: the factor of 2 that the authors' code of the distribution-balanced loss has and their paper has not.
    balanced = {"class_counts": problem.counts, "num_samples": labels.num_samples(problem.counts), "focal_balance": 1.0}
    return {
        "asymmetric": ("AsymmetricLossMultiLabel", {"disable_torch_grad_focal_loss": True, "reduction": "mean"}),
        "distribution_balanced": ("DistributionBalancedLoss", balanced),
    }


def _bound(module: Callable[[Tensor, Tensor], Tensor], target: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: module(logits, target)


def peers(problem: Problem) -> list[Contender]:
    """timm's modules, which compute in float32 as eager.py does."""
    assert problem.labels is not None
    found, hot, device = [], problem.labels.hot, problem.logits.device
    for loss, (name, arguments) in losses(problem).items():
        # A few rows first.
        few = problem.logits[:8].clone().requires_grad_()
        peer = usable(
            f"timm's {name}", "timm.loss", name, lambda f, a=arguments, few=few: f(**a).to(device)(few, hot[:8])
        )
        if peer is not None:
            found.append(Contender(loss, "timm", _bound(peer(**arguments).to(device), hot)))
    return found
