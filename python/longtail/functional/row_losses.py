"""Losses that are formulas of a row's statistics, and weights of rows for losses that users write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..arguments import check_number
from ..options import Request, SoftmaxOptions
from ..reference.row_statistics import RowStatistics
from ..signatures import refuse_unknown, with_options_of
from ..softmax import row_losses
from .statistics import statistics_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .softmax import Keywords
    from .statistics import LogitKeywords, StatisticsKeywords

    class RowLossKeywords(Keywords, LogitKeywords, total=False):
        """Keyword arguments of :func:`longtail.poly_cross_entropy`."""

        gradient: str


@with_options_of(statistics_options)
def _records(
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalizer: str | float | Tensor | None = None,
    gradient: str = "backward",
    **options: Unpack[StatisticsKeywords],
) -> tuple[SoftmaxOptions, float, Request]:
    found, temperature = statistics_options(**options)
    found = found._replace(weight=weight, sample_weight=sample_weight)
    return found, temperature, Request(reduction, normalizer, gradient)


@with_options_of(_records)
def poly_cross_entropy(
    input: Tensor,
    target: Tensor,
    epsilon: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options: Unpack[RowLossKeywords],
) -> Tensor:
    r"""Poly-1 cross-entropy :math:`w_g (-\log p_g + \epsilon (1 - p_g))` (Leng et al. 2022, Poly-1).

    Cross-entropy is :math:`\sum_j (1 - p_g)^j / j`; Poly-1 adds ``epsilon`` to the coefficient of its first term, the
    one whose derivative by :math:`p_g` does not vanish near 1. The loss and its gradient keep their digits where
    :math:`p_g` rounds to 0 or 1, but for those that cancel between the two terms when ``epsilon`` is about -1.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...); float64, float32, bfloat16 or float16.
        target: class indices of any integer dtype, (), (N,) or (N, d1, ...).
        epsilon: of any sign; 0 is cross-entropy. It is to be tuned for the task; the paper takes 2 on ImageNet with
            EfficientNetV2.
        weight: class weights w, [C]; constants.
        ignore_index, reduction, sample_weight, normalizer: as in :func:`longtail.cross_entropy`; "mean" divides by the
            sum of w_g over counted rows.
        temperature, scale, softcap, gradient: as in :func:`longtail.row_statistics`, of whose three passes this is
            made; so are the options of classes and targets.

    Returns:
        The loss, 0-d or of the target's shape; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.row_statistics`, class probabilities and DTensors among
            them; epsilon is no finite number.
    """
    refuse_unknown(poly_cross_entropy, options)
    records = _records(weight=weight, ignore_index=ignore_index, reduction=reduction, **options)
    epsilon = check_number("epsilon", epsilon, dtype=row_losses.check(input, target))
    return row_losses.row_loss(input, target, row_losses.poly(epsilon), *records)


@with_options_of(_records)
def generalized_cross_entropy(
    input: Tensor,
    target: Tensor,
    q: float = 0.7,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    **options: Unpack[RowLossKeywords],
) -> Tensor:
    r"""Generalized cross-entropy :math:`w_g (1 - p_g^q) / q`, for noisy labels (Zhang and Sabuncu 2018, eq. 6).

    Between cross-entropy, its limit at ``q`` 0, and :math:`1 - p_g` at 1, which is half the mean absolute error
    :math:`\sum_j |p_j - y_j|` of the paper. The gradient is that of cross-entropy times :math:`p_g^q`: labels that the
    model takes for impossible pull less. Bounded by ``1 / q``. The paper's truncated form, constant below a p_g of k,
    is a loss of your own on ``log_prob.clamp(min=math.log(k))``.

    Args:
        q: in [0, 1]; the paper's value is 0.7, and 0 is cross-entropy exactly.

    All other arguments, ``options``, returns and errors as :func:`poly_cross_entropy`.
    """
    refuse_unknown(generalized_cross_entropy, options)
    records = _records(weight=weight, ignore_index=ignore_index, reduction=reduction, **options)
    q = check_number("q", q, 0.0, 1.0, dtype=row_losses.check(input, target), vanishes=False)
    return row_losses.row_loss(input, target, row_losses.generalized(q), *records)


def token_weighting(
    statistics: RowStatistics,
    kind: str,
    *,
    num_classes: int = 20,
    alpha: float = 1.0,
    gamma: float = 1.0,
    sigma: float = 1.0,
    normalize: bool | None = None,
) -> Tensor:
    r"""Weights of rows, from what the model says of them: constants, to be multiplied with ``statistics.log_prob``.

    ``loss = -(longtail.token_weighting(s, "dft") * s.log_prob).sum() / count``, with ``s`` from
    :func:`longtail.row_statistics` or any other function that returns such a record. With H the entropy of the row:

    .. math::
        \text{dft}: p_g, \qquad \text{eaft}: \min(H / \log K, 1)^\alpha, \qquad \text{mile}: (\sigma + H)^\gamma.

    - "dft", Dynamic Fine-Tuning (Wu et al. 2025, eq. 9): the probability of the target.
    - "eaft", Entropy-Adaptive Fine-Tuning (Diao et al. 2026, eq. 2 and 3): the normalised entropy, which leaves out
      what the model is sure of. The paper takes the entropy of the softmax over the K = 20 largest logits; here H is
      that of all classes, which can exceed log K: the weight stays at 1 there. The power alpha is of the authors' code
      alone (LLaMA-Factory's ``eaft_alpha``), which divides by 3.0 for log 20.
    - "mile", MiLe Loss (Su et al. 2024): more weight where the model is unsure. It follows the authors' code
      (suu990901/LLaMA-MiLe-Loss, ``InfoEntropyLoss``), not the paper's text: that code divides by the mean weight of
      the batch, of which ignored rows are a part, averaged over ranks. Here the mean is over the counted rows of this
      process.

    Args:
        statistics: of rows, each entry of the target's shape.
        kind: "dft", "eaft" or "mile".
        num_classes: K of "eaft", at least 2. The number of all classes is the other choice: weights are then smaller.
        alpha: power of "eaft", at least 0.
        gamma, sigma: of "mile", at least 0; gamma 0 weights all alike.
        normalize: whether the weights are divided by their mean over counted rows, so that it is 1; None: of "mile".

    Returns:
        The weights, of the target's shape and the dtype of the statistics, without a gradient; 0 for ignored rows. A
        target at a logit of -inf has the weight 0 of "dft" and a loss of inf: their product is NaN.

    Raises:
        TypeError, ValueError: statistics is no RowStatistics, kind is none of the three, a number is out of range.
    """
    return row_losses.token_weighting(statistics, kind, num_classes, alpha, gamma, sigma, normalize)
