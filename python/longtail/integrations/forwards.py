"""The forward of a model, of which one object's may be replaced, as a function of the model: a copy calls its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def forward_of(model: Any) -> Callable[..., Any]:
    """What ``model.forward`` is now, as a function that takes the model first.

    What is bound to the model is taken apart: methods, and partial functions as accelerate sets them. Another callable
    may hold the model anywhere: called for a copy, which it would not know, it raises RuntimeError.
    """
    before = _without_head_of_trl(model.forward)
    if getattr(before, "__self__", None) is model:
        function: Callable[..., Any] = before.__func__
        return function
    if isinstance(before, functools.partial) and before.args and before.args[0] is model:
        return functools.partial(_call, before.func, before.args[1:], before.keywords)

    def forward(called: Any, *args: Any, **kwargs: Any) -> Any:
        if called is not model:
            raise RuntimeError(
                f"this is a copy of a {type(model).__name__} whose forward had been set to "
                f"{getattr(before, '__qualname__', before)}, which is the original's: copy before it is set"
            )
        return before(*args, **kwargs)

    return forward


def _call(
    function: Callable[..., Any], first: tuple[Any, ...], keywords: Any, model: Any, *args: Any, **kwargs: Any
) -> Any:
    return function(model, *first, *args, **{**keywords, **kwargs})


def _without_head_of_trl(forward: Any) -> Any:
    """What TRL's own fused head calls where it is not asked: a method of one model, which copies would call too."""
    function = getattr(forward, "__func__", None)
    if inspect.isfunction(function) and function.__code__.co_name == "_fused_forward":
        return inspect.getclosurevars(function).nonlocals.get("original_forward", forward)
    return forward
