"""What the five numbers of a row say about it, and what a loss of that says back: any loss of a row.

stats (m, d, t, u_g, U) --row_statistics_of--> RowStatistics --any loss--> upstream --row_grad_of--> RowGrad
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..options import SoftmaxOptions
from .softmax import RowGrad, posterior
from .softmax_rows import Rows


class RowStatistics(NamedTuple):
    """What is known of each row after one pass over its logits; each of the target's shape.

    Everything refers to the effective logits of :func:`longtail.cross_entropy`, with temperature where there is one, p
    the softmax over the classes, g the target. Nats; float32 (float64 for float64 logits). Exact where p_g rounds to
    0 or 1. Rows that ``ignore_index`` names hold zeros and False.
    """

    log_prob: Tensor
    """Log-probability of the target, log p_g."""
    log_miss: Tensor
    """log(1 - p_g); -inf where the target is the only class."""
    lse: Tensor
    """Log-sum-exp over the classes."""
    entropy: Tensor
    """Entropy of p."""
    complement_entropy: Tensor
    """Entropy of the softmax over the classes other than the target."""
    correct: Tensor
    """bool: the target's logit is above all others. Never differentiable."""


def _product(p: Tensor, log: Tensor) -> Tensor:
    """``p * log``; 0 where p is, also of an infinite log."""
    return p * log.masked_fill(p == 0, 0.0)


def row_statistics_of(stats: Tensor) -> RowStatistics:
    """Of stats [N, 5], each [N]. ``H = H_b(p_g) + (1 - p_g) H_c``, H_b the entropy of hit and miss."""
    nll, log_miss, lse, complement_entropy = posterior(stats)
    p, miss = (-nll).exp(), log_miss.exp()
    entropy = _product(p, nll) - _product(miss, log_miss) + miss * complement_entropy
    return RowStatistics(-nll, log_miss, lse, entropy, complement_entropy, stats[:, 3] > stats[:, 0])


Upstream = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Gradients of a loss by the first five of RowStatistics, each [N]; None: 0."""


def row_grad_of(stats: Tensor, upstream: Upstream) -> RowGrad:
    """The coefficients of a row's gradient, of a loss with gradients ``upstream`` by RowStatistics; stats [N, 5].

    With q_j = exp(u_j - m) / d, l = m + log d and H, H_c the two entropies, the derivatives by u_j, j != g, and u_g are

        log p_g        -(1 - p_g) q_j                                   1 - p_g
        log(1 - p_g)   p_g q_j                                          -p_g
        lse            (1 - p_g) q_j                                    p_g
        H              -(1 - p_g) q_j (u_j - l + log(1 - p_g) + H)      -p_g (log p_g + H)
        H_c            -q_j (u_j - l + H_c)                             0

    The two of H are written by t / d, the mean of u_j - m, and m - u_g: their logarithms cancel, which costs digits.
    """
    by_log_prob, by_log_miss, by_lse, by_entropy, by_complement = upstream
    m, d, t, u_g, _ = stats.unbind(1)
    nll, log_miss, *_ = posterior(stats)
    p, miss = (-nll).exp(), log_miss.exp()
    inverse_d = torch.where(d == 0, 0.0, 1 / d)
    mean_shift = t * inverse_d
    a = b = target = zero = torch.zeros_like(d)  # of q_j (a + b (u_j - m)), and of u_g
    if by_log_prob is not None:
        a, target = a - by_log_prob * miss, target + by_log_prob * miss
    if by_log_miss is not None:
        a, target = a + by_log_miss * p, target - by_log_miss * p
    if by_lse is not None:
        a, target = a + by_lse * miss, target + by_lse * p
    if by_entropy is not None:
        lag = (m - u_g).masked_fill((p == 0) | (miss == 0), 0.0)
        a = a + by_entropy * miss * (miss * mean_shift - p * lag)
        b = b - by_entropy * miss
        target = target + by_entropy * p * miss * (lag + mean_shift)
    if by_complement is not None:
        a, b = a + by_complement * mean_shift, b - by_complement
    return RowGrad(torch.where(m == -torch.inf, 0.0, m), a * inverse_d, b * inverse_d, zero, target)


def row_statistics(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    class_bias: Tensor | None = None,
    class_margin: Tensor | None = None,
    class_scale: Tensor | None = None,
    target_scale: Tensor | None = None,
    class_mitigation: Tensor | None = None,
    compensation: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> RowStatistics:
    """:func:`longtail.row_statistics` for input [N, C], C > 0, and target [N], in plain PyTorch."""
    dtype = arithmetic_dtype(input.dtype)
    given = (None, class_bias, class_margin, class_scale, target_scale, class_mitigation)
    vectors: list[Any] = [None if x is None else x.to(dtype) for x in given]
    options = SoftmaxOptions(*vectors)._replace(ignore_index=ignore_index, compensation=compensation)
    options = options._replace(scale=scale / temperature, softcap=softcap and softcap / temperature)
    rows = Rows.of(input, target, options)
    *numbers, correct = row_statistics_of(rows.stats())
    kept = (x.masked_fill(~rows.counted, 0.0) for x in numbers)
    return RowStatistics._make((*kept, correct & rows.counted))
