"""Statistics of rows that a loss can be written of."""

from __future__ import annotations

from torch import Tensor

from ..options import SoftmaxOptions
from ..reference.row_statistics import RowStatistics
from ..softmax import statistics


def row_statistics(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    class_bias: Tensor | None = None,
    class_margin: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    gradient: str = "backward",
) -> RowStatistics:
    r"""Differentiable log-probability, entropy and their kin of every row, in three passes over the logits in all.

    For losses that are yours: written in plain PyTorch of these numbers, one a row, any of them costs one read of the
    logits forward, and one read and one write backward. With the row's effective logits
    :math:`u_j = \mathrm{softcap}(\mathrm{scale}\, z_j) / \mathrm{temperature} + \mathrm{bias}_j - [j = g]\,
    \mathrm{margin}_g` and p their softmax:

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
        class_bias, class_margin, scale, softcap, ignore_index: as in :func:`longtail.cross_entropy`. Rows that
            ``ignore_index`` names hold zeros and False, and have a gradient of exactly 0.
        gradient: "backward" (memory for the gradient of the logits is made in backward), or "inplace": backward writes
            it over ``input``, which holds the logits until then, or over the copy that a strided layout needs. One
            backward then; refused of a leaf that requires grad.

    Images (N, C, d1, ...) whose classes do not lie side by side in memory are transposed for the backward pass.
    DTensors are not taken. Differentiable once; :func:`longtail.reference.row_statistics` is plain PyTorch.

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.cross_entropy`; temperature is not positive.
    """
    options = SoftmaxOptions(
        class_bias=class_bias, class_margin=class_margin, ignore_index=ignore_index, scale=scale, softcap=softcap
    )
    return statistics.row_statistics(input, target, options, temperature, gradient)
