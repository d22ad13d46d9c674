"""Hierarchical cross-entropy in plain PyTorch: the truth that its kernels are tested against, and the fallback.

The classes are the leaves of a tree. From the root A_0 down to A_D, the target g alone, the nodes above g are sets of
classes, each within the one before, and R_k = A_k without A_{k+1} is a ring. With logits u, weights lambda of the nodes
and S(A) the sum of exp(u_j) over A (Bertinetto et al. 2020, section 3.1):

    loss = v w_g sum_{l=1..D} lambda_l log(S(A_{l-1}) / S(A_l))

A ring is described by its maximum m and the sum d of exp(u_j - m), and never mixed with what it surrounds:
S(A_{l-1}) / S(A_l) is 1 + S(R_{l-1}) / S(A_l), so that neither P(A_l | A_{l-1}) nor one minus it is rounded away. Its
gradient has one coefficient for each ring: exp(u_j - m_k) c_k. Paths shorter than L nodes are padded by their last
node: the rings are empty there, and of an empty one P is 1 exactly.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..options import HierarchicalOptions
from ..signatures import refuse_unknown, with_options_of
from .sizes import Size, largest

_FAR = 40.0  # nats beyond which exp() of a lag is left out of a logarithm's argument


class Level(NamedTuple):
    """The step from a node to its child on the path, of each row."""

    nll: Tensor
    """-log P(A_l | A_{l-1})"""
    miss: Tensor
    """1 - P(A_l | A_{l-1})"""
    hit: Tensor
    """P(A_l | A_{l-1})"""
    unit: Tensor
    """exp(m) / S(A_{l-1}), of which the ring's probabilities within A_{l-1} are multiples."""


class RowGrad(NamedTuple):
    """dloss/du_j is exp(u_j - m[:, k]) * ring[:, k] in ring k, and ``target`` for the target."""

    ring: Tensor
    target: Tensor


def _finite(m: Tensor) -> Tensor:
    return m.masked_fill(m == -torch.inf, 0.0)


def climb(stats: Tensor, exact: Tensor | None = None) -> tuple[list[Level], Tensor]:
    """The levels of rows, top first, from stats [N, 2 L + 1]; and what poisons a row without any sum: 0 or NaN.

    ``exact``: exp(u_g - u_g), which is 1, for autograd.
    """
    depth = (stats.shape[1] - 1) // 2
    top = stats[:, -1].detach()  # S(A) is s * exp(top): differences of logits keep their digits at any offset
    s = torch.ones_like(top) if exact is None else exact
    levels: list[Level] = []
    for k in reversed(range(depth)):
        m, d = stats[:, 2 * k].detach(), stats[:, 2 * k + 1]
        lag = torch.where(d == 0, -torch.inf, m - top)
        behind = lag > 0
        of_ring, of_child = lag.clamp(max=0).exp(), (-lag.clamp(min=0)).exp()
        a, b = d * of_ring, s * of_child
        total = a + b
        far = lag > _FAR
        nll = torch.where(far, lag + (total / s).log(), (a / torch.where(far, 1.0, b)).log1p())
        levels.append(Level(nll, a / total, b / total, of_ring / total))
        top, s = torch.where(behind, m, top), total
    return levels[::-1], top - top


def losses(levels: list[Level], weights: Tensor, poison: Tensor) -> Tensor:
    """[N], without the factors of the rows. weights: lambda of the nodes of each row's path, [N, L]."""
    total = poison
    for level, weight in zip(levels, weights.unbind(1), strict=True):
        total = total + weight * level.nll
    return total


def row_grad(levels: list[Level], weights: Tensor, poison: Tensor, upstream: Tensor) -> RowGrad:
    """The coefficients of the gradient. upstream: [N], what multiplies each row's.

    c_k = (lambda_{k+1} - sum_{l<=k} lambda_l miss_l hit_{l+1} .. hit_k) / S(A_k), from that difference, or from the
    step of lambda and what is carried from ring to ring, whichever cancels less.
    """
    rings, kept, missed = [], weights[:, 0], torch.zeros_like(poison)
    for k, level in enumerate(levels):
        weight = weights[:, k]
        if k > 0:
            step, carried = weight - weights[:, k - 1], levels[k - 1].hit * kept
            kept = torch.where(step.abs() + carried.abs() < weight + missed, step + carried, weight - missed)
        rings.append(upstream * (level.unit * kept + poison))
        missed = missed * level.hit + weight * level.miss
    return RowGrad(torch.stack(rings, 1), upstream * (poison - missed))


def row_factor(g: Tensor, options: HierarchicalOptions, dtype: torch.dtype) -> Tensor:
    """v w_g, [N], in ``dtype``, for classes g [N]."""
    factor = torch.ones(g.shape, dtype=dtype, device=g.device)
    if options.weight is not None:
        factor = options.weight.to(dtype)[g]
    return factor if options.sample_weight is None else factor * options.sample_weight.to(dtype)


class Rows(NamedTuple):
    """A batch made ready: ignored rows are cleared, everything is in the dtype of the arithmetic."""

    u: Tensor
    g: Tensor
    """The column of each target, anything where another shard has it."""
    here: Tensor
    """Whether no other shard has it."""
    counted: Tensor
    rings: list[Tensor]
    """For each ring, the classes of each row that are in it, [N, C]."""
    weights: Tensor
    """lambda of the nodes of each row's path, [N, L]."""
    factor: Tensor
    """v w_g, [N]"""

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, options: HierarchicalOptions) -> Rows:
        """Of logits [N, C], C at least 1, and target [N]."""
        dtype, num_classes = arithmetic_dtype(logits.dtype), logits.shape[1]
        counted = target != options.ignore_index
        g = torch.where(counted, target, 0)
        u = logits.to(dtype)
        if options.class_bias is not None:
            u = u + options.class_bias.to(dtype)
        u = u.masked_fill(~counted[:, None], 0.0)
        nodes = options.path[g].long()  # [N, L]
        root = torch.zeros_like(nodes[:, :1])
        begin = torch.cat([root, options.node_begin[nodes].long()], 1)
        end = torch.cat([root + num_classes, options.node_end[nodes].long()], 1)
        place = options.position
        at = torch.arange(num_classes, device=logits.device) if place is None else place.long()
        inside = [(at >= begin[:, k, None]) & (at < end[:, k, None]) for k in range(begin.shape[1])]
        rings = [outer & ~inner for outer, inner in pairwise(inside)]
        here, leaf = end[:, -1] > begin[:, -1], begin[:, -1].clamp(max=num_classes - 1)
        column = leaf if options.order is None else options.order[leaf].long()
        weights = options.node_weight.to(dtype)[nodes]
        return cls(u, column, here, counted, rings, weights, row_factor(g, options, dtype))

    def stats(self) -> Tensor:
        """m and d of each ring, then u_g: [N, 2 L + 1]."""
        found = []
        for ring in self.rings:
            u = self.u.masked_fill(~ring, -torch.inf)
            m = u.detach().amax(1)
            found += [m, (u - _finite(m)[:, None]).exp().sum(1)]
        u_g = self.u.gather(1, self.g[:, None]).squeeze(1)
        return torch.stack([*found, u_g.masked_fill(~self.here, -torch.inf)], 1)

    def losses(self, stats: Tensor, exact: Tensor | None = None) -> Tensor:
        """[N], 0 where ignored."""
        levels, poison = climb(stats, exact)
        return (self.factor * losses(levels, self.weights, poison)).masked_fill(~self.counted, 0.0)

    def grad(self, stats: Tensor, grad_loss: Tensor) -> Tensor:
        """[N, C], of the losses times ``grad_loss`` [N]."""
        levels, poison = climb(stats)
        row = row_grad(levels, self.weights, poison, self.factor * grad_loss)
        grad = torch.zeros_like(self.u)
        for k, ring in enumerate(self.rings):
            m = _finite(stats[:, 2 * k])[:, None]
            grad = torch.where(ring, (self.u.masked_fill(~ring, -torch.inf) - m).exp() * row.ring[:, k, None], grad)
        own = torch.where(self.here, row.target, grad.gather(1, self.g[:, None])[:, 0])
        grad = grad.scatter(1, self.g[:, None], own[:, None])
        return grad.masked_fill(~self.counted[:, None], 0.0)


@with_options_of(HierarchicalOptions)
def hierarchical_loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Hierarchical cross-entropy of each row, [N], for logits [N, C] and target [N], of trees of any depth.

    ``options``: path, node_begin, node_end, order and position of :meth:`longtail.Hierarchy.tables`, node_weight of
    :meth:`longtail.Hierarchy.node_weight`, and weight, class_bias, sample_weight and ignore_index of
    :func:`longtail.hierarchical_cross_entropy`. Arithmetic is float64 for float64 logits, else float32. Differentiable,
    twice; but where the target's logit is -inf, autograd gives it 0, and the operators what the formula tends to.
    """
    refuse_unknown(hierarchical_loss, options)
    if logits.numel() == 0:
        return logits.to(arithmetic_dtype(logits.dtype)).sum(1)
    rows = Rows.of(logits, target, HierarchicalOptions(**options))
    stats = rows.stats()
    shift = stats[:, -1] - stats[:, -1].detach()
    return rows.losses(stats, shift.masked_fill(stats[:, -1].isinf(), 0.0).exp())


def gradient_size(counted: Tensor, alpha: float, w_g: Tensor | None, v: Tensor | None) -> Size:
    """A bound of the elements of the gradient of the losses' sum: every one is at most v w_g times the largest lambda.

    Args:
        counted: which rows are not ignored, [N]; w_g, v: of each row, None where all are 1.
        alpha: lambda is exp(-alpha depth).
    """
    compiling = torch.compiler.is_compiling()  # whose alpha may be a symbol, of which math.exp makes a constant
    size = (torch.ones((), device=counted.device) * -alpha).exp() if compiling else math.exp(-alpha)
    if w_g is None and v is None:
        return size
    row = torch.ones((), device=counted.device) if v is None else v.abs()
    return size * largest(row if w_g is None else row * w_g.abs(), counted)
