"""The class-balanced losses of both families."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from ..arguments import check_choice, check_gamma, check_tensors, is_dtensor
from ..class_balance.weights import Counts, PerClass, effective_number_weight
from ..errors import ArgumentTypeError, ArgumentValueError
from ..options import REDUCTIONS, SIGMOID_INNER, SigmoidOptions, sigmoid_request
from ..parallel.agreement import refuse_on_mesh
from ..sigmoid.loss import sigmoid_loss
from ..signatures import refuse_unknown, with_options_of
from .softmax import cross_entropy

CLASS_BALANCED = ("softmax", "sigmoid", "focal", "softmax_focal")

R = TypeVar("R")


def checked_on_every_rank(input: Tensor, check: Callable[[], R]) -> R:
    """What ``check`` finds; with a DTensor its error is raised on every rank, where all compare what they compute."""
    if not is_dtensor(input):
        return check()
    try:
        return check()
    except Exception as error:
        refuse_on_mesh(error, input)


SETS = ("weight", "focal_gamma", "class_weight_by_target")
"""Options of the two families that follow from the arguments of the class-balanced losses."""
_SIGMOID = (*SigmoidOptions._fields, "gradient")


@with_options_of(cross_entropy, SigmoidOptions, without=["size_average", "reduce", *SETS, *SIGMOID_INNER])
def class_balanced_loss(
    input: Tensor,
    target: Tensor,
    samples_per_class: Counts,
    beta: PerClass | None = None,
    loss: str = "softmax",
    gamma: float = 2.0,
    *,
    volume: PerClass | None = None,
    empty: str = "error",
    reduction: str = "mean",
    normalizer: str | float | Tensor | None = "rows",
    **options: Any,
) -> Tensor:
    """Class-balanced losses (Cui et al. 2019, eq. 11-13): the weight of its target class multiplies each row.

    The weights are ``effective_number_weight(samples_per_class, beta)``; computed at each call, so that training is
    better served by :class:`longtail.ClassBalancedLoss`. ``beta=0`` is the unweighted loss exactly.

    Args:
        input: logits (N, C) or (N, C, d1, ...).
        target: class indices (N,) or (N, d1, ...). For several labels per row pass the weights to
            :func:`sigmoid_focal_loss` as ``weight``, by column.
        samples_per_class: training samples of each class, [C].
        beta: in [0, 1], a number or one for each class, [C]; the paper tries 0.9, 0.99, 0.999, 0.9999.
        loss: "softmax", "softmax_focal", "sigmoid" (binary cross-entropy of all C classes, summed) or "focal" (sigmoid
            focal loss, summed, without alpha: the class weights stand in its place).
        gamma: >= 0, of the two focal losses.
        volume: instead of beta, N >= 1 of ``beta = (N - 1) / N``, a number or [C], as in ``effective_number``.
        empty: what to do with classes without samples, as in ``effective_number_weight``.
        reduction: "mean", "sum" or "none" (rows).
        normalizer: what "mean" divides by: "rows" (the counted rows, the paper's number of positives; at least 1), or
            whatever the function of the options takes; None is its own mean.
        options: of :func:`longtail.cross_entropy` or, but for ``class_weight_by_target``, of
            :func:`sigmoid_focal_loss`; alpha is None.

    Raises:
        TypeError, ValueError, IndexError: as ``effective_number_weight`` and :func:`longtail.cross_entropy`; or
            ``loss`` is none of the four.
    """
    refuse_unknown(class_balanced_loss, options)
    weights = partial(effective_number_weight, samples_per_class, beta, empty, volume=volume)  # type: ignore[arg-type]
    weight = checked_on_every_rank(input, weights)
    return balanced(
        *(input, target, weight.to(input.device), loss, gamma), reduction=reduction, normalizer=normalizer, **options
    )


def balanced(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    loss: str = "softmax",
    gamma: float = 2.0,
    *,
    reduction: str = "mean",
    normalizer: str | float | Tensor | None = "rows",
    **options: Any,
) -> Any:
    """:func:`class_balanced_loss` for given class weights [C]."""
    gamma = checked_on_every_rank(input, partial(_check_balanced, input, target, loss, gamma))
    focal_gamma = gamma if loss in ("focal", "softmax_focal") else 0.0
    softmax = loss in ("softmax", "softmax_focal")
    if isinstance(normalizer, str) and normalizer == "rows":
        normalizer = None if reduction != "mean" else "count" if softmax else "rows"
    if not softmax:
        check_choice("reduction", reduction, REDUCTIONS)
    for name in options:
        if name in ("alpha", "pos_weight") if softmax else name in SETS or name not in _SIGMOID:
            raise TypeError(f"class_balanced_loss() got an unexpected keyword argument {name!r} with loss={loss!r}")
    if softmax:
        options |= {"reduction": reduction, "normalizer": normalizer}
        return cross_entropy(input, target, weight, None, reduce=None, focal_gamma=focal_gamma, **options)
    records = sigmoid_request(
        weight=weight,
        class_weight_by_target=True,
        gamma=focal_gamma,
        reduction="rows" if reduction == "none" else reduction,
        normalizer=normalizer,
        **options,
    )
    return sigmoid_loss(input, target, *records)


def _check_balanced(input: Tensor, target: Tensor, loss: str, gamma: float) -> float:
    check_choice("loss", loss, CLASS_BALANCED)
    check_tensors(input=input, target=target)
    gamma = check_gamma(input, gamma)
    if loss in ("sigmoid", "focal") and is_dtensor(input):
        raise ArgumentTypeError(f"input is a DTensor, expected a plain tensor with loss={loss!r}")
    if loss != "softmax" and input.shape == target.shape:
        raise ArgumentValueError(
            f"target has the input's shape {list(input.shape)}, expected class indices, one for each row: the "
            "class-balanced losses weight a row by its one class. For a target for each element pass the weights to "
            "longtail.sigmoid_focal_loss, as weight=effective_number_weight(samples_per_class, beta)"
        )
    return gamma
