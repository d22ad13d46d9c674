"""From checked arguments to the operators of hierarchical cross-entropy: rows and denominators."""

from __future__ import annotations

from torch import Tensor

from ..arguments import arithmetic_dtype
from ..errors import ArgumentValueError
from ..ops import layout
from ..ops.autograd import differentiable_loss
from ..options import HierarchicalOptions, Request
from ..reference.hierarchical import gradient_size
from ..reference.sizes import Size
from ..softmax.loss import mean_denominator
from .autograd import HIERARCHICAL, HierarchicalLoss


def _rows(input: Tensor, target: Tensor, num_classes: int) -> layout.Rows:
    """As the operators take them: [N, C] alone, of images a copy."""
    rows = layout.rows(input, target)
    if rows.logits.shape[1] != num_classes:
        raise ArgumentValueError(
            f"input has shape {list(input.shape)}, with {rows.logits.shape[1]} classes, expected {num_classes} as the "
            "hierarchy"
        )
    return rows._replace(logits=layout.to_rows(rows.logits)) if rows.logits.dim() == 3 else rows


def kept_size(target: Tensor, num_classes: int, alpha: float, options: HierarchicalOptions) -> Size:
    """A bound of the gradient's elements over rows with targets [N]; ``options`` as the operators take them.

    alpha: that of ``options.node_weight``.
    """
    w_g = None if options.weight is None else options.weight[target.clamp(0, max(num_classes - 1, 0))]
    return gradient_size(target != options.ignore_index, alpha, w_g, options.sample_weight)


def hierarchical_loss(
    input: Tensor, target: Tensor, options: HierarchicalOptions, alpha: float, request: Request
) -> Tensor:
    """Of tensors that are tensors, and a tree whose tables are on the input's device.

    alpha: that of ``options.node_weight``; see :func:`longtail.hierarchical_cross_entropy`.
    """
    dtype = arithmetic_dtype(input.dtype)
    num_classes = options.path.shape[0]
    rows = _rows(input, target, num_classes)
    options = options.prepared(input, target.shape, num_classes, dtype)
    denominator = None
    if request.reduction == "mean":
        denominator = mean_denominator(request.normalizer, rows.target, options, num_classes, dtype)
    loss, _ = differentiable_loss(
        *(HierarchicalLoss, HIERARCHICAL, input, (rows.logits, rows.target), options),
        *(request.reduction, request.gradient),
        denominator=denominator,
        counts=denominator is not None and not denominator.is_floating_point(),
        size=lambda: kept_size(rows.target, num_classes, alpha, options),
    )
    return loss.reshape(rows.shape) if request.reduction == "none" else loss
