"""Promise: however rows and classes are shared out, a loss is that of the whole, to the same bits on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cases
import rank_cases
import rank_cases_dtensor
import rank_cases_dtensor_linear
from ranks import Ranks

# Classes of each rank; for DTensors the placements on a mesh of one dimension or two.
SHARDS = {2: [5, 8], 3: [4, 0, 9], 4: [1, 6, 0, 4]}
ONE_DIM = {"c": 3, "r": 3, "f": 2}  # placements: ranks
CASES = {
    "vocab": rank_cases.cross_entropy_case,
    "linear": rank_cases.linear_case,
    "dtensor": rank_cases_dtensor.cross_entropy_case,
    "dtensor_linear": rank_cases_dtensor_linear.linear_case,
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = [*ONE_DIM, "rc"]
LINEAR = ("rf", "fr")


def check(ranks: Ranks, way: str, where: Any, option_set: str, **named: Any) -> None:
    """Every rank finds its loss and gradient right, and all have the same bits."""
    if way in ("vocab", "linear"):
        world, placed = where, [SHARDS[where]]
    elif way == "dtensor":
        world, placed = 4 if len(where) == 2 else ONE_DIM[where], [where]
    else:
        world, placed = 4 if len(where[0]) == 2 else 3, where
    results = ranks.run(world, CASES[way], *placed, option_set, **named)
    assert len(set(results)) == 1, results


OPTIONS = [
    *(("vocab", world, {"reduction": reduction}) for world in SHARDS for reduction in ("mean", "none")),
    *(("linear", 3, {"gradient": gradient}) for gradient in ("auto", "backward")),
    *(("dtensor", placed, {}) for placed in TENSORS),
    ("dtensor_linear", LINEAR, {}),
    ("dtensor_linear", ("r", "r"), {"gradient": "backward", "bias": False}),
]


@pytest.mark.parametrize("option_set", cases.OPTION_SETS)
@pytest.mark.parametrize(("way", "where", "how"), OPTIONS)
def test_every_option(ranks: Ranks, way: str, where: Any, how: dict[str, Any], option_set: str) -> None:
    check(ranks, way, where, option_set, **how)


TYPES = [
    *(("vocab", world, name, {}) for world in SHARDS for name in cases.OPTION_SETS),
    *(("linear", 2, "smoothing_weight", {"reduction": reduction, "sequence_parallel": sequence_parallel})
      for reduction in ("mean", "none") for sequence_parallel in (False, True)),
    *(("dtensor", "rc", name, {}) for name in ("plain", "mixed")),
    ("dtensor_linear", ("rr", "fr"), "smoothing_weight", {}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=cases.name)
@pytest.mark.parametrize(("way", "where", "option_set", "how"), TYPES)
def test_every_type(
    ranks: Ranks, way: str, where: Any, option_set: str, how: dict[str, Any], dtype: torch.dtype
) -> None:
    check(ranks, way, where, option_set, dtype=dtype, **how)


MODES = [
    *(("vocab", 2, name, {"dtype": dtype, "reduction": reduction})
      for name in ("plain", "mixed") for dtype in (torch.float64, torch.float16) for reduction in ("mean", "none")),
    *(("vocab", 2, name, {"dtype": dtype, "local_vectors": True})
      for name in ("weight", "mixed_tail") for dtype in (torch.float64, torch.float16)),
    ("vocab", 3, "seesaw", {"reduction": "none"}),
    *(("dtensor", placed, "mixed", {}) for placed in ("c", "r", "rc")),
]  # fmt: skip


@pytest.mark.parametrize("gradient", ["forward", "inplace"])
@pytest.mark.parametrize(("way", "where", "option_set", "how"), MODES)
def test_gradient_modes(
    ranks: Ranks, way: str, where: Any, option_set: str, how: dict[str, Any], gradient: str
) -> None:
    check(ranks, way, where, option_set, gradient=gradient, **how)


LOCAL = [
    *(("vocab", world, name, {"reduction": reduction})
      for world in SHARDS for name in ("weight", "smoothing_weight", "mixed") for reduction in ("mean", "sum")),
    *(("linear", 3, name, {"dtype": dtype, "gradient": gradient}) for dtype in (torch.float64, torch.float16)
      for gradient in ("auto", "backward") for name in ("weight", "smoothing_weight", "mixed_tail")),
    *(("vocab", world, name, {}) for world in SHARDS
      for name in ("vector_scaling", "target_scale", "mitigation", "seesaw", "mixed_tail")),
    *(("linear", 2, "mixed_tail", {"reduction": "none", "sequence_parallel": parallel}) for parallel in (False, True)),
]  # fmt: skip


@pytest.mark.parametrize(("way", "where", "option_set", "how"), LOCAL)
def test_class_vectors_of_the_local_classes(
    ranks: Ranks, way: str, where: Any, option_set: str, how: dict[str, Any]
) -> None:
    check(ranks, way, where, option_set, local_vectors=True, **how)


@pytest.mark.parametrize("normalizer", ["count", 7.5, 3.5, torch.tensor(3.0), torch.tensor(2.0)], ids=str)
@pytest.mark.parametrize(("way", "where", "how"), [("vocab", 2, {"local_vectors": True}), ("dtensor", "rc", {})])
def test_normalizers(ranks: Ranks, way: str, where: Any, how: dict[str, Any], normalizer: Any) -> None:
    check(ranks, way, where, "weight", extra={"normalizer": normalizer}, **how)


FEW = [
    *(("vocab", rows, {"reduction": reduction}) for rows in (0, 1) for reduction in ("mean", "sum", "none")),
    *(("linear", rows, {"reduction": "sum", "sequence_parallel": parallel})
      for rows in (0, 2) for parallel in (False, True)),
]  # fmt: skip


@pytest.mark.parametrize(("way", "rows", "how"), FEW)
def test_few_rows(ranks: Ranks, way: str, rows: int, how: dict[str, Any]) -> None:
    check(ranks, way, 2, "mixed", rows=rows, **how)
    check(ranks, way, 2, "mixed_tail", rows=rows, local_vectors=True, **how)
