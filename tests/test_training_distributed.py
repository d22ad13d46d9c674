"""Two processes count, score, sample and train what one process would have."""

from __future__ import annotations

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


def test_class_frequencies(seen: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in seen:
        assert_close(rank["frequency"], alone["frequency"])
        assert_same(rank["num_targets"], alone["num_targets"])
    assert_same(seen[0]["frequency"], seen[1]["frequency"], "frequencies of the ranks")


def test_accuracy(seen: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in seen:
        for got, want in zip(rank["scores"], alone["scores"], strict=True):
            assert_close(torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(want, dtype=torch.float64))
    assert len({seen[0]["own"], seen[1]["own"], alone["own"]}) == 3, "each rank keeps its own state"


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
