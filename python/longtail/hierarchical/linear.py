"""Hierarchical cross-entropy of hidden states: from arguments to the chunks of a linear loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arguments import arithmetic_dtype, check_choice, check_integer, check_local, check_logits, is_dtensor
from ..errors import ArgumentTypeError, ArgumentValueError
from ..linear.chunks import Chunking
from ..linear.loss import GRADIENTS, Data, check_data, check_one_loss, in_chunks, logits_dtype
from ..linear.operators import HIERARCHICAL
from ..options import HierarchicalOptions, Request
from ..reference.sizes import Size
from .loss import kept_size
from .tree import Tree


def _check_plain(**parameters: Any) -> None:
    for name, parameter in parameters.items():
        if is_dtensor(parameter):
            raise ArgumentTypeError(
                f"{name} is a DTensor, expected a whole tensor: gather it before the call, by {name}.full_tensor() or "
                "by unshard() of the FSDP module that owns it; of classes that ranks share out, "
                "longtail.vocab_parallel_linear_hierarchical_cross_entropy takes each rank's part"
            )


def linear_hierarchical_loss(
    data: Data,
    tree_arguments: tuple[Any, Any],
    request: Request,
    chunking: Chunking,
    shift: bool,
    *,
    weight: Tensor | None,
    class_bias: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """See :func:`longtail.linear_hierarchical_cross_entropy`.

    tree_arguments: hierarchy and alpha as users pass them.
    """
    input, linear_weight, linear_bias, target = data
    _check_plain(linear_weight=linear_weight, linear_bias=linear_bias)
    check_local(input=input, target=target)
    check_choice("gradient", request.gradient, GRADIENTS)
    check_data(*data)
    check_logits(input)
    if linear_weight.dim() != 2:
        raise ArgumentValueError(f"linear_weight has shape {list(linear_weight.shape)}, expected (C, D)")
    request.of_logits().check(arithmetic_dtype(input.dtype))
    check_one_loss(request)
    check_integer("ignore_index", ignore_index)
    dtype = arithmetic_dtype(logits_dtype(input, linear_weight, linear_bias))
    tree = Tree.checked(*tree_arguments, dtype)
    if len(linear_weight) != tree.hierarchy.num_classes:
        raise ArgumentValueError(
            f"linear_weight has shape {list(linear_weight.shape)}, with {len(linear_weight)} classes, expected "
            f"{tree.hierarchy.num_classes} as the hierarchy"
        )

    def size(rows: Tensor, num_classes: int, options: HierarchicalOptions) -> Size:
        return kept_size(rows, num_classes, tree.alpha, options)

    options = tree.options(input.device, dtype, weight, class_bias, sample_weight, ignore_index)
    return in_chunks(HIERARCHICAL, data, options, request, chunking, shift, size).loss
