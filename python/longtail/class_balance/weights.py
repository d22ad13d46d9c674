"""Weights, biases and margins computed from the number of training samples per class.

Everything here is arithmetic on a vector of C counts, done once before training: in float64 on the CPU, then
rounded once to ``dtype`` (float32) and moved to the device of the counts (the CPU for sequences and arrays).

A result that ``dtype`` does not hold, or a weight or effective number of a class with samples that it takes for 0, is a
``ValueError``. Biases and margins are added to logits: there a number near 0 rounds to 0 like any other.

Counts are a 1-D tensor, sequence or array of C >= 1 finite, non-negative numbers (fractions are welcome:
weighted data has them). The rest raises ``TypeError`` (not numbers) or ``ValueError`` (wrong value or shape).

An empty class (``n_c = 0``) makes the formulas infinite or NaN, so it is an error unless ``empty`` says
otherwise: "zero" gives that class the value 0 and computes the others without it, "clamp" counts it as 1.
"""

from __future__ import annotations

import math
import sys
from typing import Literal

import torch
from torch import Tensor

from ..arguments import check_number
from .counts import Counts, Empty, PerClass, checked_counts, finished, per_class, without_empty


def effective_number(
    samples_per_class: Counts,
    beta: PerClass | None = None,
    *,
    volume: PerClass | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Effective number ``(1 - beta_c^n_c) / (1 - beta_c)``; [C], 0 for an empty class.

    The expected volume of n samples drawn from a class of volume N, ``beta = (N - 1) / N`` (Cui et al. 2019,
    section 3: definition 1, proposition 1). Exactly one of ``beta`` and ``volume`` is given.

    Args:
        samples_per_class: counts n, [C].
        beta: in [0, 1]; 1 means its limit, ``n`` itself. A number (0-d tensors and arrays too), or one for each class:
            a tensor, sequence or array [C] (float64 near 1, where float32 has few digits of ``1 - beta``).
        volume: N >= 1, the number of unique prototypes: 1 is ``beta = 0``, infinity ``beta = 1``. A number, or [C].
        dtype: of the result; a value that it does not hold is refused.

    Raises:
        TypeError, ValueError: the counts are no numbers >= 0 of shape [C]; beta or volume is out of range, or of
            another length; both of them are given, or neither; beta or volume requires grad.
    """
    counts, device = checked_counts(samples_per_class)
    return finished("effective_number", _effective_number(counts, beta, volume), dtype, device, counts > 0)


def effective_number_weight(
    samples_per_class: Counts,
    beta: PerClass | None = None,
    empty: Empty = "error",
    *,
    volume: PerClass | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Class-balanced weights, ``1 / effective_number``, scaled to sum to C (Cui et al. 2019, section 4); [C].

    Args:
        samples_per_class: counts [C].
        beta: in [0, 1]; 0 gives all ones, 1 inverse frequency. A number, or one for each class, [C]. There is no
            default: what helps depends on the data, and a wrong value is worse than no weights at all.
        empty: "error", "zero" (the other weights sum to the number of present classes) or "clamp"
            (counted as 1).
        volume: instead of beta, as in :func:`effective_number`.
        dtype: of the result; a value that it does not hold is refused.

    Raises:
        TypeError, ValueError: as :func:`effective_number`; a class is empty.
    """
    counts, device = checked_counts(samples_per_class)
    counts = without_empty(counts, empty, ("zero", "clamp"))
    weight = _balanced(_effective_number(counts, beta, volume), 1.0)
    return finished("effective_number_weight", weight, dtype, device, counts > 0)


def inverse_frequency_weight(
    samples_per_class: Counts,
    power: float = 1.0,
    empty: Empty = "error",
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weights ``n_c^-power``, scaled to sum to C; [C].

    Args:
        samples_per_class: counts [C].
        power: >= 0; 0.5 is the inverse square root (Mahajan et al. 2018).
        empty: "error", "zero" (the other weights sum to the number of present classes) or "clamp"
            (counted as 1).
        dtype: of the result; a value that it does not hold is refused.

    Raises:
        TypeError, ValueError: the counts are no numbers >= 0 of shape [C]; power is out of range; a class is empty.
    """
    counts, device = checked_counts(samples_per_class)
    counts = without_empty(counts, empty, ("zero", "clamp"))
    weight = _balanced(counts, check_number("power", power, 0.0))
    return finished("inverse_frequency_weight", weight, dtype, device, counts > 0)


def positive_weight(
    samples_per_class: Counts,
    num_samples: PerClass,
    power: float = 1.0,
    empty: Empty = "error",
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The ``pos_weight`` of sigmoid losses, negatives over positives, ``((N - n_c) / n_c)^power``; [C].

    With ``power=1`` the positives of each class weigh as much as its negatives: the ratio that
    :class:`torch.nn.BCEWithLogitsLoss` documents. In a long tail the largest are of the order of N; a power between 0
    and 1 tempers them.

    Args:
        samples_per_class: counts n of positives, [C].
        num_samples: N, at least n: a number, or one for each class, [C], where not everything is known of every row.
            ``class_counts(targets, num_classes, return_totals=True)`` returns both.
        power: >= 0; 0 gives all ones.
        empty: a class without positives or without negatives, which has no ratio: "error", "zero" (its positives weigh
            nothing) or "clamp" (what is missing counted as 1).
        dtype: of the result; a value that it does not hold is refused.

    Raises:
        TypeError, ValueError: the counts are no numbers >= 0 of shape [C]; num_samples is below one of them; power is
            out of range; a class has no positives or no negatives.
    """
    counts, device = checked_counts(samples_per_class)
    total = per_class("num_samples", num_samples, counts, 0.0, sys.float_info.max)
    exponent = check_number("power", power, 0.0)
    _check_total(counts, total, empty)
    positives = without_empty(counts, empty, ("zero", "clamp"))
    negatives = (total - positives).clamp(min=0)
    if empty == "clamp":
        negatives = negatives.masked_fill(negatives == 0, 1.0)
    present = (positives > 0) & (negatives > 0)
    weight = torch.where(present, (negatives / positives) ** exponent, 0.0)
    return finished("positive_weight", weight, dtype, device, present)


def logit_adjustment(
    samples_per_class: Counts,
    tau: float = 1.0,
    empty: Literal["error", "clamp"] = "error",
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The ``class_bias`` of balanced softmax and logit adjustment, ``tau * log(n_c / sum_k n_k)``; [C].

    It belongs in the training loss alone: predict from the raw logits, without it, and validate by the plain loss.

    Args:
        samples_per_class: counts [C].
        tau: 1 is balanced softmax (Ren et al. 2020), any other number logit adjustment (Menon et al. 2021).
        empty: "error" or "clamp" (counted as 1); no "zero", which would be the largest bias of all and make the empty
            class the most likely one.
        dtype: of the result; a value that it does not hold is refused.

    Raises:
        TypeError, ValueError: the counts are no numbers >= 0 of shape [C]; tau is no finite number; a class is empty.
    """
    counts, device = checked_counts(samples_per_class)
    counts = without_empty(counts, empty, ("clamp",))
    largest = counts.max()  # of which the sum has no more than C: of the counts themselves it could overflow
    log_prior = counts.log() - largest.log() - (counts / largest).sum().log()
    return finished("logit_adjustment", check_number("tau", tau) * log_prior, dtype, device)


def ldam_margin(
    samples_per_class: Counts,
    max_margin: float = 0.5,
    empty: Empty = "error",
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The ``class_margin`` of LDAM, ``max_margin (n_c / min_k n_k)^(-1/4)`` (Cao et al. 2019, eq. 13); [C].

    It belongs in the training loss alone, as the bias of :func:`logit_adjustment` does.

    Args:
        samples_per_class: counts [C].
        max_margin: >= 0, the margin of the rarest class.
        empty: "error", "zero" (margin 0; the largest margin goes to the rarest class present) or "clamp"
            (counted as 1).
        dtype: of the result; a value that it does not hold is refused.

    Raises:
        TypeError, ValueError: the counts are no numbers >= 0 of shape [C]; max_margin is negative; a class is empty.
    """
    counts, device = checked_counts(samples_per_class)
    counts = without_empty(counts, empty, ("zero", "clamp"))
    margin = check_number("max_margin", max_margin, 0.0) * _relative(counts, 0.25)
    return finished("ldam_margin", margin, dtype, device)


def _check_total(counts: Tensor, total: Tensor, empty: str) -> None:
    """No more samples of a class than samples, and fewer unless ``empty`` says what a class of all shall get."""
    wrong = counts >= total if empty == "error" else counts > total
    wrong = wrong & ((counts > 0) | (total > 0))
    if wrong.any():
        c = int(wrong.nonzero()[0])
        advice = ', or empty="zero" (weight 0) or empty="clamp" (the negatives counted as 1)'
        raise ValueError(
            f"samples_per_class[{c}] is {counts[c].item():g} of num_samples = {total[c].item():g}, expected "
            + (f"fewer{advice}" if counts[c] == total[c] else "no more")
        )


def _effective_number(counts: Tensor, beta: PerClass | None, volume: PerClass | None) -> Tensor:
    if (beta is None) == (volume is None):
        given = "neither" if beta is None else "both"
        raise TypeError(f"expected exactly one of beta and volume, got {given}")
    if volume is not None:
        log_beta = torch.log1p(-1 / per_class("volume", volume, counts, 1.0, math.inf))
    else:
        assert beta is not None
        log_beta = per_class("beta", beta, counts, 0.0, 1.0).log()
    exponent = counts * log_beta
    number = torch.expm1(exponent) / torch.expm1(log_beta)
    # Of exponents that small expm1 changes nothing, but the product may be 0, or have lost its digits.
    number = torch.where(exponent > -1e-18, counts * (log_beta / torch.expm1(log_beta)), number)
    # The limits, where that is 0 / 0 or holds 0 * inf: beta = 1, and no samples.
    return torch.where((log_beta == 0) | (counts == 0), counts, number)


def _relative(numbers_per_class: Tensor, power: float) -> Tensor:
    """``x_c^-power`` over its largest value, 0 where x_c = 0; ratio first, so no power overflows."""
    present = numbers_per_class > 0
    smallest = numbers_per_class[present].min()
    ratio = smallest / numbers_per_class
    by_logs = torch.exp(power * (smallest.log() - numbers_per_class.log()))  # where the ratio has lost its digits
    relative = torch.where(ratio < torch.finfo(torch.float64).tiny, by_logs, ratio**power)
    return torch.where(present, relative, 0.0)


def _balanced(numbers_per_class: Tensor, power: float) -> Tensor:
    """``x_c^-power`` scaled to sum to the number of classes with x_c > 0."""
    weight = _relative(numbers_per_class, power)
    return weight * ((numbers_per_class > 0).sum() / weight.sum())
