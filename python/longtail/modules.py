"""The losses as modules: options are attributes, class vectors buffers that stand in the ``state_dict``.

Construction takes what the function takes. What is written to an attribute is checked as the function checks it
(vectors for their type alone), by a call with no rows, and holds from the next call on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments, functional
from .errors import ArgumentTypeError

_DATA = {"input", "target", "inputs", "targets", "linear_weight", "linear_bias", "element_weight"}  # never options
_LEGACY = ("size_average", "reduce")  # another way to say the reduction
_VECTORS = ("weight", "class_bias", "class_margin", "pos_weight")


def _options_of(function: Callable[..., Any], passes_on_to: Any = None, sets: Iterable[str] = ()) -> dict[str, Any]:
    """Names and defaults of what ``function`` takes besides the data.

    Its ``**options`` go to ``passes_on_to``, to which it gives ``sets`` itself.
    """
    found = inspect.signature(function).parameters.values()
    own = {p.name: p.default for p in found if p.name not in _DATA and p.kind is not p.VAR_KEYWORD}
    passed_on = {} if passes_on_to is None else _options_of(passes_on_to)
    return own | {name: default for name, default in passed_on.items() if name not in (*own, *sets)}


class _Loss(nn.Module):
    """Keeps the options of one function and calls it."""

    _function: Any
    _passes_on_to: Any = None  # the function that gets the **options of _function
    _sets: tuple[str, ...] = ()  # what _function gives to that one itself

    # For type checkers; a module has those that its function takes.
    weight: Tensor | None
    class_bias: Tensor | None
    class_margin: Tensor | None
    pos_weight: Tensor | None
    sample_weight: Tensor | None
    reduction: str
    normalizer: str | float | Tensor | None
    gradient: str
    ignore_index: int | None
    label_smoothing: float
    gamma: float
    focal_gamma: float
    complement_gamma: float
    alpha: float | None
    balanced: bool
    class_weight_by_target: bool
    scale: float
    softcap: float | None
    z_loss: float
    return_stats: bool

    def __init__(self, accepted: dict[str, Any] | None = None, /, **options: Any) -> None:
        super().__init__()
        if accepted is None:
            accepted = _options_of(type(self)._function, type(self)._passes_on_to, self._sets)
        unknown = sorted(options.keys() - accepted.keys())
        if unknown:
            raise TypeError(f"{type(self).__name__} got unknown options: {', '.join(unknown)}")
        size_average, reduce = (options.pop(name, None) for name in _LEGACY)
        if size_average is not None or reduce is not None:
            reduction = options.get("reduction", accepted["reduction"])
            options["reduction"] = arguments.legacy_reduction(reduction, size_average, reduce, stacklevel=4)
        self._set_options({name: default for name, default in accepted.items() if name not in _LEGACY}, options)

    def _set_options(self, defaults: dict[str, Any], options: dict[str, Any]) -> None:
        self._defaults = defaults
        for name, default in defaults.items():
            value = options.get(name, default)
            if name in _VECTORS:
                self._check(name, value)
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_defaults", ()):
            self._check(name, value)
        super().__setattr__(name, value)

    def _check(self, name: str, value: Any) -> None:
        """Raises what the function raises of this option alone; what depends on the input is left to the call."""
        default = self._defaults[name]
        if value is default or (type(value) is type(default) and not _differ(value, default)):
            return
        if name in (*_VECTORS, "sample_weight"):
            if value is not None:
                arguments.check_tensors(**{name: value})
                if not value.is_floating_point():
                    raise ArgumentTypeError(f"{name} has dtype {value.dtype}, expected a floating point dtype")
        elif name == "normalizer" and isinstance(value, Tensor):
            arguments.check_normalizer(value, "mean", ())
        else:
            self._call_on_nothing(**{"reduction": "mean" if name == "normalizer" else "sum", name: value})

    def _call_on_nothing(self, **options: Any) -> None:
        """The function of no rows, and of one class: it checks what it is given, and computes nothing."""
        if "class_weight_by_target" in options:
            options["weight"] = torch.ones(1, device="meta", dtype=torch.float64)
        logits, target = (torch.empty(shape, device="meta", dtype=torch.float64) for shape in ((0, 1), (0,)))
        type(self)._function(logits, target.long(), **options)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._defaults}

    def forward(self, input: Tensor, target: Tensor, **overrides: Any) -> Any:
        """The loss of ``input`` and ``target``; keyword arguments override options (``sample_weight=`` of a batch)."""
        return type(self)._function(input, target, **{**self._options(), **overrides})

    @property
    def options(self) -> dict[str, Any]:
        """Options that the constructor names, and others where they are not the default; no class vectors."""
        named = inspect.signature(type(self).__init__).parameters
        return {
            name: value
            for name, value in self._options().items()
            if name not in _VECTORS and (name in named or _differ(value, self._defaults[name]))
        }

    def extra_repr(self) -> str:
        vectors = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        return ", ".join(f"{name}={_shown(value)}" for name, value in (vectors | self.options).items())


def _differ(value: Any, default: Any) -> bool:
    return value is not default and (isinstance(value, Tensor) or value != default)


def _shown(value: Any) -> str:
    return f"[{value.numel()}]" if isinstance(value, Tensor) and value.dim() else repr(value)


class CrossEntropyLoss(_Loss):
    """:func:`longtail.cross_entropy` as a module; a drop-in for :class:`torch.nn.CrossEntropyLoss`.

    ``options``: the keyword-only arguments of the function. Each option is an attribute, of this and of every other
    loss module: written, it is checked, and holds from the next call on.
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
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            **options,
        )


class FocalLoss(_Loss):
    """:func:`longtail.focal_loss` as a module. ``options``: the keyword-only arguments of the function."""

    _function = staticmethod(functional.focal_loss)
    _passes_on_to = staticmethod(functional.cross_entropy)
    _sets = ("focal_gamma",)

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
    _passes_on_to = staticmethod(functional.cross_entropy)
    _sets = ("complement_gamma",)

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
