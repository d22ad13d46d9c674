"""The one table of error bounds, and the comparison every test goes through.

A result may be off by twice what eager PyTorch is off in the same dtype, plus a floor of a few roundings.
"""

from __future__ import annotations

import torch
from torch import Tensor

# dtype of the compared tensor -> (relative to truth, absolute): some 16 roundings, one for half types.
FLOOR: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (2e-6, 1e-7),
    torch.bfloat16: (2.0**-8, 1e-7),
    torch.float16: (2.0**-11, 2.0**-24),
}


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
    got, want = actual.detach().double().cpu(), truth.detach().double().cpu()
    reference = None if eager is None else eager.detach().cpu()
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = (test(got) != test(want)).nonzero()
        assert not len(wrong), (
            f"{what}: {name} at {len(wrong)} wrong places, first {tuple(wrong[0].tolist())}: "
            f"got {got[tuple(wrong[0])].item()}, expected {want[tuple(wrong[0])].item()}"
        )
    finite = want.isfinite()
    error = torch.where(finite, (got - want).abs(), torch.zeros_like(want)).nan_to_num(0.0)
    allowed = factor * bound(want, reference, actual.dtype)
    if not (error <= allowed).all():
        wrong = int((error > allowed).sum())
        place = int((error / allowed).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), want.shape))
        raise AssertionError(
            f"{what}: {wrong} of {error.numel()} elements out of bounds ({actual.dtype}), "
            f"worst at {index}: got {got[index].item():.9g}, expected {want[index].item():.9g}, "
            f"error {error[index].item():.3g}, allowed {allowed[index].item():.3g}; "
            f"largest error {error.max().item():.3g}"
        )


def assert_same(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Bitwise equality of values, dtype and shape (NaN equals NaN)."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0, equal_nan=True, msg=lambda m: f"{what}: {m}")
