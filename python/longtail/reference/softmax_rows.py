"""The softmax family over batches of rows, in plain PyTorch: the losses of :mod:`longtail.reference`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype
from ..options import SoftmaxOptions, softmax_options
from ..signatures import refuse_unknown, with_options_of
from . import softmax
from .effective import Effective
from .softmax_dense import DenseRows, refuse_class_options


class Rows(NamedTuple):
    """A batch made ready: ignored rows are cleared, everything is in the dtype of the arithmetic."""

    effective: Effective
    g: Tensor
    counted: Tensor
    factors: softmax.Factors
    options: SoftmaxOptions

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, options: SoftmaxOptions) -> Rows:
        """Of logits [N, C] and target [N]; the vectors in the dtype of the arithmetic."""
        counted = target != options.ignore_index
        g = torch.where(counted, target, 0)
        z = logits.to(arithmetic_dtype(logits.dtype)).masked_fill(~counted[:, None], 0.0)
        effective = Effective.of(z, g, options)
        return cls(effective, g, counted, softmax.Factors.of(g, logits.shape[1], options), options)

    def stats(self) -> Tensor:
        """[N, 5]"""
        return softmax.accumulate(self.effective.u, self.g, self.options.weight, self.options.label_smoothing != 0)

    def losses(self, stats: Tensor) -> Tensor:
        """[N], 0 where ignored."""
        return softmax.finish(stats, self.factors, self.options)[0].masked_fill(~self.counted, 0.0)

    def grad(self, stats: Tensor, grad_loss: Tensor) -> Tensor:
        """[N, C], of the losses times ``grad_loss`` [N]."""
        row_grad = softmax.finish(stats, self.factors, self.options)[1].times(grad_loss)
        du = softmax.apply(row_grad, self.effective.u, self.g, self.options.weight, self.options.label_smoothing != 0)
        return self.effective.gradient(du).masked_fill(~self.counted[:, None], 0.0)


@with_options_of(softmax_options)
def softmax_loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The loss of each row, [N], for logits [N, C] and target [N], or [N, C]: a probability for each class.

    ``options``: those of :func:`longtail.cross_entropy` that change a row's loss, and ``cross_entropy_coefficient``.
    """
    refuse_unknown(softmax_loss, options)
    given = softmax_options(**options)
    dtype, num_classes = arithmetic_dtype(logits.dtype), logits.shape[1]
    if logits.numel() == 0:
        return logits.to(dtype).sum(1)
    vectors, numbers = given.parted()
    converted: list[Any] = [None if x is None else x.to(dtype) for x in vectors]
    given = SoftmaxOptions(*converted, *numbers).for_classes(num_classes)
    if target.is_floating_point():
        refuse_class_options(given)
        return DenseRows.of(logits, target, given).losses()
    rows = Rows.of(logits, target, given)
    return rows.losses(rows.stats())


def mean_denominator(target: Tensor, weight: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """What torch's mean divides by: the number of counted rows, or the sum of their class weights; 0-d."""
    counted = target != ignore_index
    if weight is None:
        return counted.sum()
    return weight[torch.where(counted, target, 0)].masked_fill(~counted, 0.0).sum()


@with_options_of(softmax_options, without=["cross_entropy_coefficient"])
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    normalizer: str | float | Tensor | None = None,
    **options: float | Tensor | None,
) -> Tensor:
    """:func:`longtail.cross_entropy` for input [N, C] and target [N] (classes) or [N, C] (float), in plain PyTorch.

    Takes all its options but ``gradient`` and ``return_stats``. Differentiable in class probabilities, too.
    """
    loss = softmax_loss(
        input,
        target,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        **options,
    )
    if reduction != "mean":
        return loss.sum() if reduction == "sum" else loss
    dense = target.is_floating_point()
    if normalizer is None and dense:
        normalizer = loss.numel()
    elif normalizer is None:
        normalizer = mean_denominator(target, None if weight is None else weight.to(loss.dtype), ignore_index)
    elif isinstance(normalizer, str):
        normalizer = max(loss.numel(), 1) if dense else (target != ignore_index).sum().clamp(min=1)
    return loss.sum() / normalizer
