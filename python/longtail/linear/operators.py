"""The operators of linear losses and statistics, as torch.library knows them; ``rows.py`` does the work."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops import operators
from .chunks import make_gradients
from .rows import (
    WANTED,
    Wanted,
    linear_softmax_apply,
    linear_softmax_loss,
    linear_softmax_loss_and_grad,
    rows_out,
)


def _fake_loss(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _weight, _bias, _target, _chunk_size, dtype, *_ = rest
    return rows_out(input, dtype)


def _fake_apply(_row_grad: Tensor, input: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wanted = Wanted(*rest[2 : 2 + WANTED])
    return make_gradients(input, linear_weight, wanted.input_grad_dtype, wanted.weight_grad_dtype, wanted.needs)


def _fake_loss_and_grad(grad_loss: Tensor, input: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    bias, target, _stats, *values = rest
    grads = _fake_apply(grad_loss, input, linear_weight, bias, target, *values)
    return (*rows_out(input, Wanted(*values[:WANTED]).dtype), *grads)


_DATA = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target"
_HOW = "int chunk_size, ScalarType dtype, ScalarType total_dtype"
_NEEDS = (
    "ScalarType input_grad_dtype, ScalarType weight_grad_dtype, bool needs_input, bool needs_weight, bool needs_bias"
)
loss_operator = operators.define(
    "linear_softmax_loss",
    f"({_DATA}, {_HOW}, {operators.SOFTMAX}) -> (Tensor loss, Tensor stats)",
    linear_softmax_loss,
    _fake_loss,
)
loss_and_grad_operator = operators.define(
    "linear_softmax_loss_and_grad",
    f"(Tensor grad_loss, {_DATA}, Tensor? stats, {_HOW}, {_NEEDS}, {operators.SOFTMAX}) -> "
    "(Tensor loss, Tensor stats, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    linear_softmax_loss_and_grad,
    _fake_loss_and_grad,
)
apply_operator = operators.define(
    "linear_softmax_apply",
    f"(Tensor row_grad, {_DATA}, {_HOW}, {_NEEDS}, {operators.SOFTMAX}) -> "
    "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    linear_softmax_apply,
    _fake_apply,
)
