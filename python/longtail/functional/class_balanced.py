"""The class-balanced losses of both families."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from ..arguments import arithmetic_dtype, check_choice, check_device, check_gamma, check_tensors, is_dtensor, vector
from ..class_balance.arrays import check_ignore_index
from ..class_balance.counts import Counts, PerClass
from ..class_balance.row_weights import row_weights
from ..class_balance.weights import effective_number_weight
from ..errors import ArgumentTypeError, ArgumentValueError
from ..options import REDUCTIONS, SIGMOID_INNER, SigmoidOptions, sigmoid_request
from ..parallel.agreement import refuse_on_mesh
from ..sigmoid.loss import sigmoid_loss
from ..signatures import refuse_unknown, with_options_of
from .softmax import cross_entropy

CLASS_BALANCED = ("softmax", "sigmoid", "focal", "softmax_focal")
MULTI_LABEL = ("column", "row_mean", "row_max")

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
_SIGMOID = (*(name for name in SigmoidOptions._fields if name not in SIGMOID_INNER), "gradient", "multi_label")
_OF_SIGMOID = ("alpha", "pos_weight", "gamma_negative", "clip", "detach", "negative_scale", "multi_label")


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
    multi_label: str = "column",
    reduction: str = "mean",
    normalizer: str | float | Tensor | None = "rows",
    **options: Any,
) -> Tensor:
    r"""Class-balanced losses (Cui et al. 2019, eq. 11-13): the weight of its target class multiplies each row.

    That is of one label a row, all that the paper defines. With a target for each element, several labels a row, the
    weight of its class multiplies each column, positives and negatives alike, as in the class-balanced focal loss of
    Huang et al. 2021 (EMNLP, "Balancing methods for multi-label text classification"), or, with ``multi_label``, a
    weight made of those of its labels each row, as other modes of their code do:

    .. math:: \mathrm{row\_mean:}\; v_i = \frac{\sum_j y_{ij} w_j}{\sum_j y_{ij}} \qquad
        \mathrm{row\_max:}\; v_i = \frac{\max_j y_{ij} w_j}{\max_j y_{ij}}

    The weights are ``effective_number_weight(samples_per_class, beta)``; computed at each call, so that training is
    better served by :class:`longtail.ClassBalancedLoss`. ``beta=0`` is the unweighted loss exactly.

    Args:
        input: logits (N, C) or (N, C, d1, ...).
        target: class indices (N,) or (N, d1, ...). With "sigmoid" and "focal" also a target for each element, in the
            input's shape, 0, 1 or soft in between, as in :func:`sigmoid_focal_loss`.
        samples_per_class: training samples of each class, [C].
        beta: in [0, 1], a number or one for each class, [C]; the paper tries 0.9, 0.99, 0.999, 0.9999.
        loss: "softmax", "softmax_focal", "sigmoid" (binary cross-entropy of all C classes, summed) or "focal" (sigmoid
            focal loss, summed, without alpha: the class weights stand in its place).
        gamma: >= 0, of the two focal losses.
        volume: instead of beta, N >= 1 of ``beta = (N - 1) / N``, a number or [C], as in ``effective_number``.
        empty: what to do with classes without samples, as in ``effective_number_weight``.
        multi_label: with a target for each element, what the class weights multiply: "column" (the elements of each
            class), "row_mean" or "row_max" (each row: by the mean or the largest weight of its labels, on top of
            ``sample_weight``). In the row forms a row without labels weighs as the most frequent class, the least
            positive weight: negatives alone are no rare thing; elements that are ignored are no labels. Class indices
            have one label a row, whose weight it always is.
        reduction: "mean", "sum" or "none" (rows).
        normalizer: what "mean" divides by: "rows" (the counted rows, the paper's number of positives; at least 1), or
            whatever the function of the options takes; None is its own mean.
        options: of :func:`longtail.cross_entropy` or, but for ``class_weight_by_target``, of
            :func:`sigmoid_focal_loss`; alpha is None.

    Raises:
        TypeError, ValueError, IndexError: as ``effective_number_weight`` and :func:`longtail.cross_entropy`; or
            ``loss`` is none of the four; softmax focal loss is given a target for each element.
    """
    refuse_unknown(class_balanced_loss, options)
    weights = partial(effective_number_weight, samples_per_class, beta, empty, volume=volume)  # type: ignore[arg-type]
    weight = checked_on_every_rank(input, weights)
    options |= {"reduction": reduction, "normalizer": normalizer}
    if multi_label != "column":
        options["multi_label"] = multi_label
    return balanced(input, target, weight.to(input.device), loss, gamma, **options)


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
        if name in _OF_SIGMOID if softmax else name in SETS or name not in _SIGMOID:
            raise TypeError(f"class_balanced_loss() got an unexpected keyword argument {name!r} with loss={loss!r}")
    if softmax:
        options |= {"reduction": reduction, "normalizer": normalizer}
        return cross_entropy(input, target, weight, None, reduce=None, focal_gamma=focal_gamma, **options)
    multi_label = options.pop("multi_label", "column")
    check_choice("multi_label", multi_label, MULTI_LABEL)
    by_row = input.shape != target.shape
    if not by_row and multi_label != "column":
        ignore_index = options.get("ignore_index")
        options["sample_weight"] = _row_weights(
            input, target, weight, multi_label, options.get("sample_weight"), ignore_index
        )
    else:
        options |= {"weight": weight, "class_weight_by_target": by_row}
    options |= {"reduction": "rows" if reduction == "none" else reduction, "normalizer": normalizer}
    return sigmoid_loss(input, target, *sigmoid_request(gamma=focal_gamma, **options))


def _row_weights(
    input: Tensor, target: Tensor, weight: Tensor, mode: str, sample_weight: Tensor | None, ignore_index: int | None
) -> Tensor:
    """``sample_weight`` times the weights that rows have for their labels."""
    check_ignore_index(ignore_index)
    check_device("target", target, input)
    if target.is_complex():
        raise ArgumentTypeError(f"target has dtype {target.dtype}, expected a real one")
    dtype = arithmetic_dtype(input.dtype)
    rows = input.shape[:1] + input.shape[2:]
    y = target.detach() if target.dim() > 1 else target.detach().reshape(-1, 1)
    of_class = vector("weight", weight, y.shape[1:2], input, dtype)
    given = vector("sample_weight", sample_weight, rows, input, dtype)
    assert of_class is not None
    of_row = row_weights(y, of_class, mode, ignore_index).reshape(rows)
    return of_row if given is None else of_row * given.reshape(rows)


def _check_balanced(input: Tensor, target: Tensor, loss: str, gamma: float) -> float:
    check_choice("loss", loss, CLASS_BALANCED)
    check_tensors(input=input, target=target)
    gamma = check_gamma(input, gamma)
    if loss in ("sigmoid", "focal") and is_dtensor(input):
        raise ArgumentTypeError(f"input is a DTensor, expected a plain tensor with loss={loss!r}")
    if loss == "softmax_focal" and input.shape == target.shape:
        raise ArgumentValueError(
            f"target has the input's shape {list(input.shape)}, expected class indices, one for each row, with "
            f'loss={loss!r}; for a target for each element, several labels a row, loss="sigmoid" or "focal"'
        )
    return gamma
