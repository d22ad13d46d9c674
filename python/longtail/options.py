"""The options of the families of losses, written once: names, types, defaults, ranges, and what says "off".

The rest follows from the records: the operators' schemas, what is checked, what ranks compare, what functions take.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .arguments import LIMITS, check_choice, check_integer, check_normalizer, check_number, vector
from .errors import ArgumentTypeError
from .signatures import annotation_text

REDUCTIONS = ("mean", "sum", "none")
GRADIENTS = ("backward", "forward", "inplace")


class Number(NamedTuple):
    """What may be passed for an option that is a number."""

    name: str
    """As users pass it."""
    low: float = -math.inf
    high: float = math.inf
    off: float | None = 0.0
    """The value that does nothing. None: so does None, which operators take as 0, and others are positive."""
    vanishes: bool = True
    """Whether it may be so near 0 that the dtype of the arithmetic takes it for 0."""
    share: float = 1.0
    """Of the largest number of that dtype: how large it may be."""
    needs_class: bool = False
    """Whether it means something for one target class alone, and nothing for class probabilities."""

    def check(self, value: Any, dtype: torch.dtype) -> float:
        """``value`` as a float that ``dtype`` holds."""
        if value is None and self.off is None:
            return 0.0
        largest = math.inf if self.share == 1 else self.share * LIMITS[dtype][0]
        low, high = max(self.low, -largest), min(self.high, largest)
        number = check_number(self.name, value, low, high, dtype=dtype, vanishes=self.vanishes)
        if self.off is None and number <= 0:
            raise ValueError(f"{self.name} is {number}, expected a positive number or None")
        return number

    def given(self, value: float) -> float | None:
        """What users pass for a checked ``value``."""
        return None if self.off is None and value == 0 else value


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
        return self[:_SOFTMAX_VECTORS], self[_SOFTMAX_VECTORS:]

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
        found = _checked_vectors(SOFTMAX_VECTORS, vectors, input, rows, num_classes, dtype)
        return SoftmaxOptions(*found, *others)

    def of_classes(self, part: slice) -> SoftmaxOptions:
        """With the vectors of some classes."""
        cut = {name: x[part] for name, x in self.vectors.items() if x is not None and name != "sample_weight"}
        return self._replace(**cut)

    def for_classes(self, num_classes: int) -> SoftmaxOptions:
        """With complement_gamma over C - 1."""
        return self._replace(complement_coefficient=self.complement_coefficient / max(num_classes - 1, 1))


class SigmoidOptions(NamedTuple):
    """What the sigmoid operators take after the data, in their order; the meaning: :func:`longtail.sigmoid_focal_loss`.

    As users give them, or, after :meth:`checked` and :meth:`prepared`, as the operators take them.
    """

    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    sample_weight: Tensor | None = None
    class_weight_by_target: bool = False
    ignore_index: int | None = None
    alpha: float | None = None
    gamma: float = 0.0

    def parted(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The tensors, which autograd has to see, and the rest; one after the other they are the whole."""
        return self[:_SIGMOID_VECTORS], self[_SIGMOID_VECTORS:]

    def checked(self, dtype: torch.dtype) -> SigmoidOptions:
        """With numbers that are floats, and that ``dtype``, of the arithmetic, holds.

        Raises:
            TypeError, ValueError: an option that is no tensor is wrong.
        """
        if self.ignore_index is not None:
            check_integer("ignore_index", self.ignore_index, expected="an int or None")
        gamma, alpha = check_number("gamma", self.gamma, 0.0, dtype=dtype), self.alpha
        if alpha is not None:
            try:
                alpha = check_number("alpha", alpha, high=1.0)
            except ArgumentTypeError as error:
                way = "a per-class alpha a [C] is alpha=None, weight=1 - a, pos_weight=a / (1 - a)"
                raise ArgumentTypeError(f"{error}; {way}") from None
            alpha = None if alpha < 0 else alpha
        return self if alpha is self.alpha and gamma is self.gamma else self._replace(alpha=alpha, gamma=gamma)

    def prepared(
        self, input: Tensor, rows: torch.Size, num_classes: int, dtype: torch.dtype, dense: bool
    ) -> SigmoidOptions:
        """As the operators take checked ones: vectors flat and in ``dtype``.

        Args:
            rows: the shape of the rows.
            dense: whether there is a target for each element, not a class for each row.

        Raises:
            TypeError, ValueError: a vector is wrong, or does not go with the targets.
        """
        if self.class_weight_by_target and (dense or self.weight is None):
            raise ValueError("class_weight_by_target needs class indices as targets, and weight")
        vectors, (by_target, ignore_index, alpha, gamma) = self.parted()
        if ignore_index is None and not dense:
            ignore_index = -100
        elif by_target is False and not [x for x in vectors if x is not None]:  # at most calls
            return self
        found = _checked_vectors(SIGMOID_VECTORS, vectors, input, rows, num_classes, dtype)
        found += [bool(by_target), ignore_index, alpha, gamma]
        return SigmoidOptions(*found)


class HierarchicalOptions(NamedTuple):
    """What the operators of hierarchical cross-entropy take after the data, in their order.

    The first six describe the tree, see :meth:`longtail.Hierarchy.tables`; those after mean what they mean in
    :func:`longtail.hierarchical_cross_entropy`. V nodes, all but the root; L is the depth; targets are among G classes.

    Of one shard of the classes, logits [N, C] have C of the G, and positions count these alone: of a class of another
    shard, the node at the end of its path is empty here. Its u_g in the statistics is -inf then, and its loss nothing.
    """

    path: Tensor
    """int32 [G, L]: the nodes from below the root down to each class, shorter paths padded by their last node."""
    node_begin: Tensor
    """int32 [V]: the classes of a node are at the positions [node_begin, node_end)."""
    node_end: Tensor
    node_weight: Tensor
    """[V], of T: lambda of each node."""
    order: Tensor | None = None
    """int32 [C]: the class at each position; None, as ``position``, where each class is at its own."""
    position: Tensor | None = None
    """int32 [C]: the position of each class."""
    weight: Tensor | None = None
    """[G]"""
    class_bias: Tensor | None = None
    """[C]"""
    sample_weight: Tensor | None = None
    ignore_index: int = -100

    def parted(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The tensors, which autograd has to see, and the rest; one after the other they are the whole."""
        return self[:-1], self[-1:]

    def prepared(self, input: Tensor, rows: torch.Size, num_classes: int, dtype: torch.dtype) -> HierarchicalOptions:
        """As the operators take them: vectors that are checked, flat and in ``dtype``.

        Args:
            rows: the shape of the targets.

        Raises:
            TypeError, ValueError: a vector is wrong.
        """
        vectors = (self.weight, self.class_bias, self.sample_weight)
        if not [x for x in vectors if x is not None]:  # at most calls
            return self
        found = _checked_vectors(HIERARCHICAL_VECTORS, vectors, input, rows, num_classes, dtype)
        return self._replace(**dict(zip(HIERARCHICAL_VECTORS, found, strict=True)))


RowOptions = TypeVar("RowOptions", SoftmaxOptions, HierarchicalOptions)
"""Of the losses of rows that have one class for a target."""


def _checked_vectors(
    names: tuple[str, ...],
    vectors: tuple[Any, ...],
    input: Tensor,
    rows: torch.Size,
    num_classes: int,
    dtype: torch.dtype,
) -> list[Any]:
    per_class = torch.Size((num_classes,))
    return [
        None if x is None else vector(name, x, rows if name == "sample_weight" else per_class, input, dtype)
        for name, x in zip(names, vectors, strict=True)
    ]


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
SIGMOID_VECTORS = ("weight", "pos_weight", "sample_weight")
HIERARCHICAL_VECTORS = ("weight", "class_bias", "sample_weight")
HIERARCHY_DEPTH = 8
"""The deepest tree that kernels of hierarchical cross-entropy know."""
_SOFTMAX_VECTORS, _SIGMOID_VECTORS = len(SOFTMAX_VECTORS), len(SIGMOID_VECTORS)
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


def schema(options: type[SoftmaxOptions] | type[SigmoidOptions] | type[HierarchicalOptions]) -> str:
    """The arguments of operators, as torch.library writes them."""
    parts = []
    for name, annotation in options.__annotations__.items():
        kind = "float" if name in SOFTMAX_NUMBERS else annotation_text(annotation).replace(" | None", "?")
        parts.append(f"{kind} {name}")
    return ", ".join(parts)


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


def softmax_request(**named: Any) -> tuple[SoftmaxOptions, Request]:
    """Both records of what :func:`longtail.cross_entropy` takes by name."""
    request = {name: named.pop(name) for name in Request._fields if name in named}
    return softmax_options(**named), Request(**request)


def sigmoid_request(**named: Any) -> tuple[SigmoidOptions, Request]:
    """Both records of what :func:`longtail.sigmoid_focal_loss` takes by name."""
    request = {name: named.pop(name) for name in ("reduction", "normalizer", "gradient") if name in named}
    return SigmoidOptions(**named), Request(**request)
