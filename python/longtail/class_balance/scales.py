"""Scales, pairwise mitigation and adjusted logits from the number of training samples per class.

Counts, ``empty``, ``dtype`` and what is raised are as in :mod:`.weights`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..arguments import check_number, check_tensors
from ..errors import ArgumentTypeError, ArgumentValueError
from .counts import Counts, checked_counts, finished, without_empty
from .weights import logit_adjustment

Clamp = Literal["error", "clamp"]


def cdt_scale(
    samples_per_class: Counts, gamma: float, empty: Clamp = "error", *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The ``class_scale`` of CDT, ``(n_c / max_k n_k)^gamma``; [C], in (0, 1].

    Class-dependent temperatures (Ye et al. 2020) divide the logit of class c by ``a_c = (max_k n_k / n_c)^gamma`` while
    training: the logits of rare classes have to become larger. It belongs in the training loss alone.

    Args:
        samples_per_class: counts [C].
        gamma: >= 0; 0 gives all ones. Searched in [0, 0.4] on CIFAR-10, [0, 0.2] on CIFAR-100 and Tiny-ImageNet, [0,
            0.1] on iNaturalist.
        empty: "error" or "clamp" (counted as 1).
        dtype: of the result; a value that it does not hold, or takes for 0, is refused.

    Raises:
        TypeError, ValueError: the counts are no numbers >= 0 of shape [C]; gamma is out of range; a class is empty.
    """
    counts, device = checked_counts(samples_per_class)
    counts = without_empty(counts, empty, ("clamp",))
    scale = torch.exp(check_number("gamma", gamma, 0.0) * (counts.log() - counts.max().log()))
    return finished("cdt_scale", scale, dtype, device, counts > 0)


def vector_scaling(
    samples_per_class: Counts,
    gamma: float = 0.3,
    tau: float = 1.0,
    empty: Clamp = "error",
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The options of the vector-scaling (VS) loss: ``cross_entropy(input, target, **vector_scaling(counts))``.

    ``class_scale`` is :func:`longtail.cdt_scale`, Delta_c in the paper; ``class_bias`` is
    :func:`longtail.logit_adjustment`, its iota_c: the loss is the cross-entropy of ``Delta_c z_c + iota_c`` (Kini et
    al. 2021, the VS loss). It belongs in the training loss alone.

    Args:
        samples_per_class: counts [C].
        gamma: >= 0, of the scale; with 0 there is none, which leaves logit adjustment. 0.3 as in the authors' code,
            whose example for CIFAR-10-LT takes 0.2.
        tau: of the bias; with 0 there is none, which leaves CDT. 1 as in the authors' code; 1.2 in that example.
        empty: "error" or "clamp" (counted as 1).
        dtype: of the vectors; a value that it does not hold is refused.

    Raises:
        TypeError, ValueError: as the two functions.
    """
    gamma, tau = check_number("gamma", gamma, 0.0), check_number("tau", tau)
    options = {}
    if gamma:
        options["class_scale"] = cdt_scale(samples_per_class, gamma, empty, dtype=dtype)
    bias = logit_adjustment(samples_per_class, tau, empty, dtype=dtype)  # which checks the counts, where both are off
    if tau:
        options["class_bias"] = bias
    return options


def immax_scale(
    samples_per_class: Counts,
    margin: float = 1.0,
    power: float = 1 / 3,
    empty: Clamp = "error",
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The ``target_scale`` of IMMAX, one over the confidence margins ``rho_c``; [C].

    The margins are proportional to ``n_c^power`` and ``margin`` on average. IMMAX (Cortes et al. 2025) is the
    cross-entropy of ``z_j / rho_g``, g the target. Where the classes' features are alike, the generalization bound
    ``sqrt(sum_c n_c / rho_c^2)`` is least, among margins of a given sum, for ``rho_c`` proportional to ``n_c^(1/3)``.
    With ``weight=inverse_frequency_weight(counts)`` it is GCA. It belongs in the training loss alone.

    Args:
        samples_per_class: counts [C].
        margin: > 0, the mean of the margins: the temperature of the whole, to be tuned.
        power: >= 0; 0 gives every class the same margin.
        empty: "error" or "clamp" (counted as 1).
        dtype: of the result; a value that it does not hold, or takes for 0, is refused.

    Raises:
        TypeError, ValueError: the counts are no numbers >= 0 of shape [C]; margin or power is out of range; a class is
            empty.
    """
    counts, device = checked_counts(samples_per_class)
    counts = without_empty(counts, empty, ("clamp",))
    power = check_number("power", power, 0.0)
    if check_number("margin", margin, 0.0) == 0:
        raise ArgumentValueError("margin is 0.0, expected a positive number")
    relative = torch.exp(power * (counts.log() - counts.max().log()))  # ratios first, so no power overflows
    return finished("immax_scale", relative.mean() / (relative * margin), dtype, device, counts > 0)


def seesaw_mitigation(
    samples_per_class: Counts, p: float = 0.8, empty: Clamp = "error", *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The ``class_mitigation`` of Seesaw, ``p log(n_c / max_k n_k)``; [C].

    The loss adds the negative differences to the target's: ``min(0, p (log n_j - log n_g))``, the logarithm of Seesaw's
    mitigation factor (Wang et al. 2021). It belongs in the training loss alone.

    Args:
        samples_per_class: counts [C]: of the data set, or, as in the paper, those seen so far.
        p: >= 0, how far rare classes are spared; 0.8 in the paper.
        empty: "error" or "clamp" (counted as 1, as the authors' code does).
        dtype: of the result; a value that it does not hold is refused.

    Raises:
        TypeError, ValueError: the counts are no numbers >= 0 of shape [C]; p is out of range; a class is empty.
    """
    counts, device = checked_counts(samples_per_class)
    counts = without_empty(counts, empty, ("clamp",))
    mitigation = check_number("p", p, 0.0) * (counts.log() - counts.max().log())
    return finished("seesaw_mitigation", mitigation, dtype, device)


def adjusted_logits(input: Tensor, samples_per_class: Counts, tau: float = 1.0, empty: Clamp = "error") -> Tensor:
    """Logits for prediction where all classes matter the same: ``input - tau log(n_c / n)``, post hoc.

    For models that were trained **without** the prior (Menon et al. 2021, post-hoc logit adjustment): after
    ``class_bias=logit_adjustment(counts)``, or another loss that makes up for the frequencies, the raw logits are
    already those, and this would do it twice.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), floating point; left as they are.
        samples_per_class: counts [C] of the training data.
        tau: 1 undoes the prior; to be tuned on validation data.
        empty: "error" or "clamp" (counted as 1).

    Returns:
        The input's shape; float64 of float64 logits, else float32. Differentiable.

    Raises:
        TypeError, ValueError: input is no floating point tensor, or has not as many classes as there are counts; as
            :func:`longtail.logit_adjustment`.
    """
    check_tensors(input=input)
    if not input.is_floating_point():
        raise ArgumentTypeError(f"input has dtype {input.dtype}, expected floating point logits")
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    bias = logit_adjustment(samples_per_class, tau, empty, dtype=dtype).to(input.device)
    dim = 0 if input.dim() == 1 else 1
    if input.dim() == 0 or input.shape[dim] != len(bias):
        raise ArgumentValueError(
            f"input has shape {list(input.shape)}, expected {len(bias)} classes in dimension {dim}, as the counts"
        )
    return input.to(dtype) - bias.view(-1, *(1,) * (input.dim() - 1 - dim))
