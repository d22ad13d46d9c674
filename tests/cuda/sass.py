"""Machine code of compiled kernels: the shortest way round a loop, counted in instructions."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    predicated: bool
    operation: str
    rest: str

    @property
    def base(self) -> str:
        return self.operation.split(".")[0]

    @property
    def target(self) -> int:
        """Of a branch; -1 for what is none."""
        found = re.search(r"0x([0-9a-f]+)", self.rest) if self.base == "BRA" else None
        return int(found[1], 16) if found else -1


def parse(function: str) -> list[Instruction]:
    """The instructions of one function in cuobjdump's listing."""
    lines = re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", function)
    return [Instruction(int(m[1], 16), m[2] is not None, m[3], m[4]) for m in lines]


def _successors(code: list[Instruction], index: dict[int, int], i: int) -> list[int]:
    one = code[i]
    after = [i + 1] if i + 1 < len(code) else []
    if one.base == "BRA" and one.target >= 0:
        conditional = one.predicated or re.match(r"[^0]*!?U?P", one.rest) or ".DIV" in one.operation
        return [index[one.target], *(after if conditional else [])]
    if one.base in ("EXIT", "RET"):
        return after if one.predicated else []
    return after


def _ways(neighbours: list[list[int]], start: int, inside: range) -> dict[int, int]:
    """Shortest ways from ``start``, to instructions ``inside``: the one before each, -1 for the first."""
    before, queue = {start: -1}, deque([start])
    while queue:
        i = queue.popleft()
        for j in neighbours[i]:
            if j in inside and j not in before:
                before[j] = i
                queue.append(j)
    return before


def _way(before: dict[int, int], last: int) -> list[int]:
    way = [last]
    while before[way[-1]] >= 0:
        way.append(before[way[-1]])
    return way[::-1]


def loops(function: str, exponentials: int, reciprocals: int = 0, logarithms: int = 0) -> list[list[str]]:
    """The operations on the shortest way round each loop that takes at least so many of each of these functions and
    holds no other such loop: what is rare, such as a row's target, stands beside that way. Shortest first."""
    code = parse(function)
    index = {one.address: i for i, one in enumerate(code)}
    following = [_successors(code, index, i) for i in range(len(code))]
    preceding: list[list[int]] = [[] for _ in code]
    for i, successors in enumerate(following):
        for j in successors:
            preceding[j].append(i)
    least = {"MUFU.EX2": exponentials, "MUFU.RCP": reciprocals, "MUFU.LG2": logarithms}
    found: dict[int, list[str]] = {}
    ends: dict[int, int] = {}
    for last, one in enumerate(code):
        if not 0 <= one.target < one.address or one.target not in index:
            continue
        first = index[one.target]
        inside = range(first, len(code))
        begun, ended = _ways(following, first, inside), _ways(preceding, last, inside)
        for way in _through(code, following, (begun, ended), inside, least):
            names = [code[i].operation for i in way]
            enough = all(sum(name.startswith(what) for name in names) >= n for what, n in least.items())
            if enough and len(names) < len(found.get(first, code)):
                found[first], ends[first] = names, last
    innermost = [way for first, way in found.items() if not any(first < other <= ends[first] for other in found)]
    return sorted(innermost, key=len)


def _through(
    code: list[Instruction],
    following: list[list[int]],
    ends: tuple[dict[int, int], dict[int, int]],
    inside: range,
    least: dict[str, int],
) -> Iterator[list[int]]:
    """Ways by a logarithm where one is asked for, else by an exponential; by two where reciprocals are asked for."""
    begun, ended = ends
    what = "MUFU.LG2" if least["MUFU.LG2"] else "MUFU.EX2"
    middles = [i for i in inside if code[i].operation.startswith(what) and i in begun]
    for one in middles:
        between = _ways(following, one, inside) if least["MUFU.RCP"] else {one: -1}
        for other in middles:
            if other in between and other in ended:
                yield [*_way(begun, one)[:-1], *_way(between, other)[:-1], *reversed(_way(ended, other))]
