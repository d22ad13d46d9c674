"""What of a loss is wanted, beside its options."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_choice, check_normalizer
from .sigmoid import SigmoidOptions
from .softmax import SoftmaxOptions, softmax_options

REDUCTIONS = ("mean", "sum", "none")
GRADIENTS = ("backward", "forward", "inplace")


class Request(NamedTuple):
    """What of a loss is wanted, and how its gradient is made."""

    reduction: str = "mean"
    normalizer: str | float | Tensor | None = None
    gradient: str = "backward"
    return_stats: bool = False

    def check(
        self,
        dtype: torch.dtype,
        reductions: tuple[str, ...] = REDUCTIONS,
        normalizers: tuple[str, ...] = ("count",),
    ) -> None:
        """``dtype``: of the arithmetic; the rest: what may be passed, besides numbers and tensors.

        Raises:
            TypeError, ValueError: one of them is wrong.
        """
        check_choice("reduction", self.reduction, reductions)
        check_choice("gradient", self.gradient, GRADIENTS)
        check_normalizer(self.normalizer, self.reduction, normalizers, dtype)

    def of_logits(self) -> Request:  # a method: of a property the compiler of torch 2.10 does not see the type
        """The same of a loss of logits, where the "auto" of linear losses is "backward"."""
        return self._replace(gradient="backward") if self.gradient == "auto" else self


def softmax_request(**named: Any) -> tuple[SoftmaxOptions, Request]:
    """Both records of what :func:`longtail.cross_entropy` takes by name."""
    request = {name: named.pop(name) for name in Request._fields if name in named}
    return softmax_options(**named), Request(**request)


def sigmoid_request(**named: Any) -> tuple[SigmoidOptions, Request]:
    """Both records of what :func:`longtail.sigmoid_focal_loss` takes by name."""
    request = {name: named.pop(name) for name in ("reduction", "normalizer", "gradient") if name in named}
    return SigmoidOptions(**named), Request(**request)
