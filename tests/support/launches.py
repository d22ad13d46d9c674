"""A stand-in for Triton kernels that keeps what they are launched with."""

from __future__ import annotations

from typing import Any


class Launches(list[tuple[str, tuple[int, ...], dict[str, Any]]]):
    """Stands in for the kernels and keeps what they were launched with."""

    def kernel(self, name: str) -> Any:
        class Kernel:
            def __getitem__(_, grid: tuple[int, ...]) -> Any:
                return lambda *_args, **constants: self.append((name, grid, constants))

        return Kernel()
