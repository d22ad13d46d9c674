"""Class probabilities through the operators of the softmax family, against their formula in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import cases
from batches import STATS_FACTOR, Batch, Kernels
from layouts import laid
from longtail.options import SoftmaxOptions
from tolerances import assert_close

# Those of cases.OPTION_SETS that class probabilities can have, and all of them together.
OPTION_SETS = ("plain", "weight", "smoothing", "smoothing_weight", "class_bias", "scale", "softcap", "z_loss",
               "sample_weight", "mixed")  # fmt: skip
NEED_CLASSES = ("class_margin", "focal_gamma", "complement_gamma")


def options(name: str, classes: int, rows: int) -> cases.Options:
    found = cases.options(name, classes, torch.zeros(rows))
    return {key: value for key, value in found.items() if key not in NEED_CLASSES}


def random_case(
    shape: tuple[int, int], dtype: torch.dtype = torch.float32, target_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Logits and probabilities [N, C]: spread out, of two classes, of one, and in turn."""
    rows, classes = shape
    logits, index = cases.random_case(rows, classes, dtype, ignore=False)
    g = cases.generator(11)
    target = torch.rand(shape, generator=g, dtype=torch.float64).pow(4)
    target /= target.sum(1, keepdim=True)
    one_hot = torch.nn.functional.one_hot(index, classes).double()
    target[1::3] = 0.7 * one_hot[1::3] + 0.3 * one_hot.roll(1, 1)[1::3]
    target[2::3] = one_hot[2::3]
    return logits, target.to(target_dtype or dtype)


def formula(
    up: Tensor, z: Tensor, y: Tensor, values: Sequence[object], entire: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [N], statistics [N, 5] and gradient [N, C] in the dtype of z.

    entire: with terms of probability 0 at a logit of -inf, which are 0.
    """
    o = SoftmaxOptions(*values)
    capped = o.scale * z
    if o.softcap:
        capped = o.softcap * torch.tanh(capped / o.softcap)
    u = capped if o.class_bias is None else capped + o.class_bias
    classes = max(z.shape[1], 1)
    wy = (1 - o.label_smoothing) * y + o.label_smoothing / classes
    wy = wy if o.weight is None else wy * o.weight
    v = torch.ones_like(up) if o.sample_weight is None else o.sample_weight
    m = u.amax(1)
    e = (u - m[:, None]).exp()
    d, total = e.sum(1), wy.sum(1)
    lse, p = m + d.log(), e / d[:, None]
    terms = wy * (lse[:, None] - u)
    terms = terms.masked_fill((wy == 0) & (u == -torch.inf) & (lse > -torch.inf)[:, None], 0.0) if entire else terms
    loss = v * terms.sum(1) + o.z_loss * lse.square()
    du = up[:, None] * (v[:, None] * (total[:, None] * p - wy) + 2 * o.z_loss * lse[:, None] * p)
    grad = du * o.scale
    if o.softcap:
        grad = grad * (1 - (capped / o.softcap).square())
    zero = torch.zeros_like(m)
    return loss, torch.stack((m, d, zero, total, zero), 1), grad


class DenseBatch(Batch):
    """One batch through softmax_loss and softmax_loss_backward."""

    def __init__(
        self,
        kernels: Kernels,
        case: tuple[Tensor, Tensor],
        given: cases.Options,
        up: Tensor | None = None,
        target_layout: str | None = None,
        **how: str,
    ) -> None:
        logits, _ = case
        if up is None:
            up = cases.upstreams(logits.shape[:1], cases.vector_dtype(logits.dtype))["random"]
        super().__init__(kernels, case, cases.operator_options(logits.shape[1], given), up, **how)
        self.target_layout = target_layout or self.layout

    @property
    def y(self) -> Tensor:
        return laid(self.target, self.target_layout)

    def run(self, otherwise: bool = False) -> None:
        self.kernels.dense(self, otherwise)

    def check(self, factor: float = 1.0) -> None:
        """Every output against float64."""
        truth = formula(self.up.double(), self.logits.double(), self.target.double(), self.wide())
        eager = formula(self.up.float(), self.logits.float(), self.target.float(), self.tail)
        (loss,), (stats,) = self.losses, self.stats
        assert_close(loss, truth[0], eager[0], what="loss", factor=factor)
        defined = ~truth[0].isnan()
        parts = (x[1][defined] for x in (truth, eager))
        assert_close(stats[defined], *parts, what="stats", factor=STATS_FACTOR * factor)
        assert len(stats) < 2 or stats.is_contiguous()
        self.check_gradients(truth[2], eager[2].to(self.logits.dtype), factor)
