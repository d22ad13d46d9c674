"""Hierarchical cross-entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arguments import (
    arithmetic_dtype,
    check_integer,
    check_local,
    check_logits,
    check_tensors,
)
from ..class_balance.hierarchy import Hierarchy
from ..hierarchical.loss import hierarchical_loss
from ..hierarchical.tree import Tree
from ..options import Request
from ..signatures import refuse_unknown, with_options_of


@with_options_of()
def hierarchical_cross_entropy(
    input: Tensor,
    target: Tensor,
    hierarchy: Hierarchy,
    alpha: float = 0.1,
    *,
    weight: Tensor | None = None,
    class_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalizer: str | float | Tensor | None = None,
    gradient: str = "backward",
    **unknown: Any,
) -> Tensor:
    r"""Hierarchical cross-entropy over a tree of classes (Bertinetto et al. 2020, section 3.1).

    From the root :math:`A_0`, all classes, down to the target, :math:`A_D = \{g\}`, with u the logits plus class_bias:

    .. math::
        \mathrm{loss} = v\, w_g \sum_{l=1}^{D} e^{-\alpha l} \left(-\log P(A_l \mid A_{l-1})\right), \qquad
        P(A_l \mid A_{l-1}) = \frac{\sum_{j \in A_l} e^{u_j}}{\sum_{j \in A_{l-1}} e^{u_j}}

    A mistake costs the less, the further down from the root its path is one with the target's. ``alpha=0``, or a tree
    without inner nodes up to the factor :math:`e^{-\alpha}`, is :func:`longtail.cross_entropy`. No probability is
    rounded on the way: loss and gradient are exact however confident the model is at any level. The depth l counts from
    the root, as in the authors' code (the paper says height); that code also divides all weights by their sum over the
    tree, one constant, which is left out here.

    A node with one child, whose P is 1, contributes 0 exactly; paths may differ in length. In training it replaces the
    loss alone: predict by ``input.argmax(1)``.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...); float64, float32, bfloat16 or float16. Images are copied into
            rows.
        target: class indices of any integer dtype, (), (N,) or (N, d1, ...).
        hierarchy: the tree, of C classes, of depth L. Trees deeper than 8 nodes are computed in plain PyTorch, much
            slower, and keep 2 L masks of [N, C] bytes and temporaries of the logits' size in memory. The loss costs
            what cross-entropy costs where classes are numbered along the tree; of any other numbering the classes that
            share their topmost node with the target are read and written twice.
        alpha: at least 0; the paper tries 0.1 to 0.9. The higher, the less the lower nodes count. At most 87.3 / L
            (float64: 708 / L), beyond which the lowest weight is no normal number.
        weight: class weights w, [C]. Constants, as every vector below.
        class_bias: [C], added to the logits, as :func:`longtail.logit_adjustment`.
        ignore_index: rows with this target have loss 0 and gradient exactly 0, whatever their logits hold.
        reduction: "mean" (divides by the sum of w_g over counted rows; NaN when nothing is counted), "sum" or "none".
        sample_weight: v, of the target's shape; does not enter the mean's denominator.
        normalizer: the mean's denominator, as in :func:`longtail.cross_entropy`.
        gradient: "backward", "forward" or "inplace", as in :func:`longtail.cross_entropy`.

    Returns:
        The loss, 0-d or of the target's shape; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.cross_entropy`; DTensors and class probabilities are
            refused, and an input whose number of classes is not the hierarchy's.
    """
    if unknown:
        refuse_unknown(hierarchical_cross_entropy, unknown)
    check_tensors(input=input, target=target)
    check_local(input=input, target=target)
    check_logits(input)
    request = Request(reduction, normalizer, gradient)
    dtype = arithmetic_dtype(input.dtype)
    request.check(dtype)
    check_integer("ignore_index", ignore_index)
    tree = Tree.checked(hierarchy, alpha, dtype)
    options = tree.options(input.device, dtype, weight, class_bias, sample_weight, ignore_index)
    return hierarchical_loss(input, target, options, tree.alpha, request)
