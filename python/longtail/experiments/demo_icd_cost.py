"""What the losses of ``demo --data icd`` cost, fused and in plain PyTorch: time, and memory of a larger batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..class_balance import effective_number_weight, ldam_margin, logit_adjustment
from ..hierarchical import Hierarchy
from . import plain_losses
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
    """The same loss as one would write it in PyTorch.

    Raises:
        ValueError: no such loss was written.
    """
    if method.alpha and paths is not None:
        levels = plain_losses.levels_of(paths)
        return functools.partial(plain_losses.hierarchical_loss, levels=levels, alpha=method.alpha)
    weight = effective_number_weight(counts, DRW_BETA if method.margin else method.beta or 0.0)
    if method.margin:
        margin = ldam_margin(counts, LDAM_MAX_MARGIN)
        return functools.partial(plain_losses.margin_loss, margin=margin, scale=LDAM_SCALE, weight=weight)
    if method.sigmoid:
        return functools.partial(plain_losses.sigmoid_focal_loss, weight=weight, gamma=method.gamma or 0.0)
    if method == Method(method.family, beta=method.beta, tau=method.tau, complement_gamma=method.complement_gamma):
        return functools.partial(
            plain_losses.softmax_loss,
            weight=None if method.beta is None else weight,
            class_bias=logit_adjustment(counts, method.tau) if method.tau else None,
            complement_gamma=method.complement_gamma,
        )
    raise ValueError(f"no plain form of {method.name} is known")
