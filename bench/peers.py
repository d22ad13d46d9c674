"""Fused losses of other projects: found where they are installed, tried before they are timed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any


def usable(name: str, module: str, function: str, attempt: Callable[[Callable[..., Any]], Any]) -> Any:
    """The peer's function, or None: silently if it is not installed, with a line on stderr if ``attempt`` fails.

    A peer that is installed but does not run here must not end the run.
    """
    try:
        found = getattr(importlib.import_module(module), function)
        attempt(found)
    except ModuleNotFoundError:
        return None
    except Exception as error:
        print(f"{name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    return found
