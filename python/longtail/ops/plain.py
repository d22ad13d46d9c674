"""The reference backend: plain PyTorch, on any device.

Its functions know rows [N, C] alone. Images [N, C, P] pay a transposing copy; results lie as those of a kernel that
walks the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import fallback, fallback_hierarchical, fallback_two_way
from .layout import DENSE_SOFTMAX, logits_position, to_images, to_rows

DEVICE = None
_OF_ROWS = ("softmax_loss_accumulate", "softmax_loss_apply", "softmax_loss_apply_")
serves = None  # whatever the operators take


def missing() -> None:
    """Nothing: it always runs."""


def detail() -> str:
    return "plain PyTorch, any device"


def operator(op: str) -> Callable[..., Any]:
    families = {"hierarchical_": fallback_hierarchical, "two_way_": fallback_two_way}
    family = next((x for stem, x in families.items() if op.startswith(stem)), fallback)
    return through_rows(op, getattr(family, op))


def through_rows(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of operator ``op``, made to accept [N, C, P] where it knows [N, C]."""
    position = logits_position(op)
    if position is None or op.startswith("hierarchical_") or op in _OF_ROWS:
        return kernel  # knows no logits, or refuses images

    def call(*args: Any) -> Any:
        logits = args[position]
        if logits.dim() != 3 or (op in DENSE_SOFTMAX and fallback.is_dense(args[position + 1])):
            return kernel(*args)
        inner = [to_rows(x) if isinstance(x, Tensor) and x.dim() == 3 else x for x in args]
        result = kernel(*inner)
        if op.endswith("_"):
            logits.copy_(to_images(inner[position], logits.shape))
        if result is None:
            return None
        several = isinstance(result, tuple)
        restored = [_restored(x, logits) for x in (result if several else (result,))]
        if op.startswith(("softmax_loss", "two_way_loss")) and several:
            restored[1] = result[1].t().contiguous().t()
        return tuple(restored) if several else restored[0]

    return call


def _restored(result: Tensor, logits: Tensor) -> Tensor:
    return to_images(result, logits.shape) if result.dim() == 2 and result.shape[1] == logits.shape[1] else result
