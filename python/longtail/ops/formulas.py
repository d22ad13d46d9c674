"""Autograd formulas of the operators, for graphs that hold the operators alone: torch.export's, and direct calls.

The public functions bring Functions of their own, which know the gradient modes and torch.func. Here every derivative
is that of the operator's backward, made when it is asked for, any number of times, outside torch.func. softmax_loss,
sigmoid_loss, hierarchical_loss, two_way_loss and their ``_and_grad`` have one here, by the logits;
linear_softmax_loss has its own beside its Function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import operators
from .gradient import guarded

Gradients = Sequence[Tensor | None]


def register(name: str, first: int, derivative: Callable[..., Gradients], statistics: bool = False) -> None:
    """Makes operator ``name``, whose first output is the losses, differentiable in its arguments from ``first`` on.

    ``derivative(needs, grad_loss, stats, *arguments)``: the gradients of the first of those arguments, by an operator
    without a formula of its own, which torch.func would refuse in the backward of our Functions. ``statistics``:
    whether ``stats`` is the second output, None otherwise.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        others = output[1:] if isinstance(output, tuple) else ()
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.save_for_backward(others[0] if statistics else None, *(inputs[i] for i in ctx.places))

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        found: list[Any] = [None] * len(ctx.inputs)
        if grad_loss is None:
            return tuple(found)
        stats, *tensors = ctx.saved_tensors
        arguments = list(ctx.inputs)
        for i, tensor in zip(ctx.places, tensors, strict=True):
            arguments[i] = tensor
        needs = ctx.needs_input_grad[first:]
        for i, grad in enumerate(derivative(needs, grad_loss, stats, *arguments[first:])):
            found[first + i] = guarded(grad, grad_loss, *tensors) if needs[i] and grad is not None else None
        for i, need in enumerate(ctx.needs_input_grad):
            if need and found[i] is None:
                raise RuntimeError(f"longtail::{name} is not differentiable in its argument {i}, which requires grad")
        return tuple(found)

    torch.library.register_autograd(f"longtail::{name}", backward, setup_context=setup_context)


def _softmax(_needs: Any, grad_loss: Tensor, stats: Tensor, logits: Tensor, target: Tensor, *options: Any) -> Gradients:
    return [operators.softmax_loss_backward(grad_loss, logits, target, stats, *options)]


def _sigmoid(_needs: Any, grad_loss: Tensor, _stats: None, logits: Tensor, target: Tensor, *options: Any) -> Gradients:
    *options_, elementwise = options
    upstream = grad_loss.contiguous() if elementwise else grad_loss
    return [operators.sigmoid_loss_backward(upstream, logits, target, *options_)]


def _hierarchical(
    _needs: Any, grad_loss: Tensor, stats: Tensor, logits: Tensor, target: Tensor, *options: Any
) -> Gradients:
    return [operators.hierarchical_loss_backward(grad_loss, logits, target, stats, *options)]


def _two_way(_needs: Any, grad_loss: Tensor, stats: Tensor, logits: Tensor, target: Tensor, *options: Any) -> Gradients:
    return [operators.two_way_loss_backward(grad_loss, logits, target, stats, *options)]


register("softmax_loss", 0, _softmax, statistics=True)
register("softmax_loss_and_grad", 1, _softmax, statistics=True)
register("sigmoid_loss", 0, _sigmoid)
register("sigmoid_loss_and_grad", 1, _sigmoid)
register("hierarchical_loss", 0, _hierarchical, statistics=True)
register("hierarchical_loss_and_grad", 1, _hierarchical, statistics=True)
register("two_way_loss", 0, _two_way, statistics=True)
register("two_way_loss_and_grad", 1, _two_way, statistics=True)
