"""Promise: ranks that do not fit together raise one and the same error on every rank; none of them hangs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import longtail
import rank_cases
from longtail.parallel.agreement import Refusal, class_starts
from longtail.parallel.handshake import range_code
from longtail.parallel.shard import ALL, OWN, how_given
from ranks import Ranks

# What rank 1 passes, and what every rank then says.
ODD: dict[str, tuple[dict[str, Any], str, str]] = {
    "option": ({"focal_gamma": 2.0}, "ArgumentValueError", "disagree on focal_gamma: 0.0 on rank 0, 2.0 on rank 1"),
    "reduction": ({"reduction": "sum"}, "ArgumentValueError", "reduction: 'mean' on rank 0, 'sum' on rank 1"),
    "ignore_index": ({"ignore_index": 0}, "ArgumentValueError", "ignore_index: -100 on rank 0, 0 on rank 1"),
    "bad_option": ({"label_smoothing": 2.0}, "ArgumentValueError", "rank 1: label_smoothing is 2.0"),
    "negative_zero": ({"focal_gamma": -0.0}, "ArgumentValueError", "focal_gamma: 0.0 on rank 0, -0.0 on rank 1"),
    "bad_type": ({"softcap": "high"}, "ArgumentTypeError", "rank 1: softcap is a str"),
    "dtype": ({"dtype": torch.float64}, "ArgumentValueError", "torch.float32 on rank 0, torch.float64 on rank 1"),
    "rows": ({"shape": (5, 4)}, "ArgumentValueError", "rows: 6 on rank 0, 5 on rank 1"),
    "images": ({"shape": (6, 4, 2)}, "ArgumentValueError", "rank 1: local_logits has shape [6, 4, 2]"),
    "overlap": ({"class_start": 3}, "ArgumentValueError", "overlap: [0, 4) on rank 0, [3, 7) on rank 1"),
    "beyond": ({"class_start": 5}, "ArgumentValueError", "rank 1: class_start is 5 and this rank passes 4"),
    "negative": ({"class_start": -1}, "ArgumentValueError", "rank 1: class_start is -1"),
    "num_classes": ({"num_classes": 9}, "ArgumentValueError", "num_classes: 8 on rank 0, 9 on rank 1"),
    "weight_alone": ({"weight": torch.ones(4)}, "ArgumentValueError", "weight: None on rank 0, "),
    "weight_rank": ({"weight": torch.ones(4, 1)}, "ArgumentValueError", "rank 1: weight has shape [4, 1]"),
    "sample_weight": ({"sample_weight": torch.ones(3)}, "ArgumentValueError", "rank 1: sample_weight has shape [3]"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_a_rank_that_differs(ranks: Ranks, case: str) -> None:
    odd, kind, text = ODD[case]
    results = ranks.run(2, rank_cases.disagreeing, odd, 1)
    assert len(set(results)) == 1, results
    assert results[0][0] == kind
    assert text in results[0][1]


@pytest.mark.parametrize("value", [-1, 12, 10**12])
def test_targets_outside_the_vocabulary(ranks: Ranks, value: int) -> None:
    results = ranks.run(3, rank_cases.disagreeing, {}, 0, value)
    assert len(set(results)) == 1, results
    assert results[0][0] == "IndexError"
    assert f"target {value} in row 2 is out of bounds" in results[0][1]


def test_a_mistake_of_all_ranks_leaves_them_in_step(ranks: Ranks) -> None:
    ranks.run(2, rank_cases.calls_after_a_mistake)


@pytest.mark.parametrize(("num_classes", "text"), [(None, "num_classes is None"), (4, "the ranks hold 8 classes")])
def test_ranks_that_each_pass_all_classes(ranks: Ranks, num_classes: int | None, text: str) -> None:
    """Or forget to say how many there are: a loss that is log(world size) too large would look like any other."""
    for case in (rank_cases.all_logits_on_every_rank, rank_cases.all_weights_on_every_rank):
        results = ranks.run(2, case, num_classes)
        assert len(set(results)) == 1, results
        assert results[0][0] == "ArgumentValueError"
        assert text in results[0][1]


def test_weights_of_two_dtypes(ranks: Ranks) -> None:
    text = "dtype of linear_weight: torch.float32 on rank 0, torch.bfloat16 on rank 1"
    for kind, said in ranks.run(2, rank_cases.weights_of_two_dtypes):
        assert kind == "ArgumentValueError"
        assert text in said


def test_no_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        longtail.vocab_parallel_cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]))


class WordlessError(ValueError):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_errors_that_travel() -> None:
    """As the nearest type that takes a text: what fails at that leaves the other ranks waiting."""
    assert Refusal.of(WordlessError()) == (ValueError, "WordlessError: an error without a text")
    assert Refusal.of(UnicodeDecodeError("utf-8", b"a", 0, 1, "r"))[0] is UnicodeError
    assert Refusal.of(torch.OutOfMemoryError("no memory")) == (RuntimeError, "OutOfMemoryError: no memory")


def test_how_class_vectors_are_given() -> None:
    vector = torch.ones(5)
    assert [how_given("weight", v, 3, 5) for v in (None, vector, vector[:3])] == [None, ALL, OWN]
    with pytest.raises(ValueError, match=r"weight has 4 elements, expected 5 \(all classes\) or 3 \(this rank's\)"):
        how_given("weight", vector[:4], 3, 5)


def test_ranges_of_classes() -> None:
    ranks = (4, 5, 7)
    assert class_starts(None, (3, 0, 2), 5, ranks) == (0, 3, 3)
    assert class_starts((3, 9, 0), (2, 0, 3), 5, ranks) == (3, 9, 0)
    with pytest.raises(ValueError, match=r"overlap: \[0, 3\) on rank 4, \[2, 4\) on rank 7"):
        class_starts((0, 3, 2), (3, 0, 2), 5, ranks)
    with pytest.raises(ValueError, match=r"leave out \[3, 4\): \[0, 3\) on rank 4, \[4, 5\) on rank 5"):
        class_starts((0, 4, 5), (3, 1, 0), 5, ranks)
    with pytest.raises(ValueError, match="num_classes is 6, but the ranks hold 5 classes"):
        class_starts(None, (3, 0, 2), 6, ranks)


def test_codes_of_ranges_add_up_where_they_cut_the_classes_into_pieces() -> None:
    def total(*ranges: tuple[int, int]) -> int:
        return sum(range_code(start, stop) for start, stop in ranges)

    whole = range_code(0, 128256)
    assert total((60, 128256), (0, 60), (7, 7)) == whole
    for wrong in ((0, 128255), (1, 128256)), ((0, 60), (61, 128256)), ((0, 128256), (0, 60)), ((60, 128256),):
        assert total(*wrong) != whole
    for size in range(1, 100):  # as many classes as there are, some of them twice
        for start in {*range(101 - size)} - {100 - size}:
            assert total((0, 100 - size), (start, start + size)) != range_code(0, 100)
    assert abs(whole) * 4096 < 2**53  # so float64 adds them up exactly
