"""Promise: hierarchical cross-entropy over shared-out classes is that of the whole, to the same bits on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cases
import longtail
import rank_cases
import rank_cases_hierarchical as case
from longtail import Hierarchy
from ranks import Ranks

SHARDS = {1: [13], 2: [5, 8], 3: [4, 0, 9], 4: [1, 6, 0, 4]}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = {"logits": case.logits_case, "linear": case.linear_case}
over_kinds = pytest.mark.parametrize("kind", KINDS)
over_reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
over_orders = pytest.mark.parametrize("ordered", [False, True], ids=["shuffled", "ordered"])
over_own = pytest.mark.parametrize("own", [False, True], ids=["full", "own"])
over_sequence = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence"])


def check(ranks: Ranks, kind: str, sizes: list[int], **named: Any) -> str:
    """Every rank finds its loss and gradient right, and all have the same bits."""
    results = ranks.run(len(sizes), KINDS[kind], sizes, **named)
    assert len(set(results)) == 1, results
    return results[0]


@pytest.mark.parametrize(("depth", "ordered"), [(1, False), (3, False), (3, True), (8, False), (9, True)])
@pytest.mark.parametrize("world", SHARDS)
@over_kinds
def test_worlds_and_trees(ranks: Ranks, kind: str, world: int, depth: int, ordered: bool) -> None:
    check(ranks, kind, SHARDS[world], depth=depth, ordered=ordered)


@pytest.mark.parametrize("dtype", FLOATS, ids=cases.name)
@pytest.mark.parametrize(("kind", "depth"), [("logits", 3), ("logits", 9), ("linear", 8)])
def test_types(ranks: Ranks, kind: str, depth: int, dtype: torch.dtype) -> None:
    for reduction in ("mean", "none"):
        check(ranks, kind, SHARDS[3], depth=depth, dtype=dtype, reduction=reduction)


@over_own
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=cases.name)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("depth", [3, 9])
def test_gradient_modes(ranks: Ranks, depth: int, mode: str, dtype: torch.dtype, own: bool) -> None:
    for reduction in ("mean", "sum"):
        check(ranks, "logits", SHARDS[3], depth=depth, dtype=dtype, reduction=reduction, gradient=mode, own=own)


@over_own
@over_reductions
@pytest.mark.parametrize("vectors", [(), *((name,) for name in case.VECTORS)], ids="".join)
def test_each_vector_alone(ranks: Ranks, vectors: tuple[str, ...], reduction: str, own: bool) -> None:
    for kind in KINDS:
        check(ranks, kind, SHARDS[2], vectors=vectors, reduction=reduction, own=own)


@pytest.mark.parametrize("normalizer", ["count", 7.5, torch.tensor(3.0)], ids=str)
def test_normalizers(ranks: Ranks, normalizer: Any) -> None:
    for own in (False, True):
        check(ranks, "logits", SHARDS[2], own=own, extra={"normalizer": normalizer})


@over_orders
@over_kinds
def test_vectors_of_all_classes_and_of_a_ranks_own_make_the_same_bits(ranks: Ranks, kind: str, ordered: bool) -> None:
    given = {"dtype": torch.float32, "depth": 8, "ordered": ordered}
    assert check(ranks, kind, SHARDS[3], own=False, **given) == check(ranks, kind, SHARDS[3], own=True, **given)


@over_orders
def test_ranges_in_any_order(ranks: Ranks, ordered: bool) -> None:
    for sizes, order in (([4, 0, 9], [2, 1, 0]), ([2, 3, 4, 5], [3, 0, 2, 1])):
        check(ranks, "logits", sizes, order=order, ordered=ordered, own=True)


@over_own
@over_kinds
def test_a_class_that_is_ignored(ranks: Ranks, kind: str, own: bool) -> None:
    for ignored in (2, 12, 255):
        check(ranks, kind, SHARDS[3], ignore_index=ignored, own=own)


def test_all_targets_on_one_rank(ranks: Ranks) -> None:
    for owner in (0, 2):
        check(ranks, "logits", SHARDS[3], one_owner=owner, depth=8)


@over_reductions
@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(ranks: Ranks, rows: int, reduction: str) -> None:
    for own in (False, True):
        for depth in (3, 9):
            check(ranks, "logits", SHARDS[3], rows=rows, reduction=reduction, own=own, depth=depth)


@pytest.mark.parametrize("gradient", ["auto", "backward"])
@over_sequence
def test_no_row_of_the_linear_loss(ranks: Ranks, sequence_parallel: bool, gradient: str) -> None:
    given = {"sequence_parallel": sequence_parallel, "gradient": gradient, "reduction": "sum"}
    for own in (False, True):
        check(ranks, "linear", SHARDS[3], leading=(0,), own=own, **given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=cases.name)
@pytest.mark.parametrize("mode", cases.MODES)
def test_saturation_at_each_level(ranks: Ranks, mode: str, dtype: torch.dtype) -> None:
    results = ranks.run(3, case.saturated_case, [3, 0, 4], dtype, mode)
    assert len(set(results)) == 1, results


@pytest.mark.parametrize("mode", cases.MODES)
def test_infinite_and_undefined_logits(ranks: Ranks, mode: str) -> None:
    results = ranks.run(3, case.infinite_case, [3, 0, 4], mode)
    assert len(set(results)) == 1, results


@over_sequence
@pytest.mark.parametrize("gradient", ["auto", "backward"])
@pytest.mark.parametrize("chunk_size", [1, 5, 100, None])
def test_chunks(ranks: Ranks, chunk_size: int | None, gradient: str, sequence_parallel: bool) -> None:
    given = {"gradient": gradient, "sequence_parallel": sequence_parallel, "own": True}
    check(ranks, "linear", SHARDS[2], chunk_size=chunk_size, **given)


@over_sequence
@over_reductions
def test_half_precision_in_chunks(ranks: Ranks, reduction: str, sequence_parallel: bool) -> None:
    for own in (False, True):
        for dtype in (torch.bfloat16, torch.float16):
            given = {"own": own, "dtype": dtype, "sequence_parallel": sequence_parallel}
            check(ranks, "linear", SHARDS[3], reduction=reduction, **given)


@over_sequence
@over_reductions
@pytest.mark.parametrize("shift", [False, True])
def test_leading_dimensions(ranks: Ranks, shift: bool, reduction: str, sequence_parallel: bool) -> None:
    given = {"shift": shift, "sequence_parallel": sequence_parallel, "reduction": reduction}
    for leading in ((4, 5), (2, 3, 4)):
        check(ranks, "linear", SHARDS[2], leading=leading, **given)


@pytest.mark.parametrize("trains", ["", "i", "w", "b", "wb"])
def test_what_needs_no_gradient(ranks: Ranks, trains: str) -> None:
    for gradient in ("auto", "backward"):
        check(ranks, "linear", SHARDS[2], trains=trains, gradient=gradient)
        if "b" not in trains:
            check(ranks, "linear", SHARDS[2], trains=trains, gradient=gradient, bias=False)


@pytest.mark.parametrize("gradient", ["auto", "backward"])
def test_several_losses_before_backward(ranks: Ranks, gradient: str) -> None:
    ranks.run(3, case.several_losses, SHARDS[3], gradient)


def test_of_a_layer_that_is_shared_out(ranks: Ranks) -> None:
    ranks.run(3, case.layer_that_is_shared_out, SHARDS[3])


@pytest.mark.parametrize("name", case.VECTORS)
@pytest.mark.parametrize("kind", ["hierarchical", "linear_hierarchical"])
def test_constants_that_change_before_backward(ranks: Ranks, kind: str, name: str) -> None:
    for text in ranks.run(2, rank_cases.constants_that_change, kind, name):
        assert "modified by an inplace operation" in text


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gradient", ["backward", "forward"])
@pytest.mark.parametrize("kind", ["hierarchical", "linear_hierarchical"])
def test_under_checkpoint(ranks: Ranks, kind: str, gradient: str, reentrant: bool) -> None:
    ranks.run(2, rank_cases.checkpointed, kind, gradient, reentrant)


# What rank 1 passes, and what every rank then says.
DEEPER = tuple(f"x/{path}" for path in case.PATHS)
SWAPPED = tuple(case.PATHS[i] for i in (0, 1, 2, 4, 3, 5, 6, 7))  # as many classes below every node as before
ODD: dict[str, tuple[dict[str, Any], str, str]] = {
    "tree": ({"paths": [*"01234567"]}, "ArgumentValueError", "disagree on hierarchy (by a fingerprint): "),
    "deeper": ({"paths": DEEPER}, "ArgumentValueError", "disagree on hierarchy (by a fingerprint): "),
    "numbers": ({"paths": SWAPPED}, "ArgumentValueError", "disagree on hierarchy (by a fingerprint): "),
    "classes": ({"paths": case.PATHS[:7]}, "ArgumentValueError", "num_classes: 8 on rank 0, 7 on rank 1"),
    "alpha": ({"alpha": 0.4}, "ArgumentValueError", "disagree on alpha: 0.3 on rank 0, 0.4 on rank 1"),
    "bad_alpha": ({"alpha": -1.0}, "ArgumentValueError", "rank 1: alpha is -1.0"),
    "large_alpha": ({"alpha": 30.0}, "ArgumentValueError", "rank 1: alpha is 30.0, expected at most 29.1"),
    "alpha_type": ({"alpha": "high"}, "ArgumentTypeError", "rank 1: alpha is a str"),
    "no_tree": ({"hierarchy": None}, "ArgumentTypeError", "rank 1: hierarchy is a NoneType, expected a longtail.Hier"),
    "paths": ({"hierarchy": case.PATHS}, "ArgumentTypeError", "rank 1: hierarchy is a tuple, expected a longtail.Hier"),
    "weight": ({"weight": torch.ones(5)}, "ArgumentValueError", "rank 1: weight has 5 elements, expected 8 (all"),
    "weight_alone": ({"weight": torch.ones(4)}, "ArgumentValueError", "weight: None on rank 0, \"of the rank's own"),
    "sample_weight": ({"sample_weight": torch.ones(6)}, "ArgumentValueError", "whether sample_weight is given: False"),
    "reduction": ({"reduction": "sum"}, "ArgumentValueError", "reduction: 'mean' on rank 0, 'sum' on rank 1"),
    "mode": ({"gradient": "sideways"}, "ValueError", "rank 1: gradient is 'sideways'"),
    "target": ({"target": torch.tensor([0, 8, 0, 0, 0, 0])}, "IndexError", "rank 1: "),
    "other_target": ({"target": torch.arange(6)}, "ArgumentValueError", "the values of target"),
}  # fmt: skip
LINEAR_ODD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no_weight": ({"linear_weight": None}, "TypeError", "rank 1: linear_weight is a NoneType"),
    "bias": ({"linear_bias": [0.0] * 4}, "TypeError", "rank 1: linear_bias is a list"),
    "one_row": ({"linear_weight": torch.ones(4)}, "ArgumentValueError", "rank 1: input has shape [6, 3] and linear_we"),
    "dtypes": ({"linear_weight": torch.ones(4, 3).double()}, "ArgumentTypeError", "rank 1: linear_weight has dtype"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, name) for kind in KINDS for name in ODD), *(("linear", name) for name in LINEAR_ODD)]
)
def test_a_rank_that_differs(ranks: Ranks, kind: str, name: str) -> None:
    odd, error, text = (ODD | LINEAR_ODD)[name]
    results = ranks.run(2, case.disagreeing, kind, odd)
    assert len(set(results)) == 1, results
    assert results[0][0] == error, results
    assert text in results[0][1]


@over_kinds
@pytest.mark.parametrize("classes", [7, 9])
def test_a_tree_of_other_classes_than_the_ranks_hold(ranks: Ranks, classes: int, kind: str) -> None:
    results = ranks.run(2, case.disagreeing, kind, {"paths": [*"012345678"][:classes]}, None)
    assert len(set(results)) == 1, results
    assert results[0] == ("ArgumentValueError", results[0][1])
    assert f"num_classes is {classes}, but the ranks hold 8 classes" in results[0][1]


@over_kinds
def test_ranks_that_each_pass_all_classes(ranks: Ranks, kind: str) -> None:
    odd = {"shape": (6, 8)} if kind == "logits" else {"linear_weight": torch.ones(8, 3)}
    results = ranks.run(2, case.disagreeing, kind, odd, None)
    assert len(set(results)) == 1, results
    assert "the ranks' classes overlap" in results[0][1] or "the ranks hold 16 classes" in results[0][1]


@over_kinds
def test_a_mistake_of_all_ranks_leaves_them_in_step(ranks: Ranks, kind: str) -> None:
    ranks.run(2, case.calls_after_a_mistake, kind)


def test_no_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        longtail.vocab_parallel_hierarchical_cross_entropy(
            torch.randn(2, 3), torch.tensor([0, 1]), Hierarchy.from_paths([*"abc"])
        )
