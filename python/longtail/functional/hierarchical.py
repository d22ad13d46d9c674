"""Hierarchical cross-entropy: of logits, of hidden states, and over classes that ranks share out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import (
    arithmetic_dtype,
    check_integer,
    check_local,
    check_logits,
    check_tensors,
)
from ..hierarchical.hierarchy import Hierarchy
from ..hierarchical.linear import linear_hierarchical_loss
from ..hierarchical.loss import hierarchical_loss
from ..hierarchical.tree import Tree
from ..linear.chunks import Chunking
from ..options import Request, SoftmaxOptions
from ..parallel import vocab, vocab_linear
from ..parallel.collectives import Group
from ..parallel.hierarchical import TreeArguments
from ..parallel.shard import Part
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


@with_options_of()
def linear_hierarchical_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    hierarchy: Hierarchy,
    alpha: float = 0.1,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    class_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalizer: str | float | Tensor | None = None,
    shift: bool = False,
    gradient: str = "auto",
    chunk_size: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    **unknown: Any,
) -> Tensor:
    r""":func:`hierarchical_cross_entropy` of ``input @ linear_weight.T + linear_bias``, the logits never held.

    As :func:`longtail.linear_cross_entropy` is to :func:`longtail.cross_entropy`: rows go in chunks, whose logits are
    made, turned into their gradient in place and spent.

    Args:
        input: (D,), or states with any number of leading dimensions, (..., D).
        linear_weight: (C, D), with C the hierarchy's classes; linear_bias: (C,).
        target: class indices of any integer dtype, of the states' leading dimensions.
        hierarchy, alpha: the tree, and how its levels count.
        weight, class_bias, ignore_index, reduction, sample_weight, normalizer: as in
            :func:`hierarchical_cross_entropy`.
        shift, gradient, chunk_size, accumulate_dtype: as in :func:`longtail.linear_cross_entropy`; chunks are of rows
            on every device.

    Returns:
        The loss, 0-d or of the target's shape; float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.linear_cross_entropy` and
            :func:`hierarchical_cross_entropy`.
    """
    if unknown:
        refuse_unknown(linear_hierarchical_cross_entropy, unknown)
    return linear_hierarchical_loss(
        (input, linear_weight, linear_bias, target),
        (hierarchy, alpha),
        Request(reduction, normalizer, gradient),
        Chunking(chunk_size, accumulate_dtype),
        shift,
        weight=weight,
        class_bias=class_bias,
        sample_weight=sample_weight,
        ignore_index=ignore_index,
    )


@with_options_of()
def vocab_parallel_hierarchical_cross_entropy(
    local_logits: Tensor,
    target: Tensor,
    hierarchy: Hierarchy,
    alpha: float = 0.1,
    *,
    group: Group = None,
    class_start: int | None = None,
    weight: Tensor | None = None,
    class_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalizer: str | float | Tensor | None = None,
    gradient: str = "backward",
    **unknown: Any,
) -> Tensor:
    r""":func:`hierarchical_cross_entropy` of logits whose classes are shared out over the ranks of a process group.

    Every rank calls it with its own classes, the whole tree and the same targets, and gets the same loss, bit for bit.
    Forward exchanges 2 L + 1 numbers per row in one all-gather, L the depth of the tree (one more where ``weight`` is
    of a rank's own classes); backward exchanges nothing. What a rank holds need not be whole nodes. The gradient is
    that of the local logits: a row-parallel layer before them has to sum the gradients of its input over the group.

    Args:
        local_logits: (N, C_local), this rank's classes, any number of them, 0 included; the same dtype on every rank.
        target: class indices in [0, C) or ``ignore_index``, (N,), the same on every rank.
        hierarchy, alpha: the tree over all C classes, the same on every rank, and how its levels count.
        weight, class_bias: of all classes, (C,), or of this rank's, (C_local,); given the same way on every rank (and
            of all classes where one rank holds them all).
        group, class_start, gradient: as in :func:`longtail.vocab_parallel_cross_entropy`; so is what ranks compare,
            and how one rank's mistake is raised on every rank.
        ignore_index, reduction, sample_weight, normalizer: as in :func:`hierarchical_cross_entropy`.

    Returns:
        The loss, 0-d or (N,), whole on every rank.

    Raises:
        TypeError, ValueError, IndexError: as :func:`longtail.vocab_parallel_cross_entropy`, on every rank; so for
            trees that differ.
    """
    if unknown:
        refuse_unknown(vocab_parallel_hierarchical_cross_entropy, unknown)
    options = SoftmaxOptions(
        weight=weight, class_bias=class_bias, sample_weight=sample_weight, ignore_index=ignore_index
    )
    request, part = Request(reduction, normalizer, gradient), Part(group, class_start, None)
    loss: Tensor = vocab.cross_entropy(local_logits, target, options, request, part, TreeArguments(hierarchy, alpha))
    return loss


@with_options_of()
def vocab_parallel_linear_hierarchical_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    hierarchy: Hierarchy,
    alpha: float = 0.1,
    *,
    group: Group = None,
    class_start: int | None = None,
    sequence_parallel: bool = False,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    class_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    normalizer: str | float | Tensor | None = None,
    shift: bool = False,
    gradient: str = "auto",
    chunk_size: int | None = None,
    accumulate_dtype: torch.dtype | None = None,
    **unknown: Any,
) -> Tensor:
    r""":func:`linear_hierarchical_cross_entropy` with the rows of the weight shared out over the ranks of a group.

    Args:
        input, linear_weight, target, sequence_parallel, linear_bias: as in
            :func:`longtail.vocab_parallel_linear_cross_entropy`; so are shift, gradient, chunk_size, accumulate_dtype
            and the order of backward passes.
        hierarchy, alpha, group, class_start, weight, class_bias, ignore_index, reduction, sample_weight, normalizer: as
            in :func:`vocab_parallel_hierarchical_cross_entropy`, whose numbers each chunk of rows exchanges. The sample
            weight has the shape of the targets: of all rows, with ``sequence_parallel`` too.

    Returns:
        The loss, 0-d or of the target's shape, whole on every rank.

    Raises:
        TypeError, ValueError, IndexError: as :func:`vocab_parallel_hierarchical_cross_entropy`, on every rank.
        RuntimeError: in backward, ranks differentiate different calls; on a GPU an assertion.
    """
    if unknown:
        refuse_unknown(vocab_parallel_linear_hierarchical_cross_entropy, unknown)
    options = SoftmaxOptions(
        weight=weight, class_bias=class_bias, sample_weight=sample_weight, ignore_index=ignore_index
    )
    loss: Tensor = vocab_linear.linear_cross_entropy(
        (input, linear_weight, linear_bias, target),
        options,
        Request(reduction, normalizer, gradient),
        Chunking(chunk_size, accumulate_dtype),
        Part(group, class_start, None),
        sequence_parallel,
        shift,
        TreeArguments(hierarchy, alpha),
    )
    return loss
