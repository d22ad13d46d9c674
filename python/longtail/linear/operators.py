"""The operators of linear losses and statistics, as torch.library knows them; ``rows.py`` does the work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..ops import operators
from . import rows
from .chunks import make_gradients
from .rows import WANTED, Wanted


class LinearFamily(NamedTuple):
    """The operators of a linear loss."""

    loss: Callable[..., Any]
    """(input, linear_weight, linear_bias, target, how, options) -> (loss [N], stats [N, S])."""
    loss_and_grad: Callable[..., Any]
    """(grad_loss, input, linear_weight, linear_bias, target, stats, wanted, options) -> both, and three gradients."""


_DATA = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target"
_HOW = "int chunk_size, ScalarType dtype, ScalarType total_dtype"
_NEEDS = (
    "ScalarType input_grad_dtype, ScalarType weight_grad_dtype, bool needs_input, bool needs_weight, bool needs_bias"
)


def _fake_grads(input: Tensor, linear_weight: Tensor, wanted: Wanted) -> tuple[Tensor, ...]:
    return make_gradients(input, linear_weight, wanted.input_grad_dtype, wanted.weight_grad_dtype, wanted.needs)


def _define(name: str, family: rows.RowFamily, options: str) -> LinearFamily:
    def fake_loss(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        _weight, _bias, _target, _chunk_size, dtype, _total_dtype, *values = rest
        return family.rows_out(input, dtype, family.options(*values))

    def fake_loss_and_grad(_grad_loss: Tensor, input: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        _bias, _target, _stats, *values = rest
        wanted = Wanted(*values[:WANTED])
        out = family.rows_out(input, wanted.dtype, family.options(*values[WANTED:]))
        return (*out, *_fake_grads(input, linear_weight, wanted))

    return LinearFamily(
        operators.define(
            name,
            f"({_DATA}, {_HOW}, {options}) -> (Tensor loss, Tensor stats)",
            functools.partial(rows.row_losses, family),
            fake_loss,
        ),
        operators.define(
            f"{name}_and_grad",
            f"(Tensor grad_loss, {_DATA}, Tensor? stats, {_HOW}, {_NEEDS}, {options}) -> "
            "(Tensor loss, Tensor stats, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
            functools.partial(rows.row_losses_and_grad, family),
            fake_loss_and_grad,
        ),
    )


def _fake_apply(_row_grad: Tensor, input: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_grads(input, linear_weight, Wanted(*rest[2 : 2 + WANTED]))


SOFTMAX = _define("linear_softmax_loss", rows.SOFTMAX, operators.SOFTMAX)
HIERARCHICAL = _define("linear_hierarchical_loss", rows.HIERARCHICAL, operators.HIERARCHICAL)
apply_operator = operators.define(
    "linear_softmax_apply",
    f"(Tensor row_grad, {_DATA}, {_HOW}, {_NEEDS}, {operators.SOFTMAX}) -> "
    "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    rows.linear_softmax_apply,
    _fake_apply,
)
