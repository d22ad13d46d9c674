"""Seesaw loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_number
from ..class_balance.counts import Counts
from ..class_balance.scales import Clamp, seesaw_mitigation
from ..signatures import refuse_unknown, with_options_of
from .class_balanced import checked_on_every_rank
from .softmax import cross_entropy, with_stats

SETS = ("class_mitigation", "compensation")
"""Options that follow from the arguments of Seesaw."""


@with_stats
@with_options_of(cross_entropy, without=["size_average", "reduce", *SETS])
def seesaw_loss(
    input: Tensor,
    target: Tensor,
    samples_per_class: Counts,
    p: float = 0.8,
    q: float = 2.0,
    *,
    empty: Clamp = "error",
    **options: Any,
) -> Any:
    r"""Seesaw loss (Wang et al. 2021): rare classes are spared, unless they are mistaken for the target.

    .. math::
        -\log \frac{e^{z_g}}{e^{z_g} + \sum_{j \ne g} S_{gj} e^{z_j}}, \quad
        S_{gj} = \min\left(1, \frac{n_j}{n_g}\right)^p \max\left(1, \frac{p_j}{p_g}\right)^q,

    the mitigation factor times the compensation factor, both constants; :math:`p_j / p_g = e^{z_j - z_g}`. The authors'
    code keeps :math:`p_g` above 0.01 in the ratio; the formula of the paper, and this loss, do not.

    Args:
        input: logits, as in :func:`longtail.cross_entropy`: (C,), (N, C) or (N, C, d1, ...). The paper's normalized
            head is :class:`longtail.training.NormalizedLinear` with ``scale=20`` here.
        target: class indices.
        samples_per_class: training samples of each class, [C]; or, as the paper has it, of those seen so far:
            ``StreamingClassFrequency(C, decay=1.0)``, and its ``counts()``. The vector is made at each call: training
            is better served by :class:`longtail.SeesawLoss`.
        p: >= 0, of the mitigation; 0 switches it off.
        q: >= 0, of the compensation; 0 switches it off.
        empty: what to do with classes without samples: "error" or "clamp" (counted as 1, as in the authors' code).
        options: of :func:`longtail.cross_entropy`, but for ``class_mitigation`` and ``compensation``.

    Predict from the raw logits.

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.seesaw_mitigation` and :func:`longtail.cross_entropy`.
    """
    refuse_unknown(seesaw_loss, options)
    dtype = torch.float64 if getattr(input, "dtype", None) == torch.float64 else torch.float32

    def factors() -> tuple[Tensor, float]:
        return seesaw_mitigation(samples_per_class, p, empty, dtype=dtype), check_number("q", q, 0.0)

    mitigation, q = checked_on_every_rank(input, factors)
    mitigation = mitigation.to(getattr(input, "device", None))
    return cross_entropy(input, target, class_mitigation=mitigation, compensation=q, **options)
