"""ZLPR and the two-way loss: the classes of a row that are there against those that are not."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..options import Request, TwoWayOptions
from ..signatures import refuse_unknown, with_options_of
from ..two_way.loss import two_way_loss as _two_way_loss


@with_options_of()
def zlpr_loss(
    input: Tensor,
    target: Tensor,
    *,
    class_bias: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    normalizer: str | float | Tensor | None = None,
    gradient: str = "backward",
    **unknown: Any,
) -> Tensor:
    r"""ZLPR, for several labels in a row (Su et al. 2022).

    Of each row with logits u and targets y:

    .. math:: \mathrm{loss} = v \left(\log\left(1 + \sum_j (1 - y_j)\, e^{u_j}\right)
        + \log\left(1 + \sum_j y_j\, e^{-u_j}\right)\right)

    It ranks the labels of a row above 0, and its other classes below, each pair of them: a few labels among thousands
    of classes are not drowned. Predict the classes with logits above 0; of soft targets y is fitted by
    :math:`\sigma(2 u)`. With targets 0 and 1 it is the paper's loss, with others its soft version. Exact for every
    finite logit; computed in float32 for half inputs, in float64 for float64.

    Args:
        input: logits u, float64, float32, bfloat16 or float16: (C,), (N, C) or (N, C, d1, ...). Contiguous and
            channels-last images are read as they lie.
        target: class indices, any integers, (), (N,) or (N, d1, ...): the one label of each row, its one-hot never
            built. Or, in the input's shape, a target for each element: 0, 1, or soft in between, any real dtype. NaN
            gives a loss of NaN.
        class_bias: [C], added to the logits. A constant, as every vector below.
        sample_weight: v, of the rows' shape, () or (N,) or (N, d1, ...); does not enter the mean's denominator.
        ignore_index: rows (elements, with a target for each) with this target do not count, whatever their logits hold:
            the gradient is exactly 0, and of a row the loss. None: -100 for class indices, nothing otherwise.
        reduction: "mean" (over the rows: those that are not ignored, or with a target for each element all; NaN when
            there is none), "sum", or "none" (a loss for each row).
        normalizer: what "mean" divides by: "count" (the same rows, at least 1), a number or a 0-d tensor.
        gradient: "backward", "forward" or "inplace", as in :func:`longtail.cross_entropy`.

    Returns:
        The loss, 0-d or of the rows' shape; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.sigmoid_focal_loss`, of targets too; DTensors are refused.
    """
    if unknown:
        refuse_unknown(zlpr_loss, unknown)
    options = TwoWayOptions(class_bias, sample_weight, ignore_index)
    return _two_way_loss(input, target, options, Request(reduction, normalizer, gradient))


@with_options_of()
def two_way_loss(
    input: Tensor,
    target: Tensor,
    positive_temperature: float = 4.0,
    negative_temperature: float = 1.0,
    *,
    class_bias: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    normalizer: str | float | Tensor | None = None,
    gradient: str = "backward",
    **unknown: Any,
) -> Tensor:
    r"""Two-way multi-label loss over the classes of each row (Kobayashi 2023), the half of it that compares classes.

    Of each row with logits u and targets y, by the temperatures T of both sides:

    .. math:: \mathrm{loss} = v\, \mathrm{softplus}\left(T_n \log \sum_j (1 - y_j)\, e^{u_j / T_n}
        + T_p \log \sum_j y_j\, e^{-u_j / T_p}\right)

    With targets 0 and 1 it is that of the paper, which adds the same over the rows of each class: that half is
    ``two_way_loss(input.T, target.T)``. A row without a label, of which no y is positive, does not count, as in the
    author's code: its loss is 0, its gradient exactly 0, and it is left out of the mean. A row without other classes
    counts, with a loss of 0. Labels are told from others by rank, without a threshold at 0.

    Args:
        positive_temperature: T of the labels, a positive number; the paper's is 4: the higher, the more labels share
            the gradient. 1 and 1 is the softmax cross-entropy of rows with one label.
        negative_temperature: T of the other classes.
        reduction: "mean" (over the rows that count; NaN when none does), "sum", or "none" (a loss for each row).
        input, target, class_bias, sample_weight, ignore_index, normalizer, gradient: as in :func:`zlpr_loss`.

    Returns:
        The loss, 0-d or of the rows' shape; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError, IndexError: as :func:`zlpr_loss`; a temperature is not positive.
    """
    if unknown:
        refuse_unknown(two_way_loss, unknown)
    temperatures = positive_temperature, negative_temperature
    options = TwoWayOptions(class_bias, sample_weight, ignore_index, *temperatures, joint=True)
    return _two_way_loss(input, target, options, Request(reduction, normalizer, gradient))
