"""ZLPR and the two-way loss in plain PyTorch: the truth that their kernels are tested against, and the fallback.

Both compare the two sides of a row, the classes with y = 1 and those with y = 0, by one log-sum-exp of each; logits u,
targets y, temperatures T_p and T_n:

    l_p = T_p log sum_j y_j exp(-u_j / T_p)          l_n = T_n log sum_j (1 - y_j) exp(u_j / T_n)
    ZLPR (Su et al. 2022; soft targets as its soft version has them): T = 1, softplus(l_p) + softplus(l_n)
    two-way, over the classes of a row (Kobayashi 2023):              softplus(l_p + l_n)

A side is described by its largest exponent m and the sum d of y exp((-u - m) / T_p), or (1 - y) exp((u - m) / T_n). Of
a side without classes, or whose classes are all infinitely far, d is 0, and l is -inf: softplus of it is 0, and so is
its gradient. A class of one side alone is nothing to the other: a weight of 0 is left out, not multiplied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..options import TwoWayOptions
from ..signatures import refuse_unknown, with_options_of
from .sigmoid import one_hot
from .sizes import Size, largest


class Side(NamedTuple):
    """Of the classes of each row that are on one side."""

    u: Tensor
    """The logits, [N, C], of positives with the other sign."""
    inside: Tensor
    """Which classes are on it, [N, C]."""
    weight: Tensor
    """y or 1 - y, [N, C]."""
    temperature: float

    def exponents(self, m: Tensor) -> Tensor:
        """exp((u - m) / T) times the weight, [N, C], 0 outside; m [N] is no -inf."""
        shift = torch.where(self.inside, (self.u - m[:, None]) / self.temperature, -torch.inf)
        return torch.where(self.inside, self.weight, 0.0) * shift.exp()

    def stats(self) -> tuple[Tensor, Tensor]:
        """m and d, [N]."""
        m = self.u.detach().masked_fill(~self.inside, -torch.inf).nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1)
        return m, self.exponents(m.masked_fill(m.isinf(), 0.0)).sum(1)


class RowLoss(NamedTuple):
    """The loss of each row, and its derivatives by d of the negatives and by d of the positives, times T / d."""

    loss: Tensor
    negative: Tensor
    positive: Tensor


def _softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)  # F.softplus turns linear at 20 and loses digits there


def finish(stats: tuple[Tensor, Tensor, Tensor, Tensor], options: TwoWayOptions) -> RowLoss:
    """Of (m, d) of the negatives, then of the positives."""
    m_n, d_n, m_p, d_p = stats
    empty_n, empty_p = d_n == 0, d_p == 0
    log_n = options.negative_temperature * torch.where(empty_n, 1.0, d_n).log()
    log_p = options.positive_temperature * torch.where(empty_p, 1.0, d_p).log()
    if options.joint:
        total = d_n + d_p
        poison = torch.where(total.isnan(), total, 0.0)  # of one side, where the other is empty
        lag = (_finite(m_n) + _finite(m_p)) + (log_n + log_p)
        lag = torch.where(empty_n | empty_p, -torch.inf, lag)
        loss, slope_n = _softplus(lag) + poison, lag.sigmoid() + poison
        slope_p = slope_n
    else:
        l_n = torch.where(empty_n, -torch.inf, _finite(m_n) + log_n)
        l_p = torch.where(empty_p, -torch.inf, _finite(m_p) + log_p)
        loss, slope_n, slope_p = _softplus(l_n) + _softplus(l_p), l_n.sigmoid(), l_p.sigmoid()
    by_n, by_p = (torch.where(e, 0.0, s / d) for e, s, d in ((empty_n, slope_n, d_n), (empty_p, slope_p, d_p)))
    return RowLoss(loss, by_n, by_p)


def _finite(m: Tensor) -> Tensor:
    """0 in the place of infinities, which d holds."""
    return m.masked_fill(m.isinf(), 0.0)


class Rows(NamedTuple):
    """A batch made ready: what is ignored is cleared, everything is in the dtype of the arithmetic."""

    negatives: Side
    positives: Side
    counted: Tensor
    """Which rows count, [N]."""
    factor: Tensor
    """The sample weight, [N]."""
    options: TwoWayOptions

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, options: TwoWayOptions) -> Rows:
        """Of logits [N, C], C at least 1, and target [N] (classes) or [N, C] (float)."""
        dtype, dense = arithmetic_dtype(logits.dtype), target.dim() == 2
        ignored = torch.zeros_like(target, dtype=torch.bool)
        if options.ignore_index is not None:
            ignored = target == options.ignore_index
        u, safe = logits.to(dtype), target.masked_fill(ignored, 0)
        if options.class_bias is not None:
            u = u + options.class_bias.to(dtype)
        y = safe.to(dtype) if dense else one_hot(safe, u)
        here = ~ignored if dense else ~ignored[:, None].expand(y.shape)
        u = u.masked_fill(~here, 0.0)
        positive, negative = ~(y <= 0) & here, ~(y >= 1) & here  # NaN is on both
        counted = positive.any(1) if options.joint else here.any(1) | dense
        factor = u.new_ones(len(u)) if options.sample_weight is None else options.sample_weight.to(dtype)
        return cls(
            Side(u, negative, 1 - y, options.negative_temperature),
            Side(-u, positive, y, options.positive_temperature),
            *(counted, factor, options),
        )

    def stats(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """m and d of the negatives, then of the positives, [N] each."""
        return (*self.negatives.stats(), *self.positives.stats())

    def losses(self, stats: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """[N], 0 where a row does not count."""
        found = self.factor * finish(stats, self.options).loss
        return torch.where(self.counted, found, 0.0)

    def grad(self, stats: tuple[Tensor, Tensor, Tensor, Tensor], grad_loss: Tensor) -> Tensor:
        """[N, C], of the losses times ``grad_loss`` [N]."""
        row, factor = finish(stats, self.options), self.factor * grad_loss
        grad = torch.zeros_like(self.negatives.u)
        for side, by, m in ((self.negatives, row.negative, stats[0]), (self.positives, -row.positive, stats[2])):
            slope = side.exponents(m.masked_fill(m == -torch.inf, 0.0)) * (factor * by)[:, None]
            grad = grad + torch.where(side.inside, slope, 0.0)
        return torch.where(self.counted[:, None], grad, 0.0)


@with_options_of(TwoWayOptions)
def two_way_loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Losses of rows, [N], for logits [N, C] and target [N] (classes) or [N, C] (float in [0, 1]).

    ``joint``: the two-way loss; else ZLPR, of whatever temperatures. class_bias: [C]; sample_weight: [N]. ignore_index:
    rows, or elements, with this target do not count; nor does, where ``joint``, a row without a positive. Arithmetic is
    float64 for float64 logits, else float32. Differentiable, twice.
    """
    refuse_unknown(two_way_loss, options)
    if logits.numel() == 0:
        return logits.to(arithmetic_dtype(logits.dtype)).sum(1)
    rows = Rows.of(logits, target, TwoWayOptions(**options))
    return rows.losses(rows.stats())


def gradient_size(target: Tensor, options: TwoWayOptions) -> Size:
    """A bound of the elements of the gradient of the losses' sum, of float16 logits: every one is at most v."""
    if options.sample_weight is None:
        return 1.0
    counted = torch.ones((), dtype=torch.bool, device=target.device)
    if target.dim() == 1 and options.ignore_index is not None:
        counted = target != options.ignore_index
    return largest(options.sample_weight.abs(), counted)
