"""The losses as modules. Class vectors are buffers: they follow ``.to(device)`` and stand in the ``state_dict``."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from . import arguments, functional, functional_sigmoid
from .class_balance import Counts, effective_number_weight

_DATA = {"input", "target", "linear_weight", "linear_bias"}  # of a call, never options
_VECTORS = ("weight", "class_bias", "class_margin", "pos_weight")


class _Loss(nn.Module):
    """Keeps the options of one function and calls it."""

    _function: Any

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = set(inspect.signature(type(self)._function).parameters)
        if "options" in known:
            known |= set(inspect.signature(functional.cross_entropy).parameters)
        unknown = sorted(options.keys() - (known - _DATA))
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
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
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
            reduction=arguments.legacy_reduction(reduction, size_average, reduce),
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


class SigmoidFocalLoss(_Loss):
    """:func:`longtail.sigmoid_focal_loss` as a module. ``options``: the keyword-only arguments of the function."""

    _function = staticmethod(functional_sigmoid.sigmoid_focal_loss)

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        reduction: str = "none",
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(weight=weight, pos_weight=pos_weight, alpha=alpha, gamma=gamma, reduction=reduction, **options)


class SigmoidCrossEntropyLoss(_Loss):
    """:func:`longtail.sigmoid_cross_entropy` as a module, for :class:`torch.nn.BCEWithLogitsLoss`."""

    _function = staticmethod(functional_sigmoid.sigmoid_cross_entropy)

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        reduction = arguments.legacy_reduction(reduction, size_average, reduce)
        super().__init__(weight=weight, pos_weight=pos_weight, reduction=reduction, **options)


class BinaryFocalLoss(_Loss):
    """:func:`longtail.binary_focal_loss` as a module. ``options``: the keyword-only arguments of the function."""

    _function = staticmethod(functional_sigmoid.binary_focal_loss)

    def __init__(self, alpha: float | None = None, gamma: float = 2.0, reduction: str = "mean", **options: Any) -> None:
        super().__init__(alpha=alpha, gamma=gamma, reduction=reduction, **options)


class ClassBalancedLoss(_Loss):
    """Class-balanced losses (Cui et al. 2019, eq. 11-13): :func:`longtail.class_balanced_loss`, weights computed once.

    Each row's loss is weighted by ``effective_number_weight(samples_per_class, beta)`` of its class; the mean is over
    the counted rows, as the paper's code has it, not over the sum of the weights.

    Args:
        samples_per_class: training samples of each class, [C].
        beta: in [0, 1]; 0 is the unweighted loss, 1 inverse frequency. There is no default: what helps depends on the
            data (the paper tries 0.9, 0.99, 0.999, 0.9999).
        loss: "softmax", "softmax_focal", "sigmoid" or "focal".
        gamma: of the two focal losses.
        empty: what to do with classes without samples, as in ``effective_number_weight``.
        options: further arguments of :func:`longtail.cross_entropy` or :func:`longtail.sigmoid_focal_loss`.
    """

    _function = staticmethod(functional_sigmoid.balanced)

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
        arguments.check_choice("loss", loss, functional_sigmoid.CLASS_BALANCED)
        for name in ("weight", "focal_gamma", "class_weight_by_target"):
            if name in options:
                raise TypeError(f"ClassBalancedLoss sets {name} itself (from samples_per_class, beta, loss and gamma)")
        weight = effective_number_weight(samples_per_class, beta, empty)  # type: ignore[arg-type]
        super().__init__(weight=weight, loss=loss, gamma=gamma, **options)
        self.beta = beta

    def extra_repr(self) -> str:
        return f"beta={self.beta}, {super().extra_repr()}"
