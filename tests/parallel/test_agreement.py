"""Promise: every call compares what the ranks assume of each other; nothing of an earlier one is trusted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rank_cases_agreement
from ranks import Ranks

KINDS = ("logits", "linear")
LAYOUTS = {
    "even": [[4, 4], [3, 3], [4, 3]],
    "other_rank_differs": [[2, 3, 1], [1, 2, 3], [3, 1, 2], [2, 2, 2], [2, 0, 4]],
    "one_class_less": [[129, 129], [129, 128]],
}


@pytest.mark.parametrize("given", [False, True], ids=["found", "class_start"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_heads_that_take_turns(ranks: Ranks, layouts: str, kind: str, given: bool) -> None:
    found = LAYOUTS[layouts]
    ranks.run(len(found[0]), rank_cases_agreement.several_heads, kind, given, found)


# What rank 1 passes, and what every rank then says.
ODD: dict[str, tuple[dict[str, Any], str, str]] = {
    "option": ({"focal_gamma": 2.0}, "ArgumentValueError", "focal_gamma: 0.0 on rank 0, 2.0 on rank 1"),
    "sent_columns": ({"complement_gamma": -1.0}, "ArgumentValueError", "disagree on complement_gamma"),
    "gradient": ({"gradient": "backward", "reduction": "sum"}, "ArgumentValueError", "disagree on reduction"),
    "compensation": ({"compensation": 2.0}, "ArgumentValueError", "compensation: 0.0 on rank 0, 2.0 on rank 1"),
    "mitigation": (
        {"class_mitigation": torch.ones(3)},
        "ArgumentValueError",
        "class_mitigation: None on rank 0, \"of the rank's own classes\" on rank 1",
    ),
    "target_scale": ({"target_scale": torch.ones(4)}, "ArgumentValueError", "rank 1: target_scale has 4 elements"),
    "sample_weight": ({"sample_weight": torch.ones(7)}, "ArgumentValueError", "whether sample_weight is given: False"),
    "weight": ({"weight": torch.ones(9)}, "ArgumentValueError", "weight: None on rank 0, 'of all classes' on rank 1"),
    "rows": ({"rows": 5}, "ArgumentValueError", "rows: 7 on rank 0, 5 on rank 1"),
    "no_rows": ({"rows": 0}, "ArgumentValueError", "rows: 7 on rank 0, 0 on rank 1"),
    "target": ({"target": torch.arange(7)}, "ArgumentValueError", "disagree on the values of target"),
    "target_outside": ({"target": torch.arange(7) + 5}, "IndexError", "rank 1: longtail: target 9 in row 4 is out of"),
    "dtype": ({"dtype": torch.float32}, "ArgumentValueError", "torch.float64 on rank 0, torch.float32 on rank 1"),
    "normalizer": ({"normalizer": 3}, "ArgumentValueError", "disagree on normalizer: None"),
    "huge": ({"scale": 10**400}, "ArgumentValueError", "rank 1: scale is"),
    "range": ({"class_start": 2**70}, "ArgumentValueError", "rank 1: class_start is"),
    "num_classes": ({"num_classes": None}, "ArgumentValueError", "rank 1: num_classes is None"),
    "stats": ({"return_stats": True}, "ArgumentValueError", "disagree on return_stats"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ODD)
def test_what_one_rank_passes_alone(ranks: Ranks, case: str, kind: str) -> None:
    odd, error, text = ODD[case]
    results = ranks.run(3, rank_cases_agreement.odd_one_out, kind, odd, 1)
    assert len(set(results)) == 1, results
    assert results[0][0] == error
    assert text in results[0][1]


def test_values_of_a_normalizer(ranks: Ranks) -> None:
    results = ranks.run(2, rank_cases_agreement.normalizers)
    assert len(set(results)) == 1, results
    same, other = results[0]
    assert same == ("", "nothing was raised")
    assert other == ("ArgumentValueError", "ranks disagree on normalizer: 3.0 on rank 0, 4.0 on rank 1")


def test_data_that_do_not_travel(ranks: Ranks) -> None:
    results = ranks.run(2, rank_cases_agreement.data_that_do_not_travel)
    assert results[0] == results[1]
    nowhere, logits, other = results[0]
    assert nowhere == ("ArgumentValueError", "rank 1: the data are on meta, where group has no collectives")
    assert logits == ("ArgumentValueError", "rank 1: target is on cpu, expected meta as the input")
    assert other == ("TypeError", "rank 1: input is a Elsewhere, expected a Tensor")


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_numpy(ranks: Ranks, kind: str) -> None:
    ranks.run(2, rank_cases_agreement.numbers_of_numpy, kind)


def test_targets_that_are_much_alike(ranks: Ranks) -> None:
    for found in ranks.run(2, rank_cases_agreement.targets_alike):
        assert all("disagree on the values of target" in text for _, text in found), found


STEPS = [("logits", "parallel.shard.mean_denominator"), ("linear", "parallel.sweep.make_logits")]
STEPS += [(kind, "ops.operators.softmax_loss_accumulate") for kind in KINDS]


@pytest.mark.parametrize(("kind", "step"), STEPS)
def test_a_step_that_fails_on_one_rank(ranks: Ranks, kind: str, step: str) -> None:
    results = ranks.run(3, rank_cases_agreement.failing, kind, step, 2)
    assert set(results) == {("MemoryError", "rank 2: no memory")}


def test_what_remains_of_many_calls(ranks: Ranks) -> None:
    ranks.run(2, rank_cases_agreement.memory_of_many_calls)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence"])
def test_backward_passes_in_different_orders(ranks: Ranks, sequence_parallel: bool) -> None:
    for results in ranks.run(3, rank_cases_agreement.backward_in_two_orders, sequence_parallel):
        assert all(kind == "RuntimeError" and "in different orders" in text for kind, text in results)


def test_meshes_as_groups(ranks: Ranks) -> None:
    for rank, (mesh, text, *outside) in enumerate(ranks.run(4, rank_cases_agreement.meshes_as_groups)):
        assert mesh == ("ArgumentValueError", MESH)
        assert text == ("ArgumentTypeError", "group is a str, expected a ProcessGroup or a 1-D DeviceMesh")
        assert outside == [("ArgumentValueError", "this process does not belong to group")] * (rank >= 2)


MESH = "group is a DeviceMesh of 2 dimensions, expected one dimension: mesh.get_group(dimension)"


@pytest.mark.parametrize("gradient", ["backward", "forward"])
@pytest.mark.parametrize("kind", KINDS)
def test_functional_gradients(ranks: Ranks, kind: str, gradient: str) -> None:
    ranks.run(2, rank_cases_agreement.functional_gradients, kind, gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_headers_compared_on_the_device(ranks: Ranks, kind: str) -> None:
    ranks.run(3, rank_cases_agreement.compared_on_the_device, kind)


@pytest.mark.parametrize("case", ODD)
def test_what_one_rank_passes_alone_on_the_device(ranks: Ranks, case: str) -> None:
    """No rank gets a number; the one that refuses its arguments says why."""
    odd, _, text = ODD[case]
    results = ranks.run(3, rank_cases_agreement.odd_one_out_on_the_device, "logits", odd, 1)
    assert all(kind for kind, _ in results), results
    why = text.removeprefix("rank 1: ")
    assert all("ranks disagree" in found or why in found for _, found in results), results


def test_ranges_that_change_on_the_device(ranks: Ranks) -> None:
    """Right, or refused on every rank."""
    results = ranks.run(3, rank_cases_agreement.changing_ranges_on_the_device)
    assert [found[0] for found in results] == [found[1] for found in results] == [""] * 3
    for texts in zip(*results, strict=True):
        assert all(texts) or not any(texts), texts
