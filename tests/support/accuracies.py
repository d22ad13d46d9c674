"""``LongTailAccuracy`` as it is where torchmetrics is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

MADE = ("longtail.training.accuracy", "longtail.training.torchmetrics_metric")


@contextmanager
def without_torchmetrics(instead: Any = None) -> Iterator[Any]:
    """The class, made anew; ``instead``: what an import of torchmetrics finds, None for nothing."""
    hidden = {name: sys.modules.pop(name) for name in (*MADE, "torchmetrics") if name in sys.modules}
    sys.modules["torchmetrics"] = instead
    try:
        yield import_module(MADE[0]).LongTailAccuracy
    finally:
        for name in (*MADE, "torchmetrics"):
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
