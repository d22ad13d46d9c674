"""The options of the softmax family."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_integer
from .number import Number
from .vectors import checked_vectors


class SoftmaxOptions(NamedTuple):
    """What the softmax operators take after the data, in their order; the meaning: :func:`longtail.cross_entropy`.

    As users give them, or, after :meth:`checked` and :meth:`prepared`, as the operators take them.
    """

    weight: Tensor | None = None
    class_bias: Tensor | None = None
    class_margin: Tensor | None = None
    class_scale: Tensor | None = None
    target_scale: Tensor | None = None
    class_mitigation: Tensor | None = None
    sample_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    complement_coefficient: float = 0.0
    """Users' complement_gamma, which :meth:`prepared` divides by C - 1."""
    cross_entropy_coefficient: float = 1.0
    scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0
    compensation: float = 0.0
    entropy: bool = False
    """Whether the statistic t is wanted without complement entropy too; else kernels may leave it 0."""

    @property
    def vectors(self) -> dict[str, Any]:
        """Those that are tensors, or None, by name."""
        return dict(zip(SOFTMAX_VECTORS, self, strict=False))

    @property
    def numbers(self) -> dict[str, float | None]:
        """Those that users pass as numbers, by the name and in the way that they do, of checked ones."""
        public = {field: number for field, number in SOFTMAX_NUMBERS.items() if field not in _INTERNAL}
        return {number.name: number.given(getattr(self, field)) for field, number in public.items()}

    # Methods: properties the compiler of torch 2.10 does not see.

    def by_target(self) -> bool:
        """Whether the target's class changes the effective logits of the others."""
        return self.target_scale is not None or self.class_mitigation is not None or self.compensation != 0

    def of_one_class(self) -> list[str]:
        """The fields given that mean something for one target class alone."""
        numbers = [field for field, rule in SOFTMAX_NUMBERS.items() if rule.needs_class]
        given = [field for field in numbers if getattr(self, field) != SOFTMAX_NUMBERS[field].off]
        return given + [name for name in _OF_ONE_CLASS if getattr(self, name) is not None]

    def parted(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The tensors, which autograd has to see, and the rest; one after the other they are the whole."""
        return self[:_VECTORS], self[_VECTORS:]

    def checked(self, dtype: torch.dtype) -> SoftmaxOptions:
        """With numbers that are floats, and that ``dtype``, of the arithmetic, holds.

        Raises:
            TypeError, ValueError: an option that is no tensor is wrong.
        """
        check_integer("ignore_index", self.ignore_index)
        found: list[Any] = list(self)
        for i, off, rule in _CHECKS:
            value = found[i]
            if type(value) is not float or value != off:  # few, at most calls
                found[i] = rule.check(value, dtype)
        return SoftmaxOptions(*found)

    def prepared(
        self, input: Tensor, rows: torch.Size, num_classes: int, dtype: torch.dtype, balanced: bool = True
    ) -> SoftmaxOptions:
        """As the operators take checked ones: vectors flat and in ``dtype``, complement_gamma over C - 1.

        Args:
            rows: the shape of the targets.
            balanced: whether complement_gamma is divided.

        Raises:
            TypeError, ValueError: a vector is wrong.
        """
        options = self.with_vectors(input, rows, num_classes, dtype)
        return options.for_classes(num_classes) if balanced and options.complement_coefficient else options

    def with_vectors(self, input: Tensor, rows: torch.Size, num_classes: int, dtype: torch.dtype) -> SoftmaxOptions:
        """With vectors that are checked, flat and in ``dtype``."""
        vectors, others = self.parted()
        if not [x for x in vectors if x is not None]:  # at most calls
            return self
        found = checked_vectors(SOFTMAX_VECTORS, vectors, input, rows, num_classes, dtype)
        return SoftmaxOptions(*found, *others)

    def of_classes(self, part: slice) -> SoftmaxOptions:
        """With the vectors of some classes."""
        cut = {name: x[part] for name, x in self.vectors.items() if x is not None and name != "sample_weight"}
        return self._replace(**cut)

    def for_classes(self, num_classes: int) -> SoftmaxOptions:
        """With complement_gamma over C - 1."""
        return self._replace(complement_coefficient=self.complement_coefficient / max(num_classes - 1, 1))


_OF_ONE_CLASS = ("class_margin", "target_scale", "class_mitigation")
SOFTMAX_VECTORS = (
    "weight",
    "class_bias",
    "class_margin",
    "class_scale",
    "target_scale",
    "class_mitigation",
    "sample_weight",
)
_VECTORS = len(SOFTMAX_VECTORS)
# By the field of SoftmaxOptions.
SOFTMAX_NUMBERS = {
    "label_smoothing": Number("label_smoothing", 0.0, 1.0),
    "focal_gamma": Number("focal_gamma", 0.0, needs_class=True),
    "complement_coefficient": Number("complement_gamma", needs_class=True),
    "cross_entropy_coefficient": Number("cross_entropy_coefficient", off=1.0, needs_class=True),
    "scale": Number("scale", off=1.0, vanishes=False),
    "softcap": Number("softcap", off=None, vanishes=False),
    "z_loss": Number("z_loss", share=0.5),  # its gradient has 2 z_loss
    "compensation": Number("compensation", 0.0, needs_class=True),
}
_INTERNAL = ("cross_entropy_coefficient",)  # of complement_entropy, and of the operators
_RULES = tuple(SOFTMAX_NUMBERS.get(field) for field in SoftmaxOptions._fields)
_CHECKS = tuple((i, rule.off, rule) for i, rule in enumerate(_RULES) if rule is not None)
_FIELDS = {number.name: field for field, number in SOFTMAX_NUMBERS.items()}


def softmax_options(**named: Any) -> SoftmaxOptions:
    """The record of options by the names that users know."""
    return SoftmaxOptions(**{_FIELDS.get(name, name): x for name, x in named.items()})


softmax_options.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        parameter.replace(name=rule.name if rule else parameter.name, kind=inspect.Parameter.KEYWORD_ONLY)
        for rule, parameter in zip(_RULES, inspect.signature(SoftmaxOptions).parameters.values(), strict=True)
        if parameter.name != "entropy"
    ]
)
