"""What the losses of ``demo --data icd`` cost, fused and in plain PyTorch: time, and memory of a larger batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..class_balance import effective_number_weight, ldam_margin, logit_adjustment
from ..hierarchical import Hierarchy
from .demo_parts import LossTime, time_both
from .methods import DRW_BETA, LDAM_MAX_MARGIN, LDAM_SCALE, Method, loss_function
from .peak_memory import SMALLEST, PeakMemory
from .texts.settings import SETTINGS

Loss: TypeAlias = Callable[..., Tensor]
Paths: TypeAlias = "list[tuple[str, ...]] | None"

BATCH_SIZE = SETTINGS["icd"].batch_size
TIMED_ROUNDS = 40
MEMORY_ROWS = 20 * BATCH_SIZE  # tensors so large that malloc gives each back as soon as it is freed


class Cost(NamedTuple):
    """Of a loss: time of a training batch; bytes beyond the logits of ``MEMORY_ROWS`` rows, None where too few."""

    time: LossTime
    fused_bytes: int | None
    plain_bytes: int | None


def measure(method: Method, paths: Paths, counts: Tensor, train_target: Tensor) -> Cost:
    """Of random logits and random training texts.

    Raises:
        AssertionError: the fused loss or its gradient differ from the plain ones.
    """
    generator = torch.Generator().manual_seed(0)
    fused, plain = fused_loss(method, paths, counts), plain_loss(method, paths, counts)

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        logits = torch.randn(rows, counts.numel(), generator=generator)
        chosen = torch.randint(train_target.numel(), (rows,), generator=generator)
        return logits.tanh() if method.margin else 2 * logits, train_target[chosen]  # of LDAM they are cosines

    logits, target = batch(BATCH_SIZE)
    forms = [functools.partial(loss, target=target) for loss in (fused, plain)]
    time = time_both(forms[0], forms[1], logits, TIMED_ROUNDS, 1e-5 / BATCH_SIZE)
    logits, target = batch(MEMORY_ROWS)
    return Cost(time, *(peak_bytes(loss, logits, target) for loss in (fused, plain)))


def peak_bytes(loss: Loss, logits: Tensor, target: Tensor) -> int | None:
    """Of forward + backward, the gradient of the logits among them."""
    logits.requires_grad_()
    with PeakMemory(logits.device) as peak:
        torch.autograd.grad(loss(logits, target=target), logits)
    return peak.extra if logits.nbytes >= SMALLEST else None


def fused_loss(method: Method, paths: Paths, counts: Tensor) -> Loss:
    """As :class:`.methods.MethodTraining` has it; LDAM with the weights of the last epochs."""
    loss = loss_function(method, counts, None if paths is None else Hierarchy.from_paths(paths))
    return functools.partial(loss, weight=effective_number_weight(counts, DRW_BETA)) if method.margin else loss


def plain_loss(method: Method, paths: Paths, counts: Tensor) -> Loss:
    """The same loss as one would write it in PyTorch: torch's own function where it has one that helps."""
    if method.alpha:
        return functools.partial(_hierarchical, **_nodes(paths or [], method.alpha))
    if method.margin:
        margin, weight = ldam_margin(counts, LDAM_MAX_MARGIN), effective_number_weight(counts, DRW_BETA)
        return functools.partial(_with_margin, margin=margin, weight=weight)
    if method.sigmoid:
        weight = effective_number_weight(counts, method.beta or 0.0)
        return functools.partial(_sigmoid_focal, weight=weight, gamma=method.gamma or 0.0)
    if method.complement_gamma:
        return functools.partial(_complement, gamma=method.complement_gamma)
    if method.tau:
        return functools.partial(_adjusted, bias=logit_adjustment(counts, method.tau))
    if method.beta is not None:
        return functools.partial(_weighted, weight=effective_number_weight(counts, method.beta))
    return F.cross_entropy


def _adjusted(logits: Tensor, target: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(logits + bias, target)


def _weighted(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, weight, reduction="sum") / target.numel()


def _with_margin(logits: Tensor, target: Tensor, margin: Tensor, weight: Tensor) -> Tensor:
    shifted = logits.scatter_add(1, target[:, None], -margin[target][:, None])
    return F.cross_entropy(LDAM_SCALE * shifted, target, weight)


def _sigmoid_focal(logits: Tensor, target: Tensor, weight: Tensor, gamma: float) -> Tensor:
    labels = F.one_hot(target, logits.shape[1]).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    missed = 1 - (-losses).exp()
    return (weight[target] * (missed**gamma * losses).sum(1)).mean()


def _complement(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Cross-entropy, and the entropy of the other classes among themselves (Kim et al. 2021)."""
    others = logits.scatter(1, target[:, None], -math.inf).log_softmax(1)
    entropy = -(others.exp() * others.clamp(min=-100.0)).sum(1)  # without 0 * inf at the target
    return F.cross_entropy(logits, target) + gamma / (logits.shape[1] - 1) * entropy.mean()


def _hierarchical(logits: Tensor, target: Tensor, inside: Tensor, factors: Tensor, own: Tensor) -> Tensor:
    """Bertinetto et al. 2020: the probability of a node is the sum of its leaves'.

    Args:
        inside: which classes are below each inner node but the root, 0 or 1, [C, M].
        factors: of the logarithms of a class's nodes, [C, M], and of its own, [C].
    """
    log_p = logits.log_softmax(1)
    nodes = (log_p.exp() @ inside).log()
    return ((factors[target] * nodes).sum(1) - own[target] * log_p.gather(1, target[:, None])[:, 0]).mean()


def _nodes(paths: list[tuple[str, ...]], alpha: float) -> dict[str, Tensor]:
    """Arguments of :func:`_hierarchical`; lambda of the l-th node of a path is exp(-alpha l), counted from 1."""
    numbers: dict[tuple[str, ...], int] = {}
    for path in paths:
        for depth in range(1, len(path)):
            numbers.setdefault(path[:depth], len(numbers))
    inside = torch.zeros(len(paths), len(numbers))
    factors = torch.zeros(len(paths), len(numbers))
    for row, path in enumerate(paths):
        for depth in range(1, len(path)):
            inside[row, numbers[path[:depth]]] = 1.0
            factors[row, numbers[path[:depth]]] = math.exp(-alpha * (depth + 1)) - math.exp(-alpha * depth)
    own = torch.tensor([math.exp(-alpha * len(path)) for path in paths])
    return {"inside": inside, "factors": factors, "own": own}
