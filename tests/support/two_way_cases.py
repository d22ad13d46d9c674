"""Standing cases of ZLPR and the two-way loss, their formulas as their papers write them, and batches of operators."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

import cases
import sigmoid_cases
from batches import STATS_FACTOR, Batch, Kernels, as_rows
from longtail.ops import fallback_two_way as fallback
from longtail.ops.layout import row_count
from tolerances import assert_close

KINDS = sigmoid_cases.TARGETS
# name -> (joint, positive_temperature, negative_temperature, vectors)
OPTION_SETS: dict[str, tuple[Any, ...]] = {
    "zlpr": (False, 1.0, 1.0),
    "zlpr_vectors": (False, 1.0, 1.0, "class_bias", "sample_weight"),
    "two_way": (True, 4.0, 1.0),
    "two_way_vectors": (True, 0.7, 2.5, "class_bias", "sample_weight"),
}


def naive(logits: Tensor, target: Tensor, joint: bool, **options: Any) -> Tensor:
    """Losses of the rows of [N, C] logits by log-sum-exps over all classes, those of weight 0 at -inf."""
    ignored = target == cases.IGNORE
    y = target.masked_fill(ignored, 0).to(logits.dtype) if target.dim() == 2 else sigmoid_cases.one_hot(target, logits)
    z = logits + options.get("class_bias", 0.0)
    positive, negative = y.log(), (1 - y).log()
    if target.dim() == 2:
        positive, negative = (x.masked_fill(ignored, -torch.inf) for x in (positive, negative))
    zero = torch.zeros_like(z[:, :1])
    if joint:
        t_p, t_n = options.get("positive_temperature", 1.0), options.get("negative_temperature", 1.0)
        l_p, l_n = t_p * (positive - z / t_p).logsumexp(1), t_n * (negative + z / t_n).logsumexp(1)
        loss = torch.logaddexp(zero[:, 0], l_p + l_n)
    else:
        loss = torch.cat([zero, positive - z], 1).logsumexp(1) + torch.cat([zero, negative + z], 1).logsumexp(1)
    if target.dim() == 1:
        loss = torch.where(ignored, 0.0, loss)
    return loss * options.get("sample_weight", 1.0)


def random_case(
    shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits and targets, few of them positive; where each element has one, no positive in the first row or pixel."""
    logits, target = sigmoid_cases.random_case(shape, kind, dtype, seed)
    if kind != "class" and target.numel():
        g = cases.generator(seed + 1)
        target.masked_fill_((torch.rand(shape, generator=g) < 0.6) & (target > 0), 0.0)
        first = target[0] if target.dim() == 2 else target[0, :, 0]
        first.masked_fill_(first > 0, 0.0)
    return logits, target


def options(name: str, logits: Tensor, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments, those of one loss or of the other; vectors in `vector_dtype` of the logits."""
    g, dtype = cases.generator(3000 + seed), cases.vector_dtype(logits.dtype)
    joint, positive, negative, *vectors = OPTION_SETS[name]
    result: dict[str, Any] = {"joint": joint, "ignore_index": cases.IGNORE}
    result |= {"positive_temperature": positive, "negative_temperature": negative}
    shapes = {"class_bias": (logits.shape[1],), "sample_weight": (logits.shape[0], *logits.shape[2:])}
    for entry in vectors:
        result[entry] = (2 * torch.rand(shapes[entry], generator=g, dtype=torch.float64)).to(dtype)
    return result


def operator_options(given: dict[str, Any]) -> list[Any]:
    """The operators' trailing arguments, in schema order."""
    rows = given.get("sample_weight")
    vectors = [given.get("class_bias"), None if rows is None else rows.reshape(-1)]
    numbers = [given.get(name, 1.0) for name in ("positive_temperature", "negative_temperature")]
    return [*vectors, given.get("ignore_index", cases.IGNORE), *numbers, given["joint"]]


def poisoned(logits: Tensor, target: Tensor, joint: bool) -> Tensor:
    """What is ignored holds NaN; so does, where it does not count, a row without a positive."""
    logits = sigmoid_cases.poisoned(logits, target)
    if joint and target.shape == logits.shape:
        logits = logits.masked_fill(~(target > 0).any(1, keepdim=True), torch.nan)
    return logits


class TwoWayKernels(Kernels, Protocol):
    """Those that know these losses."""

    def two_way(self, batch: TwoWayBatch, otherwise: bool = False) -> None:
        """Fills z, losses, stats and grads."""


class TwoWayBatch(Batch):
    kernels: TwoWayKernels

    def __init__(
        self,
        kernels: TwoWayKernels,
        case: tuple[Tensor, Tensor],
        given: dict[str, Any],
        up: Tensor | None = None,
        **how: str,
    ) -> None:
        if up is None:
            up = cases.upstreams((row_count(case[0]),), cases.vector_dtype(case[0].dtype))["random"]
        super().__init__(kernels, case, operator_options(given), up, **how)

    @classmethod
    def of(
        cls, kernels: TwoWayKernels, shape: tuple[int, ...], kind: str, name: str, dtype: torch.dtype = torch.float32,
        **how: Any,
    ) -> TwoWayBatch:  # fmt: skip
        logits, target = random_case(shape, kind, dtype)
        given = options(name, logits)
        return cls(kernels, (poisoned(logits, target, given["joint"]), target), given, **how)

    @property
    def y(self) -> Tensor:
        """The target as the operators take it."""
        return self.laid(self.target) if self.target.is_floating_point() else self.target.view(-1)

    def run(self, otherwise: bool = False) -> None:
        self.kernels.two_way(self, otherwise)

    def check(self, factor: float = 1.0) -> None:
        """Every output against float64, and whatever does not count."""
        z, dense = as_rows(self.logits), self.target.is_floating_point()
        y = as_rows(self.target) if dense else self.target.flatten()
        wide = y.double() if dense else y
        truth = fallback.two_way_loss_and_grad(self.up.double(), z.double(), wide, *self.wide())
        eager = fallback.two_way_loss_and_grad(self.up, z, y, *self.tail)
        for loss in self.losses:
            assert_close(loss, truth[0], eager[0], what="loss", factor=factor)
        defined = ~truth[0].isnan()
        for stats in self.stats:
            parts = stats[defined], truth[1][defined], eager[1][defined]
            assert_close(*parts, what="stats", factor=STATS_FACTOR * factor)
            by_column = self.logits.dim() == 3
            assert len(stats) < 2 or stats.stride() == ((1, len(stats)) if by_column else (4, 1))
        self.check_gradients(truth[2], eager[2], factor)
        ignored, joint = y == self.tail[2], self.tail[-1]
        rows = ~((y > 0) | y.isnan()).any(1) if dense and joint else ignored if not dense else None
        elements = ignored if dense else ignored[:, None].expand_as(z)
        for grad in self.grads:
            assert (as_rows(grad)[elements] == 0).all(), "what is ignored is exactly 0"
        if rows is not None:
            for value in (*self.losses, *self.stats, *self.grads):
                assert (as_rows(value)[rows] == 0).all(), "rows that do not count are exactly 0"
