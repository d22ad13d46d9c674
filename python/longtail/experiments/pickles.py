"""What a pickle is looked at for before it is loaded: reading it with a whitelist does not save from these."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import Any

MAX_WEIGHT = 1000
"""Elements of a tuple, those of tuples in it included; arrays and checkpoints need about 20."""


def check_pickle(content: bytes) -> None:
    """Follows the instructions without carrying them out.

    Hashing tuples in tuples takes as much of the C stack as they are deep, and as much time as they are large with
    every repetition written out. The C implementation takes as much memory as the largest number of the memo.

    Raises:
        ValueError: a tuple is too large, or a number of the memo; a damaged pickle gives other errors too.
    """
    stack: list[int] = []  # the weight of each object: 1 unless it is a tuple
    marks: list[int] = []
    memo: dict[int, int] = {}
    instructions: Iterator[tuple[Any, Any, Any]] = pickletools.genops(content)
    for count, (opcode, argument, _) in enumerate(instructions):
        name, weight = opcode.name, 1
        if name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
            continue
        start = len(stack) - len(opcode.stack_before)
        if pickletools.markobject in opcode.stack_before:
            start = marks.pop() - opcode.stack_before.index(pickletools.markobject)
        if start < 0:
            raise ValueError(f"{name} finds nothing on the stack")
        taken = stack[start:]
        del stack[start:]
        if name.startswith("TUPLE"):
            weight += sum(taken)
            if weight > MAX_WEIGHT:
                raise ValueError(f"a tuple has more than {MAX_WEIGHT} elements, nested ones included")
        elif name in ("DUP", "MEMOIZE"):
            (weight,) = taken
        elif name.endswith("GET"):
            weight = memo[argument]
        if name == "MEMOIZE":
            memo[len(memo)] = weight
        elif name.endswith("PUT"):
            if argument > count:
                raise ValueError(f"object {argument} is stored, of {count} so far")
            memo[argument] = stack[-1]
        if name == "MARK":
            marks.append(len(stack))
        else:
            stack += [weight] * len(opcode.stack_after)
