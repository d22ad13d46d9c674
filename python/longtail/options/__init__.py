"""The options of the families of losses, written once: names, types, defaults, ranges, and what says "off".

The rest follows from the records: the operators' schemas, what is checked, what ranks compare, what functions take.
"""

from __future__ import annotations

from typing import TypeVar

from ..signatures import annotation_text
from .hierarchical import HIERARCHICAL_VECTORS, HIERARCHY_DEPTH, HierarchicalOptions
from .number import Number
from .request import GRADIENTS, REDUCTIONS, Request, sigmoid_request, softmax_request
from .sigmoid import SIGMOID_INNER, SIGMOID_VECTORS, SigmoidOptions
from .softmax import SOFTMAX_NUMBERS, SOFTMAX_VECTORS, SoftmaxOptions, softmax_options
from .two_way import TWO_WAY_VECTORS, TwoWayOptions

__all__ = [
    "GRADIENTS",
    "HIERARCHICAL_VECTORS",
    "HIERARCHY_DEPTH",
    "REDUCTIONS",
    "SIGMOID_INNER",
    "SIGMOID_VECTORS",
    "SOFTMAX_NUMBERS",
    "SOFTMAX_VECTORS",
    "TWO_WAY_VECTORS",
    "HierarchicalOptions",
    "LossOptions",
    "Number",
    "Request",
    "RowOptions",
    "SigmoidOptions",
    "SoftmaxOptions",
    "TwoWayOptions",
    "schema",
    "sigmoid_request",
    "softmax_options",
    "softmax_request",
]

RowOptions = TypeVar("RowOptions", SoftmaxOptions, HierarchicalOptions)
"""Of the losses of rows that have one class for a target."""


LossOptions = SoftmaxOptions | SigmoidOptions | HierarchicalOptions | TwoWayOptions
"""Of any family."""


def schema(options: type[LossOptions]) -> str:
    """The arguments of operators, as torch.library writes them."""
    parts = []
    for name, annotation in options.__annotations__.items():
        kind = "float" if name in SOFTMAX_NUMBERS else annotation_text(annotation).replace(" | None", "?")
        parts.append(f"{kind} {name}")
    return ", ".join(parts)
