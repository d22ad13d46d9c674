"""Standing cases of the sigmoid family, and its formulas written out as one writes them in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cases
from longtail.options import SigmoidOptions

TARGETS = ("class", "hard", "soft")

# name -> (alpha, gamma, class vectors and row weights)
OPTION_SETS: dict[str, tuple[Any, ...]] = {
    "plain": (None, 0.0),
    "weight": (None, 0.0, "weight"),
    "pos_weight": (None, 0.0, "pos_weight"),
    "alpha": (0.25, 0.0),
    "focal_half": (None, 0.5),
    "focal": (0.25, 2.0),
    "sample_weight": (None, 1.0, "sample_weight"),
    "mixed": (0.3, 1.5, "weight", "pos_weight", "sample_weight"),
    "mixed_square": (0.7, 2.0, "weight", "pos_weight", "sample_weight"),
    "by_target": (None, 2.0, "weight", "by_target", "sample_weight"),
}


def torchvision_focal(inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """torchvision.ops.sigmoid_focal_loss with reduction="none", its formula term by term."""
    p = torch.sigmoid(inputs)
    ce = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce * ((1 - p_t) ** gamma)
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return loss


def one_hot(target: Tensor, logits: Tensor) -> Tensor:
    """Float one-hot of the logits' shape; ignored rows are all zero."""
    hot = F.one_hot(target.clamp(min=0), logits.shape[1]).movedim(-1, 1)
    return torch.where((target == cases.IGNORE).unsqueeze(1), 0, hot).to(logits.dtype)


def naive(logits: Tensor, target: Tensor, elementwise: bool = False, **options: Any) -> Tensor:
    """Losses of (N, C, ...) logits, element by element or summed over dimension 1; for moderate logits only."""
    dense = target.shape == logits.shape
    ignored = target == cases.IGNORE
    y = target.masked_fill(ignored, 0).to(logits.dtype) if dense else one_hot(target, logits)
    column = [1, -1] + [1] * (logits.dim() - 2)
    pos = options["pos_weight"].view(column) if "pos_weight" in options else 1.0
    ignored = ignored if dense else ignored.unsqueeze(1).expand_as(logits)
    z = torch.where(ignored, 0, logits)
    p = torch.sigmoid(z)
    ce = -(pos * y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z))
    loss = ce * (y * (1 - p) + (1 - y) * p) ** options.get("gamma", 0.0)
    alpha = options.get("alpha")
    if alpha is not None:
        loss = loss * (alpha * y + (1 - alpha) * (1 - y))
    if options.get("class_weight_by_target"):
        loss = loss * options["weight"][target.clamp(min=0)].unsqueeze(1)
    elif "weight" in options:
        loss = loss * options["weight"].view(column)
    if "sample_weight" in options:
        loss = loss * options["sample_weight"].unsqueeze(1)
    loss = torch.where(ignored, 0, loss)
    return loss if elementwise else loss.sum(1)


def random_case(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Logits (N, C, ...) and class indices, or targets of their shape: hard (0, 1) or soft; some are ignored."""
    g = cases.generator(seed)
    logits = (torch.randn(shape, generator=g, dtype=torch.float64) * spread).to(dtype)
    if kind == "class":
        target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=g)
    else:
        target = torch.randint(2, shape, generator=g).to(cases.vector_dtype(dtype))
        if kind == "soft":
            soft = torch.rand(shape, generator=g, dtype=torch.float64).to(target.dtype)
            target = torch.where(torch.rand(shape, generator=g) < 0.7, soft, target)
    target.view(-1)[1::7] = cases.IGNORE
    return logits, target


def poisoned(logits: Tensor, target: Tensor) -> Tensor:
    """Rows, pixels or elements that are ignored hold NaN."""
    ignored = target == cases.IGNORE
    return logits.masked_fill(ignored if target.shape == logits.shape else ignored.unsqueeze(1), torch.nan)


def options(name: str, logits: Tensor, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of the public functions; class vectors and weights in `vector_dtype` of the logits."""
    g = cases.generator(2000 + seed)
    dtype = cases.vector_dtype(logits.dtype)
    alpha, gamma, *rest = OPTION_SETS[name]
    result: dict[str, Any] = {"alpha": alpha, "gamma": gamma, "ignore_index": cases.IGNORE}
    for entry in rest:
        if entry == "by_target":
            result["class_weight_by_target"] = True
        elif entry == "sample_weight":
            rows = (logits.shape[0], *logits.shape[2:])
            result[entry] = (2 * torch.rand(rows, generator=g, dtype=torch.float64)).to(dtype)
        else:
            result[entry] = (0.2 + 2 * torch.rand(logits.shape[1], generator=g, dtype=torch.float64)).to(dtype)
    return result


def sets_for(kind: str) -> list[str]:
    """The option sets that targets of this kind take."""
    return [name for name, entry in OPTION_SETS.items() if kind == "class" or "by_target" not in entry]


def operator_options(opts: dict[str, Any]) -> list[Any]:
    """The operators' trailing arguments (without `elementwise`), in schema order."""
    rows = opts.get("sample_weight")
    named = {**opts, "ignore_index": cases.IGNORE, "sample_weight": None if rows is None else rows.reshape(-1)}
    return list(SigmoidOptions(**named))
