"""Promise: the losses of DTensors are those of the tensors they stand for, whatever shards them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import rank_cases_dtensor
from ranks import Ranks

ONE_DIM = {"c": 3, "r": 3, "f": 2}  # placements: ranks
TWO_DIMS = ("rc", "cr", "rr", "fc", "rf", "ff")


def check(ranks: Ranks, placed: str, *args: Any, **named: Any) -> None:
    world = 4 if len(placed) == 2 else ONE_DIM[placed]
    results = ranks.run(world, rank_cases_dtensor.cross_entropy_case, placed, *args, **named)
    assert len(set(results)) == 1, results


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("placed", TWO_DIMS)
def test_placements(ranks: Ranks, placed: str, reduction: str) -> None:
    check(ranks, placed, "mixed", reduction=reduction)
    check(ranks, placed, "mixed", reduction=reduction, plain=True)


def test_empty_shards(ranks: Ranks) -> None:
    """Fewer rows, or classes, than ranks; no rows at all."""
    check(ranks, "rc", "mixed", rows=1)
    check(ranks, "rc", "mixed", classes=1)
    check(ranks, "r", "weight", rows=1)
    for reduction in ("mean", "none"):
        check(ranks, "rc", "weight", rows=0, reduction=reduction)


def test_backward_without_an_upstream_gradient(ranks: Ranks) -> None:
    ranks.run(4, rank_cases_dtensor.backward_of_the_loss)


@pytest.mark.parametrize("world", [2, 3])
def test_colwise_parallel_head(ranks: Ranks, world: int) -> None:
    ranks.run(world, rank_cases_dtensor.colwise_recipe)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "partial": ("p", {}, "Shard(0) (rows), Replicate()"),
    "classes_twice": ("cc", {}, "share out the classes over 2 mesh dimensions"),
    "images": ("r", {"shape": (6, 8, 2)}, "expected (N, C)"),
    "target_rows": ("r", {"target": torch.zeros(2, dtype=torch.int64)}, "target has shape [2], expected [6]"),
    "probabilities": ("c", {"target": torch.ones(6)}, "expected class indices"),
    "option": ("c", {"label_smoothing": 3.0}, "label_smoothing is 3.0"),
    "weight": ("c", {"weight": torch.ones(4)}, "weight has shape [4], expected [8]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(ranks: Ranks, case: str) -> None:
    placed, changes, text = REFUSED[case]
    for result in ranks.run(4 if len(placed) == 2 else 2, rank_cases_dtensor.refused, placed, **changes):
        assert text in result


ODD: dict[str, tuple[dict[str, Any], str, str]] = {
    "bad_option": ({"label_smoothing": 2.0}, "cross_entropy", "label_smoothing is 2.0"),
    "option": ({"focal_gamma": 2.0}, "cross_entropy", "disagree on focal_gamma"),
    "compensation": ({"compensation": 2.0}, "cross_entropy", "disagree on compensation"),
    "target_scale": ({"target_scale": torch.ones(8)}, "cross_entropy", "disagree on whether target_scale is given"),
    "normalizer": ({"normalizer": "count"}, "cross_entropy", "disagree on normalizer"),
    "weight_alone": ({"weight": torch.ones(8)}, "cross_entropy", "disagree on whether weight is given"),
    "bias_dtype": (
        {"class_bias": torch.ones(8, dtype=torch.int64)},
        "cross_entropy",
        "class_bias has dtype torch.int64",
    ),
    "target_rows": ({"target": torch.arange(5)}, "cross_entropy", "target has shape [5], expected [6]"),
    "chunk_size": ({"chunk_size": 0}, "linear", "chunk_size is 0"),
    "reduction": ({"reduction": "sum"}, "linear", "disagree on reduction"),
    "gradient": ({"gradient": "nowhere"}, "cross_entropy", "gradient is 'nowhere'"),
    "linear_gradient": ({"gradient": "nowhere"}, "linear", "gradient is 'nowhere'"),
    "focal_loss": ({"gamma": -1.0}, "focal_loss", "focal_gamma is -1.0"),
    "complement": ({"gamma": float("nan")}, "complement_cross_entropy", "complement_gamma is nan"),
    "gamma_of_text": ({"gamma": "two"}, "complement_cross_entropy", "complement_gamma is a str"),
    "counts": (
        {"samples_per_class": [-1] * 8},
        "class_balanced_loss",
        "ValueError: rank 2: samples_per_class[0] is -1",
    ),
    "balanced": ({"loss": "softmin"}, "class_balanced_loss", "rank 2: loss is 'softmin'"),
    "sigmoid": ({"loss": "focal"}, "class_balanced_loss", "rank 2: input is a DTensor, expected a plain tensor with"),
    "stats": ({"return_stats": True}, "cross_entropy", "disagree on return_stats: False on rank 0, True on rank 2"),
    "row_placement": ({"placed": "fc"}, "cross_entropy", "disagree on placements of input"),
    "class_placement": ({"placed": "rf"}, "cross_entropy", "disagree on placements of input"),
    "swapped": ({"placed": "cr"}, "cross_entropy", "disagree on placements of input"),
    "input_placement": ({"placed": "fc"}, "linear", "disagree on placements of input"),
    "bad_placement": ({"placed": "cc"}, "cross_entropy", "which share out the classes over 2 mesh dimensions"),
    "target_outside": (
        {"target": torch.arange(6) + 3},
        "cross_entropy",
        "IndexError: rank 2: longtail: target 8 in row 2",
    ),
    "linear_target_outside": (
        {"target": torch.arange(6) + 3},
        "linear",
        "IndexError: rank 2: longtail: target 8 in row",
    ),
    "target": ({"target": torch.arange(6) + 1}, "cross_entropy", "hold the same rows disagree on the values of target"),
    "trains": ({"trains": "iw"}, "linear", "whether input requires grad: False on rank 0, True on rank 2"),
    "weight_trains": (
        {"trains": "w"},
        "linear",
        "whether linear_weight requires grad: False on rank 0, True on rank 2",
    ),
    "huge": ({"scale": 10**400}, "cross_entropy", "ValueError: rank 2: scale is"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_rank_that_differs(ranks: Ranks, case: str) -> None:
    """Every rank of the mesh hears the same of it, not only those of its row or column."""
    odd, loss, text = ODD[case]
    results = ranks.run(4, rank_cases_dtensor.refused_by_one, odd, 2, loss)
    assert len(set(results)) == 1, results
    assert text in results[0]
    assert results[0].count("rank 2") == (case != "target")


@pytest.mark.parametrize("loss", ["cross_entropy", "linear"])
def test_values_of_a_normalizer(ranks: Ranks, loss: str) -> None:
    args = ({"normalizer": 4}, 1, loss, {"normalizer": 3})
    for text in ranks.run(4, rank_cases_dtensor.refused_by_one, *args):
        assert text == "ArgumentValueError: ranks disagree on normalizer: 3.0 on rank 0, 4.0 on rank 1"


def test_targets_that_replicas_do_not_share(ranks: Ranks) -> None:
    """Where nothing is sharded, too: a number that ranks do not share is no loss of theirs."""
    odd = {"target": torch.arange(6) + 1, "placed": "ff"}
    results = ranks.run(4, rank_cases_dtensor.refused_by_one, odd, 3, "cross_entropy", {"placed": "ff"})
    assert set(results) == {
        "ArgumentValueError: ranks that hold the same rows disagree on the values of target (by a checksum)"
    }


@pytest.mark.parametrize("placed", ["rc", "rf", "fc", "ff"])
def test_no_rows(ranks: Ranks, placed: str) -> None:
    ranks.run(4, rank_cases_dtensor.no_rows, placed)


def test_under_torch_compile(ranks: Ranks) -> None:
    ranks.run(2, rank_cases_dtensor.compiled)


def test_targets_out_of_bounds(ranks: Ranks) -> None:
    results = ranks.run(4, rank_cases_dtensor.target_outside)
    assert all("out of bounds" in text for text in results), results
    assert "target 6 in row 2" in results[2]


def test_importing_longtail_imports_no_dtensor() -> None:
    code = "import sys, longtail; print(sorted(m for m in sys.modules if m.startswith('torch.distributed.tensor')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_overwritten_dtensors_and_mixtures(ranks: Ranks) -> None:
    ranks.run(2, rank_cases_dtensor.inplace_overwrites_what_others_saved)
    ranks.run(2, rank_cases_dtensor.inplace_on_a_leaf)
