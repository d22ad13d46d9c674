"""Ctrl-C in the middle of an experiment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from longtail.experiments.output import Interrupted


def interrupted_after(units: int, run: Callable[[Callable[[str], None]], Any]) -> tuple[Interrupted, list[str]]:
    """What a run leaves that is interrupted after so many units of work, and what it has told by then."""
    told: list[str] = []

    def stop(status: str) -> None:
        told.append(status)
        if len(told) == units:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        run(stop)
    return caught.value, told
