"""``LongTailAccuracy``, or another metric, as it is where torchmetrics is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

MADE = tuple(
    f"longtail.training.{name}" for name in ("accuracy", "average_precision", "frequency_metric", "torchmetrics_metric")
)


@contextmanager
def without_torchmetrics(instead: Any = None, name: str = "LongTailAccuracy") -> Iterator[Any]:
    """The class ``name``, made anew; ``instead``: what an import of torchmetrics finds, None for nothing."""
    hidden = {module: sys.modules.pop(module) for module in (*MADE, "torchmetrics") if module in sys.modules}
    sys.modules["torchmetrics"] = instead
    try:
        made = {**vars(import_module(MADE[0])), **vars(import_module(MADE[1]))}
        yield made[name]
    finally:
        for module in (*MADE, "torchmetrics"):
            sys.modules.pop(module, None)
        sys.modules.update(hidden)
