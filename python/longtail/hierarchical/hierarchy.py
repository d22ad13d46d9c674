"""A tree over the classes, as tables that kernels read: the nodes above a class, and the classes below a node."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_number
from ..errors import ArgumentTypeError, ArgumentValueError
from ..options import HIERARCHY_DEPTH
from .nodes import children_of, integers, names_of, smallest_class

_CPU = torch.device("cpu")
_SHARDS = 64  # that a tree keeps


class HierarchyTables(NamedTuple):
    """What the operators take of a tree; V nodes, all but the root, and L, the depth.

    Of one shard of the classes ``path`` is that of all, and C and positions count those of the shard.
    """

    path: Tensor
    """int32 [C, L]: the nodes from below the root down to each class, shorter paths padded by their last node."""
    node_begin: Tensor
    """int32 [V]: the classes of a node are at the positions [node_begin, node_end)."""
    node_end: Tensor
    order: Tensor | None
    """int32 [C]: the class at each position; None, as ``position``, where each class is at its own."""
    position: Tensor | None
    """int32 [C]: the position of each class."""

    def to(self, device: torch.device) -> HierarchyTables:
        return HierarchyTables(*(None if x is None else x.to(device) for x in self))  # type: ignore[arg-type]


class Hierarchy:
    """A tree whose leaves are the classes, for :func:`longtail.hierarchical_cross_entropy`.

    Made by :meth:`from_parents` or :meth:`from_paths`; it does not change afterwards. The classes are laid out so that
    those of every node are side by side, in the order of the smallest class of each: classes that are numbered along
    the tree keep their place, and the loss is fastest then.

    The loss copies the tree to the device of its input once and keeps the copy. A compiled graph cannot: before
    ``torch.compile`` on a GPU, call :meth:`to` once, or each call copies the tree again.

    Attributes:
        num_classes: the number of classes, C.
        depth: L, the number of nodes from below the root down to the deepest class. Kernels know trees up to depth 8;
            the losses of deeper ones are computed in plain PyTorch.
        order: int32 [C], the class at each position, on the CPU.
        position: int32 [C], the position of each class, on the CPU.
    """

    def __init__(self, children: Sequence[Sequence[int]], root: int, class_of: dict[int, int]) -> None:
        """Of the children of each node, without circles, and the class of each leaf; for the methods below."""
        smallest = smallest_class(children, root, class_of)
        num_classes = len(class_of)
        order: list[int] = []
        begin: list[int] = []
        end: list[int] = []
        depths: list[float] = []
        paths: list[tuple[int, ...]] = [()] * num_classes
        stack: list[tuple[int, tuple[int, ...], bool]] = [(root, (), False)]
        while stack:
            node, path, done = stack.pop()
            if done:
                end[path[-1]] = len(order)
                continue
            if node != root:
                path = (*path, len(begin))
                begin.append(len(order))
                end.append(0)
                depths.append(float(len(path)))
                stack.append((node, path, True))
            if node in class_of:
                order.append(class_of[node])
                paths[class_of[node]] = path
            below = (child for child in children[node] if child in smallest)  # without those that hold no class
            stack += [(child, path, False) for child in sorted(below, key=smallest.__getitem__, reverse=True)]
        self.num_classes = num_classes
        self.depth = max(map(len, paths))
        padded = [path + path[-1:] * (self.depth - len(path)) for path in paths]
        position = [0] * num_classes
        for place, number in enumerate(order):
            position[number] = place
        with torch.inference_mode(False):  # else autograd could not save them, ever
            self.order, self.position = _int32(order), _int32(position)
            moved = (None, None) if order == list(range(num_classes)) else (_int32(order), _int32(position))
            tables = HierarchyTables(_int32(padded), _int32(begin), _int32(end), *moved)
            self._placed = {_CPU: (tables, torch.tensor(depths, dtype=torch.float64, device=_CPU))}
        self._shards: dict[tuple[torch.device, int, int], HierarchyTables] = {}
        self._fingerprint: int | None = None

    @classmethod
    def from_parents(cls, parents: Sequence[int] | Tensor, leaves: Sequence[int] | Tensor | None = None) -> Hierarchy:
        """Of the parent of every node.

        Args:
            parents: the index of the parent of each node; -1, or its own index, for the root. A sequence of ints, or an
                integer tensor [nodes].
            leaves: the node of each class, [C]; None: the nodes without children, in order. Nodes that hold none of the
                classes are left out.

        Raises:
            TypeError: an index is no integer.
            ValueError: there is no root, or more than one; an index is out of bounds; nodes form a circle; a class has
                nodes below it, is the root, or is named twice; there are no classes.

        >>> tree = Hierarchy.from_parents([-1, 0, 0, 1, 1, 2])  # classes: nodes 3, 4 and 5
        """
        found = integers("parents", parents)
        children, root = children_of(found)
        if leaves is None:
            nodes = [node for node, below in enumerate(children) if not below]
        else:
            nodes = integers("leaves", leaves)
        class_of: dict[int, int] = {}
        for number, node in enumerate(nodes):
            if not 0 <= node < len(found):
                raise ArgumentValueError(f"leaves[{number}] is {node}, expected a node in [0, {len(found)})")
            if node in class_of:
                raise ArgumentValueError(f"node {node} is the leaf of the classes {class_of[node]} and {number}")
            if children[node]:
                raise ArgumentValueError(
                    f"class {number} is node {node}, which has nodes below it ({children[node][0]}), expected a leaf"
                )
            class_of[node] = number
        if not class_of or root in class_of:
            raise ArgumentValueError(f"the tree of {len(found)} nodes has no class below its root")
        return cls(children, root, class_of)

    @classmethod
    def from_paths(cls, paths: Iterable[str | Sequence[Hashable]]) -> Hierarchy:
        """Of the names from the top down to each class, its own the last.

        Args:
            paths: for each class a sequence of names, such as ("animal", "dog", "poodle"), or a string of them,
                "animal/dog/poodle". The root has no name: what all begin with is a node below it.

        Raises:
            TypeError: a path is neither, or a name is not hashable; paths is one string.
            ValueError: there are no classes; a path or a name is empty; two classes have the same path, or that of one
                begins with that of another, which would have classes below it.
        """
        if isinstance(paths, str | bytes):
            raise ArgumentTypeError(f"paths is {paths!r}, expected a path for each class")
        children: list[list[int]] = [[]]
        nodes: dict[tuple[int, Hashable], int] = {}
        class_of: dict[int, int] = {}
        for number, path in enumerate(paths):
            node = 0
            for name in names_of(number, path):
                if node in class_of:
                    raise ArgumentValueError(f"path {number}, {path!r}, begins with that of class {class_of[node]}")
                key = (node, name)
                if key not in nodes:
                    nodes[key] = len(children)
                    children[node].append(len(children))
                    children.append([])
                node = nodes[key]
            if node in class_of:
                raise ArgumentValueError(f"the classes {class_of[node]} and {number} have the same path, {path!r}")
            if children[node]:
                raise ArgumentValueError(f"path {number}, {path!r}, is the beginning of that of another class")
            class_of[node] = number
        if not class_of:
            raise ArgumentValueError("paths is empty, expected one for each class")
        return cls(children, 0, class_of)

    def tables(self, device: torch.device | str = "cpu") -> HierarchyTables:
        """What the operators take of the tree, on ``device``; moved there once."""
        return self._on(torch.device(device))[0]

    def shard(self, start: int, size: int, device: torch.device | str = "cpu") -> HierarchyTables:
        """The tables of the classes [start, start + size), kept; nodes that hold none of them are empty.

        Raises:
            ValueError: the tree has not all of these classes.
        """
        if not 0 <= start <= start + size <= self.num_classes:
            raise ArgumentValueError(
                f"the classes [{start}, {start + size}) are not all among the {self.num_classes} of the hierarchy"
            )
        if torch.compiler.is_compiling():  # whose tensors have no values
            return _restricted(self.tables(), start, size).to(torch.device(device))
        whole = self.tables(device)
        key = whole.path.device, start, size
        if key in self._shards:
            return self._shards[key]
        with torch.inference_mode(False):
            found = _restricted(self.tables(), start, size).to(key[0])._replace(path=whole.path)
        if _is_plain(found.node_begin):
            if len(self._shards) >= _SHARDS:
                self._shards.pop(next(iter(self._shards)), None)
            self._shards[key] = found
        return found

    def fingerprint(self) -> int:
        """Of the tree, and of where its classes lie; equal trees have equal ones. Made once."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=6)
            for table in self.tables()[:4]:  # the last is None where it is the identity
                if table is not None:
                    digest.update(f"{tuple(table.shape)}".encode() + table.numpy().tobytes())
            self._fingerprint = int.from_bytes(digest.digest(), "little")
        return self._fingerprint

    def to(self, device: torch.device | str) -> Hierarchy:
        """This tree, whose tables are on ``device`` from now on, too: a compiled graph then copies none.

        :class:`longtail.HierarchicalCrossEntropyLoss` does so when it is moved, if it has class vectors; without, a
        module does not know its device.
        """
        self._on(torch.device(device))
        return self

    def _on(self, place: torch.device) -> tuple[HierarchyTables, Tensor]:
        """The tables, and the depth of each node."""
        found = self._placed.get(place)
        if found is not None:
            return found
        tables, depths = self._placed[_CPU]
        if torch.compiler.is_compiling():  # whose tensors have no values
            return tables.to(place), depths.to(place)
        with torch.inference_mode(False):
            found = tables.to(place), depths.to(place)
        if not _is_plain(found[1]):
            return found
        return self._placed.setdefault(found[1].device, found)  # "cuda" is another device after set_device

    def node_weight(
        self, alpha: float, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """lambda of each node, exp(-alpha depth), [V] (Bertinetto et al. 2020, section 3.1).

        The depth of the nodes below the root is 1, as in the authors' code.

        Raises:
            TypeError, ValueError: alpha is no finite number >= 0.
        """
        alpha = check_number("alpha", alpha, 0.0)
        return torch.exp(self._on(torch.device(device))[1] * -alpha).to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": {_CPU: self._placed[_CPU]}, "_shards": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Whatever map_location put the tensors on, and also in inference mode."""
        tables, depths = state["_placed"][_CPU]
        with torch.inference_mode(False):
            self.__dict__.update(state, order=_lasting(state["order"]), position=_lasting(state["position"]))
            kept = HierarchyTables(*(None if x is None else _lasting(x) for x in tables))  # type: ignore[arg-type]
            self._placed = {_CPU: (kept, _lasting(depths))}

    def __repr__(self) -> str:
        deep = "" if self.depth <= HIERARCHY_DEPTH else ", in plain PyTorch"
        return f"Hierarchy(num_classes={self.num_classes}, depth={self.depth}{deep})"


def _restricted(whole: HierarchyTables, start: int, size: int) -> HierarchyTables:
    """To the classes [start, start + size), on the CPU."""
    path, begin, end, _, position = whole
    if position is None:
        begin, end = ((x - start).clamp(0, size) for x in (begin, end))
        return HierarchyTables(path, begin, end, None, None)
    places, order = position[start : start + size].sort()
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(size, device=order.device))
    begin, end = (torch.searchsorted(places, x, out_int32=True) for x in (begin, end))
    return HierarchyTables(path, begin, end, order.int(), inverse.int())


def _int32(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=_CPU)


def _is_plain(x: Tensor) -> bool:
    """Whether it outlives the mode or transform that made it."""
    return type(x) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _lasting(x: Tensor) -> Tensor:
    """On the CPU, and for autograd to save."""
    return x.to(_CPU, copy=True) if x.is_inference() or x.device != _CPU else x
