"""Two processes count, score, sample and train what one process would have."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import longtail
import training_ranks
from tolerances import assert_close, assert_same

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(training_ranks.work, args=(str(folder),), nprocs=training_ranks.WORLD_SIZE)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(training_ranks.WORLD_SIZE)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return training_ranks.statistics(None)


def test_a_sum_is_a_new_tensor(seen: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in seen:
        assert (rank["sum"].tolist(), rank["summand"].tolist()) == ([2, 4], [1, 2])
    assert alone["sum"].tolist() == [1, 2]


def test_counts(seen: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in seen:
        assert_same(rank["counts"], alone["counts"])
    assert_same(seen[0]["group"], longtail.class_counts(training_ranks.data()[1][:, :3], training_ranks.CLASSES))

    for rank in seen:
        assert [x.tolist() for x in rank["totals"]] == [[1, 2, 2], [5, 5, 5]], "3 rows and 2"
    assert seen[0]["rows"] == seen[1]["rows"] == [7, 4, 1], "no rank's rows alone are taken for multi-hot ones"
    many = torch.zeros(training_ranks.CLASSES, 700, dtype=torch.int64)
    many[:, 0] = alone["counts"]
    for rank in [*seen, alone]:
        assert_same(rank["many counts"], many.flatten())


@pytest.mark.parametrize(
    ("call", "exception", "text"),
    [
        ("target", "IndexError", r"rank 1: targets\[1\] = 5 is out of range, expected 0 to 4"),
        ("dtype", "TypeError", "rank 0: targets have dtype torch.float32, expected integers, or multi-hot"),
        ("loader", "OSError", "rank 1: .*no such sector"),
        ("return_totals", "ArgumentValueError", "ranks disagree on return_totals: 0 on rank 0, 1 on rank 1"),
        ("num_classes", "ArgumentValueError", "ranks disagree on num_classes: 5 on rank 0, 6 on rank 1"),
        ("many num_classes", "ArgumentValueError", "ranks disagree on num_classes: 5000 on rank 0, 5 on rank 1"),
        ("num_classes's type", "TypeError", "rank 0: num_classes is a str, expected an int"),
        ("ignore_index", "ArgumentValueError", "ranks disagree on ignore_index: 0 on rank 0, -1 on rank 1"),
        ("ignore_index's type", "ArgumentTypeError", "rank 1: ignore_index is a str, expected an int or None"),
        ("rows of 0 and 1", "ValueError", r"targets are integers of shape \[N, 5\] that hold nothing but 0 and 1"),
        ("call", "ArgumentValueError", "ranks disagree on the call: 'class_counts' on rank 0, 'Streaming"),
        ("decay", "ArgumentValueError", r"ranks disagree on decay: 0\.5 on rank 0, 0\.75 on rank 1"),
        ("frequencies' num_classes", "ArgumentValueError", "ranks disagree on num_classes: 5 on rank 0, 4 on rank 1"),
        (
            "dtype of average precisions",
            "ArgumentValueError",
            r"ranks disagree on dtype: 'torch\.float64' on rank 0, 't",
        ),
        ("accuracy's num_classes", "ArgumentValueError", "ranks disagree on num_classes: 2 on rank 0, 3 on rank 1"),
    ],
)
def test_what_one_rank_refuses_every_rank_raises(
    seen: list[dict[str, Any]], call: str, exception: str, text: str
) -> None:
    assert seen[0]["refused"][call] == seen[1]["refused"][call]
    assert seen[0]["refused"][call][0] == exception
    assert re.match(text, seen[0]["refused"][call][1])


def test_an_exception_of_a_type_that_other_ranks_need_not_know(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["refused"]["loader's type"] == ("UnicodeError", "rank 1: BrokenFile: bad byte")
    assert seen[1]["refused"]["loader's type"] == ("BrokenFile", "bad byte"), "its own error"


def test_what_is_no_group(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert rank["refused"]["group"][0] == "ArgumentTypeError"


def test_a_refused_batch_changes_no_estimate_and_the_next_ones_pair_up(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        frequencies, updates, targets = rank["after"]
        assert frequencies == [0.75, 0.25, 0] * 3 + [2.5 / 6, 1.5 / 6, 2 / 6]
        assert (updates, targets) == (2, 8)


def test_class_frequencies(seen: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in seen:
        assert_close(rank["frequency"], alone["frequency"])
        assert_same(rank["num_targets"], alone["num_targets"])
    assert_same(seen[0]["frequency"], seen[1]["frequency"], "frequencies of the ranks")


@pytest.mark.parametrize("kind", ["plain", "torchmetrics"])
def test_accuracy(seen: list[dict[str, Any]], alone: dict[str, Any], kind: str) -> None:
    if kind not in alone["scores"]:
        pytest.skip("torchmetrics is not installed")
    expected = alone["scores"][kind]
    for rank in seen:
        scores = rank["scores"][kind]
        for together in scores["together"]:
            for got, want in zip(together, expected["together"][0], strict=True):
                assert_close(torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64))
        assert scores["of batches"]
        assert scores["own"][0] == scores["own"][1]
    assert seen[0]["scores"][kind]["more"] == seen[1]["scores"][kind]["more"] != expected["together"][0][0]
    own = {scores["scores"][kind]["own"][0] for scores in (*seen, alone)}
    assert len(own) == 3, "each rank keeps its own state"


@pytest.mark.parametrize("kind", ["plain", "torchmetrics"])
def test_average_precisions(seen: list[dict[str, Any]], alone: dict[str, Any], kind: str) -> None:
    """Of all ranks' rows, the states staying each rank's own; also where a rank, or every rank, has none."""
    if kind not in alone["average precisions"]:
        pytest.skip("torchmetrics is not installed")
    expected = alone["average precisions"][kind]
    ranks = [rank["average precisions"][kind] for rank in seen]
    for scores in ranks:
        for together in scores["together"]:
            for got, want in zip(together, expected["together"][0], strict=True):
                assert_close(torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64))
        assert all(math.isnan(x) for x in scores["empty"])
        assert scores["of one"] == pytest.approx([ranks[1]["own"]] * 2, rel=1e-6)
    assert [scores["rows"] for scores in ranks] == [30, 18]
    assert len({ranks[0]["own"], ranks[1]["own"], expected["own"]}) == 3


def test_sampler_knows_its_rank(seen: list[dict[str, Any]]) -> None:
    targets = training_ranks.data()[1].flatten()
    whole = list(longtail.training.ClassBalancedSampler(targets, num_samples=22, seed=3))
    assert seen[0]["epoch"] == whole[0::2]
    assert seen[1]["epoch"] == whole[1::2]


@pytest.mark.parametrize("which", range(len(training_ranks.TRAININGS)))
def test_complement_objective_training_of_a_distributed_model(seen: list[dict[str, Any]], which: int) -> None:
    expected = training_ranks.train(None, which)
    for rank in seen:
        for name, got in rank["trained"][which].items():
            assert_close(got, expected[name], what=name, factor=10)


def test_a_layer_that_only_the_complement_loss_reaches(seen: list[dict[str, Any]]) -> None:
    """Its gradients too are averaged over the ranks, and what that loss does not reach is left alone."""
    expected = training_ranks.train_heads(None)
    for rank in seen:
        for name, got in rank["heads"].items():
            assert_close(got, expected[name], what=name, factor=10)


def test_a_global_count_makes_the_mean_of_all_rows(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        assert_close(rank["of all rows"], training_ranks.gradient_of_all_rows(None))
