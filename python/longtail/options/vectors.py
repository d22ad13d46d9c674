"""What operators take of the vectors that users pass: those of classes, and of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import vector


def checked_vectors(
    names: tuple[str, ...],
    vectors: tuple[Any, ...],
    input: Tensor,
    rows: torch.Size,
    num_classes: int,
    dtype: torch.dtype,
) -> list[Any]:
    """Each as the operators take it: flat, of ``dtype`` and of the length that its name asks for."""
    per_class = torch.Size((num_classes,))
    return [
        None if x is None else vector(name, x, rows if name == "sample_weight" else per_class, input, dtype)
        for name, x in zip(names, vectors, strict=True)
    ]
