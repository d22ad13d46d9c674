"""What a function of ``**options`` takes, spelled out where ``help``, editors and our modules look: its signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def with_options_of(*sources: Callable[..., Any], without: Iterable[str] = ()) -> Callable[[F], F]:
    """Writes into a function's signature that its ``**options`` are arguments of ``sources``, but for ``without``."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        *own, last = signature.parameters.values()
        assert last.kind is inspect.Parameter.VAR_KEYWORD
        found = {parameter.name: parameter for parameter in own}
        for source in sources:
            for name, parameter in inspect.signature(source).parameters.items():
                if name not in (*found, *without):
                    kind = inspect.Parameter.KEYWORD_ONLY
                    found[name] = parameter.replace(kind=kind, annotation=annotation_text(parameter.annotation))
        function.__signature__ = signature.replace(parameters=[*found.values()])  # type: ignore[attr-defined]
        function.__annotations__.pop(last.name, None)  # the Unpack that type checkers read, unknown at run time
        return function

    return decorate


def annotation_text(annotation: Any) -> str:
    """An annotation that is a text, or, of a NamedTuple, a reference that holds one."""
    return str(getattr(annotation, "__forward_arg__", annotation))


def refuse_unknown(function: Callable[..., Any], named: Iterable[str]) -> None:
    """Raises what Python raises of keyword arguments that a function's signature does not have.

    Raises:
        TypeError: one of ``named`` is none of them.
    """
    for name in named:
        if name not in function.__signature__.parameters:  # type: ignore[attr-defined]
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
