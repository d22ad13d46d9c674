"""Promise: the comparison that every other test relies on does fail."""

from __future__ import annotations

import pytest
import torch

import cases
import longtail  # noqa: F401  (registers the operators)
import tolerances
from tolerances import assert_close, assert_same

TRUTH = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)


@pytest.fixture(params=[tolerances.BLOCK, 2], autouse=True, ids=["whole", "by_row"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerances, "BLOCK", request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_passes_and_more_fails(dtype: torch.dtype) -> None:
    assert_close(TRUTH.to(dtype), TRUTH)
    wrong = TRUTH.clone()
    wrong[1, 0] *= 1 + {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 0.02)
    with pytest.raises(AssertionError, match=r"\(1, 0\)"):
        assert_close(wrong.to(dtype), TRUTH)


def test_eager_error_excuses_twice_itself_in_its_own_row() -> None:
    eager = TRUTH.float() + torch.tensor([[0.0, 0.1], [0.0, 0.0]])
    assert_close(TRUTH.float() + torch.tensor([[0.19, 0.0], [0.0, 0.0]]), TRUTH, eager)
    with pytest.raises(AssertionError):
        assert_close(TRUTH.float() + torch.tensor([[0.21, 0.0], [0.0, 0.0]]), TRUTH, eager)
    with pytest.raises(AssertionError):
        assert_close(TRUTH.float() + torch.tensor([[0.0, 0.0], [0.01, 0.0]]), TRUTH, eager)


def test_a_broken_eager_excuses_nothing() -> None:
    eager = torch.full((2, 2), torch.nan)
    with pytest.raises(AssertionError):
        assert_close(TRUTH.float() + 0.01, TRUTH, eager)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_must_sit_where_it_should(bad: float) -> None:
    holed = TRUTH.clone()
    holed[0, 1] = bad
    assert_close(holed.float(), holed)
    with pytest.raises(AssertionError, match=r"\(0, 1\)"):
        assert_close(holed.float(), TRUTH)
    with pytest.raises(AssertionError):
        assert_close(TRUTH.float(), holed)
    with pytest.raises(AssertionError):
        assert_close(holed.float(), torch.where(holed.isfinite(), holed, torch.full_like(holed, 0.5)))


def test_all_that_is_wrong_is_counted_and_the_worst_named() -> None:
    wrong = TRUTH.float() + torch.tensor([[0.0, 0.1], [0.3, 0.1]])
    with pytest.raises(
        AssertionError, match=r"3 of 4 elements .* worst at \(1, 0\): got 3.29\d+, expected 3, error 0.3"
    ):
        assert_close(wrong, TRUTH)
    with pytest.raises(AssertionError, match=r"worst at \(2,\)"):
        assert_close(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]).double())
    assert_close(torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0))
    assert_close(torch.zeros(0, 3), torch.zeros(0, 3).double())


def test_shapes_and_dtypes_count() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(TRUTH[0], TRUTH)
    with pytest.raises(AssertionError, match="dtype"):
        assert_same(TRUTH.float(), TRUTH)


def test_fresh_tensors_are_poisoned() -> None:
    assert torch.empty(5).isnan().all()
    assert torch.ops.aten.new_empty(TRUTH, [5]).isnan().all()
    assert torch.empty_like(TRUTH.bfloat16()).isnan().all()


def test_outputs_allocated_by_compiled_kernels_are_poisoned() -> None:
    """Seen from outside: the profiler finds the poison's fill inside the operator."""
    tail = cases.operator_options(4, {})
    logits, target = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.longtail.softmax_loss(logits, target, *tail)
    count = {event.key: event.count for event in profile.key_averages()}
    assert count["aten::empty"] >= 2
    assert count["aten::fill_"] == count["aten::empty"]
