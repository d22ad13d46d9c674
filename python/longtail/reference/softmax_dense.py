"""The softmax family over batches of rows whose targets are a probability for each class, in plain PyTorch.

With ``y'_j = (1 - label_smoothing) y_j + label_smoothing / C`` and ``q_j = w_j y'_j``, over effective logits u:

    loss = v sum_j q_j (lse - u_j) + z_loss lse^2
    dloss/du_j = v (W p_j - q_j) + 2 z_loss lse p_j,    W = sum_j q_j

A class with ``y'_j = 0`` at ``u_j = -inf`` contributes nothing. Differentiable, twice, in logits, targets and weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..errors import ArgumentValueError
from ..options import SoftmaxOptions
from . import softmax
from .effective import Effective


def refuse_class_options(options: SoftmaxOptions) -> None:
    """Those that mean something for one target class alone; ``options`` as the operators take them."""
    for field in options.of_one_class():
        raise ArgumentValueError(f"longtail: {field} needs class indices as targets")


class DenseRows(NamedTuple):
    """A batch made ready; everything is in the dtype of the arithmetic."""

    effective: Effective
    log_prob: Tensor
    """Of the classes, 0 where a class contributes nothing."""
    q: Tensor
    options: SoftmaxOptions

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, options: SoftmaxOptions) -> DenseRows:
        """Of logits and target [N, C]; the vectors in the dtype of the arithmetic."""
        dtype, smoothing = arithmetic_dtype(logits.dtype), options.label_smoothing
        effective = Effective.of_all(logits.to(dtype), options)
        u = effective.u
        y = target.to(dtype)
        if smoothing:
            y = y * (1 - smoothing) + smoothing / max(logits.shape[1], 1)
        log_prob = F.log_softmax(u, 1)
        absent = (y == 0) & (log_prob == -torch.inf)  # of the others the gradient by y is needed too
        q = y if options.weight is None else (y * options.weight).masked_fill(absent, 0.0)
        return cls(effective, log_prob.masked_fill(absent, 0.0), q, options)

    def stats(self) -> Tensor:
        """[N, 5], of C > 0: the maximum m, the sum of exp(u_j - m), 0, W, 0."""
        m = self.effective.u.amax(1, keepdim=True)
        e, _ = softmax.shifted_exp(self.effective.u, m)
        zero = torch.zeros_like(m)
        return torch.cat([m, e.sum(1, keepdim=True), zero, self.q.sum(1, keepdim=True), zero], 1)

    def losses(self) -> Tensor:
        """[N]"""
        loss = -(self.log_prob * self.q).sum(1)
        if self.options.sample_weight is not None:
            loss = loss * self.options.sample_weight
        return loss + self.options.z_loss * self.effective.u.logsumexp(1).square() if self.options.z_loss else loss

    def grad(self, stats: Tensor, grad_loss: Tensor) -> Tensor:
        """[N, C], of the losses times ``grad_loss`` [N]."""
        m, d, _, W, _ = stats.unbind(1)
        options, v = self.options, self.options.sample_weight
        by_lse, by_logits = (W, grad_loss) if v is None else (v * W, v * grad_loss)
        if options.z_loss:
            by_lse = by_lse + 2 * options.z_loss * (m + d.log())
        p = softmax.shifted_exp(self.effective.u, m[:, None])[0] / d[:, None]
        du = (grad_loss * by_lse)[:, None] * p - by_logits[:, None] * self.q
        return self.effective.gradient(du)
