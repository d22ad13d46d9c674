"""Statistics of rows that a loss can be written of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arguments import is_dtensor
from ..linear import statistics as linear_statistics
from ..linear.chunks import Chunking
from ..options import SoftmaxOptions
from ..reference.row_statistics import RowStatistics
from ..signatures import refuse_unknown, with_options_of
from ..softmax import statistics

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class LogitKeywords(TypedDict, total=False):
        """What becomes of the logits, for type checkers."""

        temperature: float
        class_bias: Tensor | None
        class_margin: Tensor | None
        class_scale: Tensor | None
        target_scale: Tensor | None
        class_mitigation: Tensor | None
        compensation: float
        scale: float
        softcap: float | None

    class StatisticsKeywords(LogitKeywords, total=False):
        """Keyword arguments of :func:`longtail.row_statistics`, for type checkers."""

        ignore_index: int


def statistics_options(
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
) -> tuple[SoftmaxOptions, float]:
    """The record of options, and the temperature, by the names that users know."""
    vectors = (None, class_bias, class_margin, class_scale, target_scale, class_mitigation)
    options = SoftmaxOptions(*vectors, ignore_index=ignore_index, scale=scale, softcap=softcap)
    return options._replace(compensation=compensation), temperature


@with_options_of(statistics_options)
def row_statistics(
    input: Tensor,
    target: Tensor,
    *,
    gradient: str = "backward",
    **options: Unpack[StatisticsKeywords],
) -> RowStatistics:
    r"""Differentiable log-probability, entropy and their kin of every row, in three passes over the logits in all.

    For losses that are yours: written in plain PyTorch of these numbers, one a row, any of them costs one read of the
    logits forward, and one read and one write backward. With the row's effective logits u, those of
    :func:`longtail.cross_entropy` with :math:`\mathrm{softcap}(\mathrm{scale}\, z_j) / \mathrm{temperature}` in the
    place of the capped ones, and p their softmax:

    .. math::
        \mathrm{log\_prob} = \log p_g, \quad \mathrm{log\_miss} = \log(1 - p_g), \quad
        \mathrm{lse} = \log \sum_j e^{u_j}, \quad \mathrm{entropy} = -\sum_j p_j \log p_j,

    and complement_entropy :math:`-\sum_{j \ne g} q_j \log q_j`, q the softmax over the other classes. None of them is
    made of a rounded probability: they, and their gradients, keep their digits where :math:`p_g` is :math:`10^{-30}`
    away from 0 or 1. The gradient is that of the statistics that the loss uses; the others cost nothing.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...); float64, float32, bfloat16 or float16. Of logits (B, L, C) pass
            ``input.flatten(0, 1)``, a view.
        target: class indices of any integer dtype, (), (N,) or (N, d1, ...).
        temperature: divides the logits after scale and softcap, before ``class_bias``; positive.
        class_bias, class_margin, class_scale, target_scale, class_mitigation, compensation: as in
            :func:`longtail.cross_entropy`.
        scale, softcap, ignore_index: as there. Rows that ``ignore_index`` names hold zeros and False, and have a
            gradient of exactly 0.
        gradient: "backward" (memory for the gradient of the logits is made in backward), or "inplace": backward writes
            it over ``input``, which holds the logits until then, or over the copy that a strided layout needs. One
            backward then; refused of a leaf that requires grad.

    Images (N, C, d1, ...) whose classes do not lie side by side in memory are transposed for the backward pass.
    A DTensor (N, C) may be sharded over rows and classes as in :func:`longtail.cross_entropy`, with ``gradient``
    "backward"; the statistics are then DTensors over the rows, of which every rank writes the same loss. Differentiable
    once; :func:`longtail.reference.row_statistics` is plain PyTorch.

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.cross_entropy`; temperature is not positive.
    """
    refuse_unknown(row_statistics, options)
    records = statistics_options(**options)
    if is_dtensor(input) or is_dtensor(target):
        from ..parallel import dtensor  # imports torch.distributed.tensor

        return dtensor.row_statistics(input, target, *records, gradient)
    return statistics.row_statistics(input, target, *records, gradient)


@with_options_of(statistics_options)
def linear_row_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    shift: bool = False,
    chunk_size: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    **options: Unpack[StatisticsKeywords],
) -> RowStatistics:
    r"""``row_statistics(input @ linear_weight.T + linear_bias, target, ...)`` without ever holding the logits.

    Any loss that is written of the statistics is then one of hidden states and the head's weight: forward is one GEMM
    and keeps five numbers a row; backward makes the logits again, a chunk at a time, turns them into their gradient in
    place and spends it in the GEMMs of the gradients, four in all. Extra memory: one chunk of logits, and with half
    inputs the accumulator of the weight's gradient. Chunks of rows or of classes as in
    :func:`longtail.linear_cross_entropy`. Backward may run any number of times; only what requires grad gets a
    gradient. Differentiable once.

    Args:
        input: hidden states (D,) or (..., D), any number of leading dimensions; float64, float32, bfloat16 or float16.
            Under autocast the GEMMs run in its dtype; the statistics are float32 (float64 for float64).
        linear_weight: (C, D).
        target: class indices of any integer dtype, of the input's leading shape, which is that of the statistics.
        linear_bias: (C,). Input, weight and bias are what the statistics are differentiable in.
        temperature, scale, softcap: as in :func:`longtail.row_statistics`; so are the options of classes and targets.
        ignore_index: rows with this target hold zeros and False; what their input holds, NaN included, reaches no
            gradient.
        shift: targets are those of the next position, as in :func:`longtail.linear_cross_entropy`: the statistics at
            the last position are zeros.
        chunk_size, accumulate_dtype: as in :func:`longtail.linear_cross_entropy`.

    DTensors (N, D), (C, D) and (C,) as in :func:`longtail.linear_cross_entropy`; the statistics are DTensors over the
    rows, of which every rank writes the same loss. The backward passes of several calls run in the same order on every
    rank.

    float16: the gradient of the logits is rounded to float16 with the upstream gradient in it, as in eager float16: a
    gradient scaler multiplies before.

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.linear_cross_entropy`; temperature is not positive.
    """
    refuse_unknown(linear_row_statistics, options)
    records = statistics_options(**options)
    data, chunking = (input, linear_weight, linear_bias, target), Chunking(chunk_size, accumulate_dtype)
    if is_dtensor(input):
        from ..parallel import dtensor_linear  # imports torch.distributed.tensor

        return dtensor_linear.linear_row_statistics(data, *records, chunking, shift)
    return linear_statistics.row_statistics(data, *records, chunking, shift)
