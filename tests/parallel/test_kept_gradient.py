"""Promise: what holds of kept gradients in one process holds over ranks."""

from __future__ import annotations

import pytest
import torch

import cases
import rank_cases_kept as case
from ranks import Ranks

KEPT = ("forward", "inplace")
KINDS = (*case.KINDS, *case.TREES)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_float16_under_extreme_weights(ranks: Ranks, kind: str, mode: str, local: bool) -> None:
    ranks.run(2, case.extreme_weights, kind, mode, local)
    if kind in case.KINDS:
        ranks.run(2, case.extreme_weights, kind, mode, local, label_smoothing=0.1)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("kind", case.KINDS)
def test_float16_under_extreme_scales(ranks: Ranks, kind: str, mode: str, local: bool) -> None:
    for name in ("class_scale", "target_scale"):
        ranks.run(2, case.extreme_scales, kind, mode, local, name)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_upstream_that_is_not_finite_stays_out_of_ignored_rows(ranks: Ranks, kind: str, mode: str) -> None:
    for upstream in (torch.inf, torch.nan):
        ranks.run(2, case.upstream_that_is_not_finite, kind, mode, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=cases.name)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_counts_the_gradient_is_0(ranks: Ranks, kind: str, mode: str, dtype: torch.dtype) -> None:
    ranks.run(2, case.nothing_counts, kind, mode, dtype)


@pytest.mark.parametrize("mode", KEPT)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_gradient_is_handed_out_once(ranks: Ranks, kind: str, mode: str) -> None:
    ranks.run(2, case.handed_out_once, kind, mode)


def test_inplace_on_a_leaf_is_refused(ranks: Ranks) -> None:
    ranks.run(2, case.inplace_on_a_leaf)
