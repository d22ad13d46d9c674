"""The one table of error bounds, and the comparison every test goes through.

A result may be off by twice what eager PyTorch is off in the same dtype, plus a floor of a few roundings.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# dtype of the compared tensor -> (relative to truth, absolute): some 16 roundings, one for half types.
FLOOR: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (2e-6, 1e-7),
    torch.bfloat16: (2.0**-8, 1e-7),
    torch.float16: (2.0**-11, 2.0**-24),
}


BLOCK = 1 << 24
"""Elements that are compared at a time, in float64, on their own device."""


def bound(truth: Tensor, eager: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Allowed absolute error per element: 2 * (eager's largest finite error in that row) + the dtype's floor.

    Rows are the first dimension. Where eager PyTorch itself is not finite it excuses nothing.
    """
    relative, absolute = FLOOR[dtype]
    allowed = relative * truth.abs().nan_to_num(0.0, 0.0, 0.0) + absolute
    if eager is not None and truth.numel():
        error = (eager.double() - truth).abs()
        error = torch.where(error.isfinite(), error, torch.zeros_like(error))
        if error.dim() > 1:
            error = error.flatten(1).amax(1).reshape(-1, *[1] * (truth.dim() - 1))
        allowed = allowed + 2 * error
    return allowed


def assert_close(
    actual: Tensor, truth: Tensor, eager: Tensor | None = None, *, what: str = "result", factor: float = 1.0
) -> None:
    """Assert that `actual` is the float64 `truth` within `bound`, with NaN, +inf and -inf at the same places.

    eager: the same quantity by plain PyTorch in the dtype of `actual`; factor: multiplies the whole bound.
    """
    assert isinstance(actual, Tensor), f"{what}: expected a tensor, got {type(actual).__name__}"
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert eager is None or eager.shape == truth.shape, f"{what}: eager's shape {tuple(eager.shape)}"
    worst, wrong = (0.0, ""), 0
    for first, got, want, reference in _blocks(actual.detach(), truth.detach(), eager):
        _assert_not_finite_alike(first, got.double(), want, what)
        error = torch.where(want.isfinite(), (got.double() - want).abs(), torch.zeros_like(want)).nan_to_num(0.0)
        allowed = factor * bound(want, reference, actual.dtype)
        if (error <= allowed).all():
            continue
        wrong += int((error > allowed).sum())
        index = torch.unravel_index((error / allowed).argmax(), want.shape)
        ratio = (error[index] / allowed[index]).item()
        if ratio > worst[0]:
            worst = (
                ratio,
                (
                    f"worst at {_place(index, first)}: got {got[index].item():.9g}, expected "
                    f"{want[index].item():.9g}, error {error[index].item():.3g}, allowed {allowed[index].item():.3g}"
                ),
            )
    assert not wrong, f"{what}: {wrong} of {actual.numel()} elements out of bounds ({actual.dtype}), {worst[1]}"


def _blocks(actual: Tensor, truth: Tensor, eager: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """Whole rows of each, on the device of ``actual``, the truth in float64, with the number of the first."""
    actual, truth = torch.atleast_1d(actual, truth)
    eager = None if eager is None else torch.atleast_1d(eager.detach())
    rows = max(1, BLOCK // max(actual[:1].numel(), 1))
    for first in range(0, len(actual), rows):
        part = slice(first, first + rows)
        reference = None if eager is None else eager[part].to(actual.device)
        yield first, actual[part], truth[part].to(actual.device).double(), reference


def _assert_not_finite_alike(first: int, got: Tensor, want: Tensor, what: str) -> None:
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (test(got) != test(want)).nonzero()
        if len(wrong):
            index = tuple(wrong[0])
            raise AssertionError(
                f"{what}: {name} at {len(wrong)} wrong places, first {_place(index, first)}: "
                f"got {got[index].item()}, expected {want[index].item()}"
            )


def _place(index: tuple[Tensor, ...], first: int) -> tuple[int, ...]:
    """Of an element of a block that begins at row ``first``."""
    row, *others = (int(i) for i in index)
    return first + row, *others


def assert_same(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Bitwise equality of values, dtype and shape (NaN equals NaN)."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0, equal_nan=True, msg=lambda m: f"{what}: {m}")
