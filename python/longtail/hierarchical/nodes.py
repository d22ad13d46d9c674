"""Trees as users write them, read and checked: parents of nodes, and paths of names."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, ArgumentValueError


def integers(name: str, values: Sequence[int] | Tensor) -> list[int]:
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ArgumentTypeError(
                f"{name} has shape {list(values.shape)} and dtype {values.dtype}, expected integers, 1-dimensional"
            )
        return [int(x) for x in values.tolist()]
    found = list(values)
    for i, x in enumerate(found):
        if isinstance(x, bool) or not hasattr(x, "__index__"):
            raise ArgumentTypeError(f"{name}[{i}] is a {type(x).__name__}, expected an int")
    return [int(x) for x in found]


def children_of(parents: list[int]) -> tuple[list[list[int]], int]:
    """The children of each node, and the root."""
    children: list[list[int]] = [[] for _ in parents]
    roots = []
    for node, parent in enumerate(parents):
        if parent in (-1, node):
            roots.append(node)
        elif 0 <= parent < len(parents):
            children[parent].append(node)
        else:
            raise ArgumentValueError(f"parents[{node}] is {parent}, expected -1 or a node in [0, {len(parents)})")
    if len(roots) != 1:
        named = "no root" if not roots else f"the roots {', '.join(map(str, roots[:5]))}"
        raise ArgumentValueError(f"parents of {len(parents)} nodes name {named}, expected one root, whose parent is -1")
    reached, stack = {roots[0]}, [roots[0]]
    while stack:
        below = children[stack.pop()]
        reached.update(below)
        stack += below
    if len(reached) < len(parents):
        lost = next(node for node in range(len(parents)) if node not in reached)
        raise ArgumentValueError(f"node {lost} is not below the root {roots[0]}: its parents form a circle")
    return children, roots[0]


def smallest_class(children: Sequence[Sequence[int]], root: int, class_of: dict[int, int]) -> dict[int, int]:
    """The smallest class at or below each node, of those that have one."""
    smallest = dict(class_of)
    visited, stack = [], [root]
    while stack:
        visited.append(stack.pop())
        stack += children[visited[-1]]
    for node in reversed(visited):
        below = [smallest[child] for child in children[node] if child in smallest]
        if below:
            smallest[node] = min(below)
    return smallest


def names_of(number: int, path: str | Sequence[Hashable]) -> list[Hashable]:
    if not isinstance(path, str | Sequence) or isinstance(path, bytes | bytearray | memoryview):
        raise ArgumentTypeError(f"path {number} is a {type(path).__name__}, expected a string or a sequence of names")
    names: list[Hashable] = list(path.split("/") if isinstance(path, str) else path)
    if not names:
        raise ArgumentValueError(f"path {number} is empty, expected at least the name of the class")
    for name in names:
        try:
            hash(name)  # a tuple is Hashable whatever it holds
        except TypeError:
            raise ArgumentTypeError(f"path {number} holds {name!r}, expected hashable names") from None
        if isinstance(name, str) and not name:
            raise ArgumentValueError(f"path {number}, {path!r}, holds an empty name")
    return names
