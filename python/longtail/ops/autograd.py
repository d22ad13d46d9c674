"""A family of losses under autograd: one idea of a Function over its operators, for the three gradient modes.

"backward": forward reads the logits once; backward reads them once and writes the gradient once (3 passes).
"forward": loss and gradient in one sweep (2 passes); backward multiplies by the upstream gradient, which costs a scalar
read when it is 1 (of float16 logits always a pass more). "inplace": as "forward", written over the logits.

A Function takes (logits, target, denominator, divisor, factor, *vectors, constants) and gives (loss[, stats][, grad])
or, of a mean in one launch whose gradient backward makes, (loss[, stats], divisor); all but the loss are for the
context alone. ``denominator``: 0-d divisor of the sum of the row losses, or None; ``factor``: of the gradient that
forward makes; ``divisor``: of the upstream gradient in backward, where None is what is left to divide by: nothing if
forward made the gradient, else what forward gives, or ``denominator``. ``vectors``: those of the operators.
``constants``, one argument, for each costs time: (reduction, gradient, ignore_index, options, outputs), of which the
last two are what the operators take after the vectors, and what those of forward take at the end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import arithmetic_dtype, is_exporting
from ..options import LossOptions
from ..reference.sizes import Size
from . import operators
from .gradient import (
    check_overwritable,
    differentiable_reduction,
    function_shares,
    guarded,
    in_one_launch,
    reduce_loss,
    rows_of,
    scaled_gradient,
)
from .layout import row_count

# What Function.apply binds arguments against at every call: building it anew costs as much as a small loss.
SIGNATURE = inspect.Signature([inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)])


class Family(NamedTuple):
    """The operators of a family of losses."""

    loss: Callable[..., Any]
    loss_and_grad: Callable[..., Any]
    loss_and_grad_: Callable[..., Any]
    backward: Callable[..., Tensor]
    mean: Callable[..., Any] | None
    """Loss, statistics and what divides the gradient, where :func:`longtail.ops.operators.direct` says so.

    None of a family whose mean always comes with its denominator.
    """
    statistics: int
    """How many outputs, of the first two, stand between losses and gradient; backward takes them after the target."""


def forward(family: Family, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    logits, target, denominator, _, factor, *vectors, (reduction, gradient, _, options, outputs) = inputs
    with operators.below_autograd():
        if gradient == "backward":
            found = family.loss(logits, target, *vectors, *options, *outputs)
        else:
            one_sweep = family.loss_and_grad if gradient == "forward" else family.loss_and_grad_
            upstream = factor.expand(row_count(logits))
            found = one_sweep(upstream, logits, target, *vectors, *options, *outputs)
    if gradient == "inplace" and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(logits)
    loss, *rest = found if isinstance(found, tuple) else (found,)
    if denominator is None or not in_one_launch(logits):
        return (reduce_loss(loss, denominator, reduction), *rest)
    with operators.below_autograd():
        mean, divisor = operators.mean_loss(loss, denominator)
    return (mean, *rest, divisor) if gradient == "backward" else (mean, *rest)


def setup_context(family: Family, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, denominator, divisor, _, *vectors, constants = inputs
    ctx.reduction, ctx.gradient, ctx.ignore_index, ctx.options, _ = constants
    # The gradient stays differentiable in name, so that differentiating through it meets the refusal in backward; under
    # torch.compile, which refuses by itself, an unused differentiable output would cost a tangent of its size.
    stats = output[1 : 1 + family.statistics]
    constant = output[1:] if torch.compiler.is_compiling() or ctx.gradient == "backward" else stats
    if constant:
        ctx.mark_non_differentiable(*constant)
    ctx.set_materialize_grads(False)
    if ctx.gradient == "backward":
        found = output[1 + family.statistics :]
        divisor = found[0] if found else denominator if divisor is None else divisor
        ctx.save_for_backward(logits, target, divisor, *stats, *vectors)
    else:
        ctx.save_for_backward(output[-1] if ctx.gradient == "forward" else logits, target, divisor)


def backward(family: Family, ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
    if grad_output is None or not ctx.needs_input_grad[0]:
        return (None,) * len(ctx.needs_input_grad)
    if ctx.gradient == "backward":
        logits, target, divisor, *rest = ctx.saved_tensors
        if family.statistics and rest[0].shape[0] == 0 and not operators.direct(logits, target):
            # The mean of few classes left them out, which only the CPU's library finds anew.
            _, rest[0] = family.loss(logits, target, *rest[1:], *ctx.options)
        upstream = rows_of(grad_output, divisor, ctx.reduction, row_count(logits))
        if ctx.reduction == "elements":
            upstream = upstream.contiguous()
        grad = family.backward(upstream, logits, target, *rest, *ctx.options)
        grad = guarded(grad, grad_output, logits)
    else:
        grad = scaled_gradient(ctx, grad_output, ctx.ignore_index)
    return (grad, *(None,) * (len(ctx.needs_input_grad) - 1))


def _direct_loss(
    family: Family,
    logits: Tensor,
    target: Tensor,
    options: LossOptions,
    reduction: str,
    denominator: Tensor | None,
    outputs: tuple[Any, ...],
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The loss, what a mean's gradient is divided by and the statistics, of arguments that are direct."""
    if reduction == "mean" and denominator is None:
        assert family.mean is not None
        mean, *statistics, divisor = family.mean(logits, target, *options, *outputs)
        return mean, divisor, statistics
    found = family.loss(logits, target, *options, *outputs)
    loss, *statistics = found if isinstance(found, tuple) else (found,)
    return reduce_loss(loss, denominator, reduction), denominator, statistics


class DirectLoss(torch.autograd.Function):
    """:func:`direct_loss` with a gradient: what torch.func would have to see is no argument, which costs time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, divisor: Tensor | None, family: Family, rest: Any) -> Tensor:
        options, reduction, *_ = rest
        loss, denominator, statistics = _direct_loss(family, logits, target, *rest)
        vectors, ctx.options = options.parted()
        ctx.family, ctx.reduction, ctx.gradient = family, reduction, "backward"
        ctx.save_for_backward(logits, target, denominator if divisor is None else divisor, *statistics, *vectors)
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Any, ...]:
        return backward(ctx.family, ctx, grad_output)


def apply(function: type[torch.autograd.Function], logits: Tensor, *others: Any) -> Any:
    """``function.apply``, without what it does at every call for torch.func and for signatures with defaults."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_functorch_wrapped_tensor(logits)  # one that has left its transform
    ):
        return function.apply(logits, *others)
    return super(torch.autograd.Function, function).apply(logits, *others)  # type: ignore[misc]


def direct_loss(
    family: Family,
    data: tuple[Tensor, Tensor],
    options: LossOptions,
    reduction: str,
    denominator: Tensor | None,
    divisor: Tensor | None,
    outputs: tuple[Any, ...],
) -> Any:
    """:func:`differentiable_loss` in mode "backward", of what :func:`longtail.ops.operators.direct` says.

    Of a mean without denominator ``family.mean`` finds it; ``outputs`` are that operator's then.
    """
    given: Any = (options, reduction, denominator, outputs)
    if torch.is_grad_enabled() and data[0].requires_grad:
        return apply(DirectLoss, *data, divisor, family, given)
    loss, *_ = _direct_loss(family, *data, *given)
    return loss


def differentiable_loss(
    function: type[torch.autograd.Function],
    family: Family,
    input: Tensor,
    data: tuple[Tensor, Tensor],
    options: LossOptions,
    reduction: str,
    gradient: str,
    denominator: Tensor | None,
    counts: bool,
    size: Callable[[], Size],
    outputs: tuple[Any, ...] = (),
    statistics: bool = False,
) -> tuple[Any, ...]:
    """The losses of ``input``, reduced, and what of the operators' outputs stands between them and the gradient.

    Args:
        data: logits and target, as the operators take them; so are the options.
        denominator: what a mean divides by; ``counts``: whether it counts what is not ignored, see
            :func:`function_shares`.
        size: of the gradient, asked for where float16 keeps one.
        outputs: see above.
        statistics: whether the caller reads them.
    """
    check_overwritable(input, gradient)
    vectors, others = options.parted()
    wants_grad = torch.is_grad_enabled() and data[0].requires_grad
    if is_exporting() or (torch.compiler.is_compiling() and not wants_grad):
        # The operator alone: it differentiates in an exported graph, and torch.compile passes a context to the
        # Function's forward where nothing requires grad.
        found = family.loss(*data, *vectors, *others, *outputs)
        loss, *rest = found if isinstance(found, tuple) else (found,)
        return (differentiable_reduction(loss, denominator, reduction), *rest)
    mode = gradient if wants_grad else "backward"  # nothing may be computed for a gradient, or overwritten by one
    keeps, dtype = mode != "backward", arithmetic_dtype(input.dtype)
    bound = size() if keeps and input.dtype == torch.float16 else None
    counts = counts or (not keeps and in_one_launch(input))  # forward finds the divisor
    factor, divisor = function_shares(denominator, counts, keeps, bound, dtype, input.device)
    if not (keeps or statistics) and operators.direct(*data, *vectors):
        loss = direct_loss(family, data, options, reduction, denominator, divisor, outputs)
        return (loss, *(None,) * family.statistics)
    constants = (reduction, mode, options.ignore_index, others, outputs)
    found = apply(function, *data, denominator, divisor, factor, *vectors, constants)
    return tuple(found[: 1 + family.statistics])
