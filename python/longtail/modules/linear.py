"""The fused linear loss as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import DTYPES
from ..functional import linear_cross_entropy
from ..signatures import with_options_of
from .base import Loss


class LinearCrossEntropyLoss(Loss):
    """:func:`longtail.linear_cross_entropy` as a module, with a weight of its own or one that it shares.

    Args:
        in_features: D, the size of a hidden state.
        num_classes: C, of all classes.
        out_features: (d1, ..., dK) of K-dimensional targets.
        bias: whether it has a ``linear_bias``.
        linear_weight: a parameter (C, D) to share, such as the weight of an embedding. Default: a new one.
        device, dtype: of a new weight, and of the bias.
        persistent: whether class vectors stand in the ``state_dict``, as in :class:`longtail.CrossEntropyLoss`.
        options: the keyword-only arguments of the function.

    Parameters are those of ``self.linear``, an :class:`torch.nn.Linear` as in
    :class:`torch.nn.LinearCrossEntropyLoss`, whose ``state_dict`` fits.
    """

    _function = staticmethod(linear_cross_entropy)

    @with_options_of(linear_cross_entropy, without=["input", "target", "linear_bias"])
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        linear_weight: nn.Parameter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        persistent: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(persistent=persistent, **options)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        rows = math.prod(out_features, start=num_classes)
        if linear_weight is None:
            self.linear = nn.Linear(in_features, rows, bias, device, dtype)
            return
        if not isinstance(linear_weight, nn.Parameter):
            raise TypeError(f"linear_weight is a {type(linear_weight).__name__}, expected a Parameter to share")
        if linear_weight.shape != (rows, in_features):
            raise ValueError(f"linear_weight has shape {list(linear_weight.shape)}, expected {[rows, in_features]}")
        # One feature: the weight that Linear makes, and that is replaced, should not be a second vocabulary.
        self.linear = nn.Linear(1, rows, bias, device or linear_weight.device, dtype or linear_weight.dtype)
        self.linear.in_features = in_features
        self.linear.weight = linear_weight

    def forward(self, input: Tensor, target: Tensor, **overrides: Any) -> Any:
        """The loss of features ``input`` and ``target``; keyword arguments override options."""
        outputs = (self.num_classes, *self.out_features)
        bias = None if self.linear.bias is None else self.linear.bias.reshape(outputs)
        weight = self.linear.weight.reshape(*outputs, self.linear.in_features)
        return linear_cross_entropy(*(input, weight, target), linear_bias=bias, **{**self._options(), **overrides})

    def _call_on_nothing(self, **options: Any) -> None:
        accumulates = options.get("accumulate_dtype")  # fits at least the logits of the same dtype
        dtype = accumulates if accumulates in DTYPES else torch.float64
        nothing, one = (torch.empty(shape, device="meta", dtype=dtype) for shape in ((0, 1), (1, 1)))
        linear_cross_entropy(nothing, one, nothing[:, 0].long(), **options)

    def extra_repr(self) -> str:
        own = f"in_features={self.linear.in_features}, num_classes={self.num_classes}"
        outputs = f", out_features={self.out_features}" if self.out_features else ""
        rest = super().extra_repr()
        return own + outputs + (f", {rest}" if rest else "")
