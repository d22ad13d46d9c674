"""Promise: the Triton kernels are right at the limits of the arithmetic, seen in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import cases
import limit_cases
import longtail
from interpreted import FACTOR, interpreted, rerun, starts_it
from shard_cases import run_shards

pytest.importorskip("triton")


@interpreted
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(s, d) for d in FACTOR for s in ((0, 2), (0, 9), (0, 9, 3))]
    + [(s, torch.float32) for s in ((0, 4099), (0, 150, 1))],
)
def test_operators(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with longtail.use_backend("triton"):
        limit_cases.check_operators(shape, dtype, factor=2 * FACTOR[dtype])


@interpreted
@pytest.mark.parametrize("dtype", FACTOR, ids=cases.name)
def test_shards(dtype: torch.dtype) -> None:
    up = torch.tensor(-1.25)
    for name, (logits, target, options, coefficient), loss, grad in limit_cases.problems(9, dtype):
        if coefficient == 1.0:
            given = {k: v for k, v in options.items() if v is not None}
            with longtail.use_backend("triton"):
                _, got, got_grad = run_shards(logits, target, up.expand(len(target)), [4, 5], given, inplace=True)
            limit_cases.check(f"{name} {dtype}", [got], [got_grad], loss, grad * -1.25, factor=4 * FACTOR[dtype])


@interpreted
@pytest.mark.parametrize("dtype", FACTOR, ids=cases.name)
def test_a_weight_of_no_positive_has_no_say(dtype: torch.dtype) -> None:
    with longtail.use_backend("triton"):
        limit_cases.check_weights_of_positives(dtype)


@starts_it
def test_in_a_process_of_its_own() -> None:
    rerun(__file__)
