"""The table of backends, best first. What a backend needs, and what it serves, its own module says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from . import cpu, cuda, plain, triton


class Kernels(Protocol):
    """What the module of a backend holds."""

    @property
    def DEVICE(self) -> str | None:
        """The device type that it needs; None: any."""

    def missing(self) -> str | None:
        """Why it does not run here, or None."""

    def detail(self) -> str:
        """With what it runs."""

    @property
    def serves(self) -> Callable[[Tensor], bool] | None:
        """Whether its kernels take such logits, or gradients of their shape: else they go to the next. None: all."""

    def operator(self, op: str) -> Callable[..., Any] | None:
        """Its kernel of an operator, or None where it has none."""


BACKENDS: dict[str, Kernels] = {"cuda": cuda, "triton": triton, "cpu": cpu, "reference": plain}

COMPILED = ("cuda", "cpu")
"""Those that come as a shared library, under ``torch.ops.longtail_<name>``."""


class Backend(NamedTuple):
    """One row of :func:`backends`: whether it runs here, and what is used or why not."""

    available: bool
    detail: str


def _status(kernels: Kernels) -> Backend:
    missing = kernels.missing()
    return Backend(True, kernels.detail()) if missing is None else Backend(False, missing)


def backends() -> dict[str, Backend]:
    """Every backend by name, best first: whether it runs here, and with what or why not.

    >>> longtail.backends()["reference"].available
    True
    """
    return {name: _status(kernels) for name, kernels in BACKENDS.items()}
