"""The losses of several labels a text, with published hyperparameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...class_balance import positive_weight
from ...functional import (
    asymmetric_loss,
    class_balanced_loss,
    distribution_balanced_loss,
    sigmoid_cross_entropy,
    sigmoid_focal_loss,
    two_way_loss,
    zlpr_loss,
)
from ..methods import BETAS

LabelLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Of logits and labels, 0 and 1, [N, C] each."""


class LabelMethod(NamedTuple):
    """A loss of several labels a text."""

    name: str
    make_loss: Callable[[Tensor, int], LabelLoss]  # of the texts of each label [C], and of all texts
    sigmoid: bool = True  # its logits are those of probabilities
    start: bool = True  # near a probability of 1 / C


ROWS: dict[str, Any] = {"normalizer": "rows"}
"""A mean over texts of sums over labels: one over all elements has gradients that are small beside Adam's epsilon."""


def _plain(_counts: Tensor, _num_samples: int, function: Any, **options: Any) -> LabelLoss:
    return functools.partial(function, **options)


def _prior(counts: Tensor, num_samples: int) -> LabelLoss:
    share = counts.double() / num_samples
    return functools.partial(sigmoid_cross_entropy, class_bias=torch.logit(share).float(), **ROWS)


def _positive_weight(counts: Tensor, num_samples: int, power: float) -> LabelLoss:
    return functools.partial(sigmoid_cross_entropy, pos_weight=positive_weight(counts, num_samples, power), **ROWS)


def _balanced(counts: Tensor, _num_samples: int, **options: Any) -> LabelLoss:
    return functools.partial(class_balanced_loss, samples_per_class=counts, multi_label="row_mean", **options)


def _distribution_balanced(counts: Tensor, num_samples: int) -> LabelLoss:
    return functools.partial(distribution_balanced_loss, samples_per_class=counts, num_samples=num_samples, **ROWS)


def _method(name: str, make_loss: Callable[..., LabelLoss], **options: Any) -> LabelMethod:
    return LabelMethod(name, functools.partial(make_loss, **options))


def _ranking(name: str, function: Any) -> LabelMethod:
    return LabelMethod(name, functools.partial(_plain, function=function), sigmoid=False, start=False)


BINARY = _method("binary cross-entropy", _plain, function=sigmoid_cross_entropy, **ROWS)


def label_methods() -> list[LabelMethod]:
    """Binary cross-entropy first."""
    return [
        BINARY,
        _method("positive weight, power 1", _positive_weight, power=1.0),
        _method("positive weight, power 0.5", _positive_weight, power=0.5),
        # The class bias is the start: the model's own logits begin at 0.
        LabelMethod("logit adjustment", _prior, start=False),
        _method(
            "sigmoid focal, gamma 2",
            _plain,
            function=sigmoid_focal_loss,
            alpha=None,
            gamma=2.0,
            reduction="mean",
            **ROWS,
        ),
        *(_method(f"class-balanced sigmoid, beta {beta:g}", _balanced, beta=beta, loss="sigmoid") for beta in BETAS),
        _method(*("class-balanced sigmoid focal, beta 0.999, gamma 1", _balanced), beta=0.999, loss="focal", gamma=1.0),
        _method("asymmetric", _plain, function=asymmetric_loss, **ROWS),
        _method("distribution-balanced", _distribution_balanced),
        _ranking("ZLPR", zlpr_loss),
        _ranking("two-way", two_way_loss),
    ]
