"""The losses as modules: options are attributes, class vectors buffers.

Buffers stand in the ``state_dict``, or, with ``persistent=False``, do not: the checkpoint of a model with another loss
then loads strictly, whether it holds class vectors or not, and the module keeps its own.

Construction takes what the function takes. What is written to an attribute is checked as the function checks it
(vectors for their type alone), by a call with no rows, and holds from the next call on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .. import arguments
from ..errors import ArgumentTypeError
from ..signatures import meant

_DATA = ("input", "target", "inputs", "targets", "linear_weight", "linear_bias")  # never options
LEGACY = ("size_average", "reduce")  # another way to say the reduction
_VECTORS = (
    "weight",
    "class_bias",
    "class_margin",
    "class_scale",
    "target_scale",
    "class_mitigation",
    "pos_weight",
    "inverse_counts",
)
_NUMBERS_OR_VECTORS = ("alpha", "gamma", "gamma_positive")
_PERSISTENT = inspect.Parameter("persistent", inspect.Parameter.KEYWORD_ONLY, default=True, annotation="bool")


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults of what ``function`` takes besides the data."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.name not in _DATA and p.kind is not p.VAR_KEYWORD}


class _ClassSignature:
    """What ``inspect`` finds of a class, and not of its instances, which are called otherwise."""

    def __init__(self, signature: inspect.Signature | None) -> None:
        self._signature = signature

    def __get__(self, instance: object, _owner: type) -> inspect.Signature | None:
        if instance is not None:
            raise AttributeError("__signature__")
        return self._signature


class Loss(nn.Module):
    """Keeps the options of one function and calls it. Its constructor takes them in the function's order."""

    _function: Any
    _own_defaults: ClassVar[dict[str, Any]] = {}
    """Of options whose default is not the function's."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        shown = None  # that of __init__
        if "_function" in vars(cls) and "__init__" not in vars(cls):
            signature = inspect.signature(cls._function)
            options = [
                p.replace(default=cls._own_defaults.get(p.name, p.default))
                for p in signature.parameters.values()
                if p.name not in _DATA
            ]
            options.append(_PERSISTENT)
            shown = signature.replace(parameters=options, return_annotation=None)
        if shown is not None or "__init__" in vars(cls):
            cls.__signature__ = _ClassSignature(shown)  # type: ignore[attr-defined]

    if TYPE_CHECKING:  # options are attributes

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, *positional: Any, **options: Any) -> None:
        super().__init__()
        self.persistent = options.pop("persistent", True)
        accepted = self._accepted(options)
        names = self._positional()
        if len(positional) > len(names):
            given = f"{len(positional)} were given"
            raise TypeError(f"{type(self).__name__} takes {len(names)} positional arguments but {given}")
        for name, value in zip(names, positional, strict=False):
            if name in options:
                raise TypeError(f"{type(self).__name__} got multiple values for argument {name!r}")
            options[name] = value
        unknown = sorted(options.keys() - accepted.keys())
        if unknown:
            hint = next(filter(None, (meant(name, accepted.keys() - options.keys()) for name in unknown)), "")
            raise TypeError(f"{type(self).__name__} got unknown options: {', '.join(unknown)}{hint}")
        size_average, reduce = (options.pop(name, None) for name in LEGACY)
        if size_average is not None or reduce is not None:
            reduction = options.get("reduction", accepted["reduction"])
            options["reduction"] = arguments.legacy_reduction(reduction, size_average, reduce, stacklevel=3)
        self._set_options({name: default for name, default in accepted.items() if name not in LEGACY}, options)

    def _accepted(self, _options: dict[str, Any]) -> dict[str, Any]:
        """The options and their defaults, in view of what is given."""
        return options_of(type(self)._function) | self._own_defaults

    @classmethod
    def _positional(cls) -> list[str]:
        """The options that the function takes by position."""
        parameters = inspect.signature(cls._function).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in _DATA]

    def _set_options(self, defaults: dict[str, Any], options: dict[str, Any]) -> None:
        self._defaults = defaults
        for name, default in defaults.items():
            value = options.get(name, default)
            if name in _VECTORS or (name in _NUMBERS_OR_VECTORS and isinstance(value, Tensor)):
                self._check(name, value)
                self.register_buffer(name, value, persistent=self.persistent)
            else:
                setattr(self, name, value)

    @property
    def persistent(self) -> bool:
        """Whether class vectors stand in the ``state_dict``; if not, a checkpoint's are not read either."""
        return bool(self.__dict__.get("_persistent", True))

    @persistent.setter
    def persistent(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"persistent is a {type(value).__name__}, expected a bool")
        self.__dict__["_persistent"] = value
        for name in self._class_vectors():
            self.register_buffer(name, self._buffers[name], persistent=value)

    def _class_vectors(self) -> list[str]:
        return [name for name in (*_VECTORS, *_NUMBERS_OR_VECTORS) if name in self._buffers]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not self.persistent:
            own = {prefix + name for name in self._class_vectors()}
            unexpected_keys[:] = [key for key in unexpected_keys if key not in own]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_defaults", ()):
            self._check(name, value)
            if name in _NUMBERS_OR_VECTORS and isinstance(value, Tensor) != (name in self._buffers):
                if hasattr(self, name):
                    delattr(self, name)
                if isinstance(value, Tensor):
                    self.register_buffer(name, value, persistent=self.persistent)
                    return
        super().__setattr__(name, value)

    def _check(self, name: str, value: Any) -> None:
        """Raises what the function raises of this option alone; what depends on the input is left to the call."""
        default = self._defaults[name]
        if value is default or (type(value) is type(default) and not differ(value, default)):
            return
        if name in (*_VECTORS, "sample_weight"):
            if value is not None:
                arguments.check_tensors(**{name: value})
                if not value.is_floating_point():
                    raise ArgumentTypeError(f"{name} has dtype {value.dtype}, expected a floating point dtype")
        elif name in _NUMBERS_OR_VECTORS and isinstance(value, Tensor) and value.dim() > 0:
            self._call_on_nothing(**{"reduction": "sum", name: torch.empty(1, dtype=value.dtype, device="meta")})
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
        """Options that may be given by position, and others where they are not the default; no class vectors."""
        named = self._positional()
        return {
            name: value
            for name, value in self._options().items()
            if name not in self._buffers and (name in named or differ(value, self._defaults[name]))
        }

    def extra_repr(self) -> str:
        vectors = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        shown = vectors | self.options | ({} if self.persistent else {"persistent": False})
        return ", ".join(f"{name}={_shown(value)}" for name, value in shown.items())


def differ(value: Any, default: Any) -> bool:
    return value is not default and (isinstance(value, Tensor) or value != default)


def _shown(value: Any) -> str:
    return f"[{value.numel()}]" if isinstance(value, Tensor) and value.dim() else repr(value)
