"""Schedules at their boundaries: deferred re-weighting and the weight of the complement entropy."""

from __future__ import annotations

import pytest
import torch

from longtail import effective_number_weight
from longtail.training import ComplementGammaSchedule, DeferredReweighting
from tolerances import assert_close, assert_same

COUNTS = [500, 40, 3]


def test_reweighting_switches_at_the_epoch() -> None:
    schedule = DeferredReweighting(COUNTS, beta=0.9999, epoch=160)
    weight = effective_number_weight(COUNTS, 0.9999)
    for epoch in (0, 1, 159, 159.99):
        assert_same(schedule(epoch), torch.ones(3))
    for epoch in (160, 161, 199, 10_000):
        assert_same(schedule(epoch), weight)


def test_reweighting_ramps() -> None:
    schedule = DeferredReweighting(COUNTS, beta=0.99, epoch=10, ramp_epochs=4)
    weight = effective_number_weight(COUNTS, 0.99, dtype=torch.float64)
    for epoch, ratio in [(9, 0), (10, 0), (11, 0.25), (12.5, 0.625), (13, 0.75), (14, 1), (15, 1)]:
        assert_close(schedule(epoch), 1 - ratio + ratio * weight)
        assert schedule(epoch).sum().item() == pytest.approx(3, rel=1e-6)


def test_reweighting_from_the_first_epoch_and_back() -> None:
    """A schedule has no memory, and nobody else can change what it returns."""
    schedule = DeferredReweighting(COUNTS, beta=0.9, epoch=1)
    assert_same(schedule(5), effective_number_weight(COUNTS, 0.9))
    schedule(5).zero_()
    schedule(0).zero_()
    assert_same(schedule(0), torch.ones(3))
    assert_same(DeferredReweighting(COUNTS, 0.9, 0)(0), effective_number_weight(COUNTS, 0.9))


def test_reweighting_by_volume() -> None:
    schedule = DeferredReweighting(COUNTS, epoch=1, volume=9)
    assert_same(schedule(1), effective_number_weight(COUNTS, volume=9))


def test_reweighting_of_empty_classes_and_dtypes() -> None:
    with pytest.raises(ValueError, match="samples_per_class is 0 for class 1"):
        DeferredReweighting([5, 0, 1], 0.9, 1)
    schedule = DeferredReweighting([5, 0, 1], 0.9, 1, empty="zero", dtype=torch.float64)
    assert schedule(0).tolist() == [1, 0, 1]
    assert_same(schedule(1), effective_number_weight([5, 0, 1], 0.9, "zero", dtype=torch.float64))


def test_complement_gamma() -> None:
    constant = ComplementGammaSchedule()
    assert [constant(epoch) for epoch in (0, 0.5, 7)] == [-1, -1, -1]
    late = ComplementGammaSchedule(-2.0, epoch=3)
    assert [late(epoch) for epoch in (0, 2, 2.999, 3, 4)] == [0, 0, 0, -2, -2]
    ramp = ComplementGammaSchedule(-2.0, epoch=3, ramp_epochs=4)
    assert [ramp(epoch) for epoch in (2, 3, 4, 5, 6.5, 7, 8)] == [0, 0, -0.5, -1, -1.75, -2, -2]


@pytest.mark.parametrize(
    ("make", "exception", "message"),
    [
        (lambda: DeferredReweighting(COUNTS, 0.9, -1), ValueError, r"epoch is -1\.0, expected"),
        (lambda: DeferredReweighting(COUNTS, 0.9, 1, -2), ValueError, r"ramp_epochs is -2\.0, expected"),
        (lambda: DeferredReweighting(COUNTS, 0.9), TypeError, "epoch is a NoneType, expected a number"),
        (lambda: DeferredReweighting(COUNTS, epoch=1), TypeError, "exactly one of beta and volume, got neither"),
        (lambda: DeferredReweighting(COUNTS, 1.1, 1), ValueError, r"beta is 1\.1, expected"),
        (lambda: DeferredReweighting(COUNTS, 0.9, 1)("2"), TypeError, "epoch is a str, expected a number"),
        (lambda: DeferredReweighting(COUNTS, 0.9, 1)(-1), ValueError, r"epoch is -1\.0, expected"),
        (lambda: ComplementGammaSchedule(float("nan")), ValueError, "gamma is nan, expected a finite number"),
        (lambda: ComplementGammaSchedule(epoch=-1), ValueError, r"epoch is -1\.0, expected"),
        (lambda: ComplementGammaSchedule(ramp_epochs=None), TypeError, "ramp_epochs is a NoneType"),
    ],
)
def test_wrong_arguments(make, exception, message) -> None:
    with pytest.raises(exception, match=message):
        make()
