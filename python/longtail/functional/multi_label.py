"""Losses of the sigmoid family for rows with several labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype, check_number
from ..class_balance.counts import Counts
from ..class_balance.rebalancing import rebalancing
from ..class_balance.scales import Clamp
from ..options import SIGMOID_INNER, Request, SigmoidOptions, sigmoid_request
from ..sigmoid.loss import sigmoid_loss
from ..signatures import refuse_unknown, with_options_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .sigmoid import ElementKeywords

    class AsymmetricKeywords(ElementKeywords, total=False):
        weight: Tensor | None
        pos_weight: Tensor | None
        alpha: float | Tensor | None
        class_weight_by_target: bool


@with_options_of(SigmoidOptions, Request, without=["return_stats", "gamma", *SIGMOID_INNER])
def asymmetric_loss(
    input: Tensor,
    target: Tensor,
    gamma_positive: float | Tensor = 1.0,
    gamma_negative: float = 4.0,
    clip: float = 0.05,
    *,
    detach: bool = True,
    reduction: str = "mean",
    **options: Unpack[AsymmetricKeywords],
) -> Tensor:
    r"""Asymmetric loss, ASL (Ridnik et al. 2021), with the shifted probability of their eq. 4 for negatives:

    .. math:: L_+ = -(1 - p)^{\gamma_+} \log p, \quad L_- = -p_m^{\gamma_-} \log(1 - p_m), \quad p_m = \max(p - m, 0)

    Negatives with :math:`p \le m` have loss 0 and gradient 0. Nothing else is clipped: the logarithm that the authors'
    code cuts off at 1e-8 is exact here for every finite logit, in value and gradient.

    Args:
        input: logits, as in :func:`longtail.sigmoid_focal_loss`.
        target: a target for each element, 0, 1 or soft in between; of these the exponent is
            :math:`y \gamma_+ + (1 - y) \gamma_-`, and :math:`1 - p_t = y (1 - p) + (1 - y) p_m`. Or class indices:
            one-hot implied, never built. The authors' loss of that name for a single label is a softmax loss:
            ``cross_entropy(focal_gamma=gamma_positive)``, where it smooths no labels.
        gamma_positive: >= 0, or one for each class, [C].
        gamma_negative: >= 0.
        clip: m in [0, 1); 0 is no shift.
        detach: whether the gradient takes the focusing factors for constants, as the authors' code does by default.
        reduction: "mean" (over the elements), "sum" (the authors'), "rows" or "none". timm's "batchmean" is "mean" with
            ``normalizer="rows"``.
        options: the others of :func:`longtail.sigmoid_focal_loss`; alpha is off.

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.sigmoid_focal_loss`.
    """
    refuse_unknown(asymmetric_loss, options)
    if not isinstance(gamma_positive, Tensor) or gamma_positive.dim() == 0:
        dtype = arithmetic_dtype(input.dtype) if isinstance(input, Tensor) else torch.float32
        gamma_positive = check_number("gamma_positive", gamma_positive, 0.0, dtype=dtype)
    named: dict[str, Any] = {"gamma": gamma_positive, "gamma_negative": gamma_negative, "clip": clip, "detach": detach}
    return sigmoid_loss(input, target, *sigmoid_request(reduction=reduction, **named, **options))


SETS = ("class_bias", "negative_scale")
"""Options that follow from the arguments of the distribution-balanced loss."""


@with_options_of(SigmoidOptions, Request, without=["return_stats", *SETS, *SIGMOID_INNER])
def distribution_balanced_loss(
    input: Tensor,
    target: Tensor,
    samples_per_class: Counts,
    num_samples: int,
    gamma: float | Tensor = 2.0,
    *,
    kappa: float = 0.05,
    negative_scale: float = 2.0,
    rebalance_alpha: float = 0.1,
    rebalance_beta: float = 10.0,
    rebalance_mu: float = 0.2,
    empty: Clamp = "error",
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    r"""Distribution-balanced loss (Wu et al. 2020): re-balanced weights, scaled and shifted negatives, focal factor.

    .. math::
        \hat r_j \left(y_j (1 - \sigma(u_j))^\gamma\, \mathrm{softplus}(-u_j)
        + (1 - y_j)\, \sigma(\lambda u_j)^\gamma\, \tfrac{1}{\lambda} \mathrm{softplus}(\lambda u_j)\right), \quad
        u_j = z_j - \nu_j

    with :math:`\nu_j = \frac{\kappa}{\lambda} \log(N / n_j - 1)`, and, from the labels of the row alone,
    :math:`\hat r_j = \alpha + \sigma(\beta (r_j - \mu))`, :math:`r_j = (1 / n_j) / \sum_i y_i / n_i`: how much of the
    row's chance to be drawn is due to class j. Of a row without labels r is infinite. No weight of each element is ever
    built. Of soft targets the focal factor is that of :func:`longtail.sigmoid_focal_loss`. The authors' code multiplies
    the focal form by 2 besides.

    Args:
        input, target: as in :func:`longtail.sigmoid_focal_loss`; class indices are rows with one label.
        samples_per_class: n, rows with each label, [C] (:func:`longtail.class_counts`).
        num_samples: N, all of the rows. The class vectors are made at each call: training is better served by
            :class:`longtail.DistributionBalancedLoss`.
        gamma: >= 0, of the focal factor, or one for each class, [C]; 0 switches it off.
        kappa: of the bias; 0 switches it off.
        negative_scale: lambda > 0; 1 switches it off.
        rebalance_alpha, rebalance_beta, rebalance_mu: alpha, beta >= 0 and mu of the map. 0.1, 10 and 0.2 as the
            authors' code for COCO-MLT; for VOC-MLT mu is 0.3 there, and negative_scale 5.
        empty: what to do with classes that no row, or every row, has: "error" or "clamp" (counted as 1, and as N - 1).
        reduction: "mean" (over the elements, as in the authors' code), "sum", "rows" or "none".
        options: the others of :func:`longtail.sigmoid_focal_loss`; alpha is off.

    Predict from the raw logits.

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.sigmoid_focal_loss`; the counts are no numbers >= 0 of
            shape [C], a class is empty, or ``num_samples`` is not above all of them.
    """
    refuse_unknown(distribution_balanced_loss, options)
    dtype = torch.float64 if getattr(input, "dtype", None) == torch.float64 else torch.float32
    made = rebalancing(samples_per_class, num_samples, kappa, negative_scale, empty, dtype=dtype)
    class_bias, inverse_counts = (x.to(getattr(input, "device", None)) for x in made)
    options |= {"rebalance_alpha": rebalance_alpha, "rebalance_beta": rebalance_beta, "rebalance_mu": rebalance_mu}
    return rebalanced(input, target, class_bias, inverse_counts, gamma, negative_scale, reduction=reduction, **options)


@with_options_of(distribution_balanced_loss, without=["samples_per_class", "num_samples", "kappa", "empty"])
def rebalanced(
    input: Tensor,
    target: Tensor,
    class_bias: Tensor,
    inverse_counts: Tensor,
    gamma: float | Tensor = 2.0,
    negative_scale: float = 2.0,
    *,
    rebalance_alpha: float = 0.1,
    rebalance_beta: float = 10.0,
    rebalance_mu: float = 0.2,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """:func:`distribution_balanced_loss` for given class vectors."""
    refuse_unknown(rebalanced, options)
    records = sigmoid_request(
        class_bias=class_bias,
        inverse_counts=inverse_counts,
        gamma=gamma,
        negative_scale=negative_scale,
        rebalance_alpha=rebalance_alpha,
        rebalance_beta=rebalance_beta,
        rebalance_mu=rebalance_mu,
        reduction=reduction,
        **options,
    )
    return sigmoid_loss(input, target, *records)
