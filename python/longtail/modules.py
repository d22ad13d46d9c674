"""The losses as modules. Class vectors are buffers: they follow ``.to(device)`` and stand in the ``state_dict``."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from . import arguments, functional
from .class_balance import Counts, effective_number_weight

_VECTORS = ("weight", "class_bias", "class_margin")


class _Loss(nn.Module):
    """Keeps the options of one function of :mod:`longtail.functional` and calls it."""

    _function: Any

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = set(inspect.signature(type(self)._function).parameters)
        if "options" in known:
            known |= set(inspect.signature(functional.cross_entropy).parameters)
        unknown = sorted(options.keys() - known)
        if unknown:
            raise TypeError(f"{type(self).__name__} got unknown options: {', '.join(unknown)}")
        for name in _VECTORS:
            if name in options:
                self.register_buffer(name, options.pop(name))
        self.options = options

    def forward(self, input: Tensor, target: Tensor, **overrides: Any) -> Any:
        """The loss of ``input`` and ``target``; keyword arguments override options (``sample_weight=`` of a batch)."""
        vectors = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        return type(self)._function(input, target, **{**vectors, **self.options, **overrides})

    def extra_repr(self) -> str:
        vectors = [f"{name}=[{buffer.numel()}]" for name, buffer in self._buffers.items() if buffer is not None]
        return ", ".join([*vectors, *(f"{name}={value!r}" for name, value in self.options.items())])


class CrossEntropyLoss(_Loss):
    """:func:`longtail.cross_entropy` as a module; a drop-in for :class:`torch.nn.CrossEntropyLoss`.

    ``options``: the keyword-only arguments of the function.
    """

    _function = staticmethod(functional.cross_entropy)

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        class_bias: Tensor | None = None,
        class_margin: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            weight=weight,
            class_bias=class_bias,
            class_margin=class_margin,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            **options,
        )


class FocalLoss(_Loss):
    """:func:`longtail.focal_loss` as a module. ``options``: the keyword-only arguments of the function."""

    _function = staticmethod(functional.focal_loss)

    def __init__(
        self,
        weight: Tensor | None = None,
        gamma: float = 2.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        class_bias: Tensor | None = None,
        class_margin: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            weight=weight,
            class_bias=class_bias,
            class_margin=class_margin,
            gamma=gamma,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            **options,
        )


class ComplementEntropyLoss(_Loss):
    """:func:`longtail.complement_entropy` as a module. COT maximises it: descend on its negative."""

    _function = staticmethod(functional.complement_entropy)

    def __init__(
        self,
        balanced: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        weight: Tensor | None = None,
        class_bias: Tensor | None = None,
        class_margin: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            weight=weight,
            class_bias=class_bias,
            class_margin=class_margin,
            balanced=balanced,
            ignore_index=ignore_index,
            reduction=reduction,
            **options,
        )


class ComplementCrossEntropyLoss(_Loss):
    """:func:`longtail.complement_cross_entropy` as a module. ``options``: the function's keyword-only arguments."""

    _function = staticmethod(functional.complement_cross_entropy)

    def __init__(
        self,
        weight: Tensor | None = None,
        gamma: float = -1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        class_bias: Tensor | None = None,
        class_margin: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            weight=weight,
            class_bias=class_bias,
            class_margin=class_margin,
            gamma=gamma,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            **options,
        )


class ClassBalancedLoss(CrossEntropyLoss):
    """Class-balanced softmax and softmax focal loss (Cui et al. 2019, eq. 12).

    Each row's loss is weighted by ``effective_number_weight(samples_per_class, beta)`` of its class; the mean is over
    the counted rows (``normalizer="count"``), as the paper's code has it, not over the sum of the weights.

    Args:
        samples_per_class: training samples of each class, [C].
        beta: in [0, 1]; 0 is the unweighted loss, 1 inverse frequency. There is no default: what helps depends on the
            data (the paper tries 0.9, 0.99, 0.999, 0.9999).
        loss: "softmax" or "softmax_focal".
        gamma: focal gamma, with loss="softmax_focal" only.
        empty: what to do with classes without samples, as in ``effective_number_weight``.
        options: further arguments of :func:`longtail.cross_entropy`.
    """

    def __init__(
        self,
        samples_per_class: Counts,
        beta: float,
        loss: str = "softmax",
        gamma: float = 2.0,
        *,
        empty: str = "error",
        **options: Any,
    ) -> None:
        arguments.check_choice("loss", loss, ("softmax", "softmax_focal"))
        for name in ("weight", "focal_gamma"):
            if name in options:
                raise TypeError(f"ClassBalancedLoss sets {name} itself (from samples_per_class, beta, loss and gamma)")
        if options.get("reduction", "mean") == "mean":
            options.setdefault("normalizer", "count")
        weight = effective_number_weight(samples_per_class, beta, empty)  # type: ignore[arg-type]
        super().__init__(weight, focal_gamma=gamma if loss == "softmax_focal" else 0.0, **options)
        self.beta = beta

    def extra_repr(self) -> str:
        return f"beta={self.beta}, {super().extra_repr()}"
