"""What each of two processes does in test_training_distributed.py; a module of its own, which they can import."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import longtail
from longtail.ranks import all_reduce_sum
from longtail.training import (
    ClassBalancedSampler,
    ComplementObjectiveTraining,
    LongTailAccuracy,
    SingleForwardComplementObjectiveTraining,
    StreamingClassFrequency,
)

WORLD_SIZE = 2
CLASSES, FEATURES, BATCHES, ROWS = 5, 4, 6, 8


def data() -> tuple[Tensor, Tensor]:
    """Inputs [BATCHES, ROWS, FEATURES] float64 and targets of the whole stream, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(BATCHES, ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return input, torch.randint(CLASSES, (BATCHES, ROWS), generator=generator)


def correct(target: Tensor) -> Tensor:
    return torch.arange(target.numel()).view_as(target) % 3 == target % 3


# Variant, number of optimizers, options of DistributedDataParallel.
TRAININGS: list[tuple[Any, int, dict[str, Any]]] = [
    (ComplementObjectiveTraining, 2, {}),
    (SingleForwardComplementObjectiveTraining, 1, {}),
    (SingleForwardComplementObjectiveTraining, 2, {}),
    (SingleForwardComplementObjectiveTraining, 2, {"gradient_as_bucket_view": True, "static_graph": True}),
    (SingleForwardComplementObjectiveTraining, 2, {"find_unused_parameters": True}),
]


class Branching(nn.Linear):
    """With a second layer for some rows, of which a rank may have none."""

    def __init__(self) -> None:
        super().__init__(FEATURES, CLASSES, dtype=torch.float64)
        self.branch = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)

    def forward(self, input: Tensor) -> Tensor:
        output, rows = super().forward(input), input[:, 0] > 1
        return output.index_add(0, rows.nonzero()[:, 0], self.branch(input[rows])) if rows.any() else output


def train(rank: int | None, which: int) -> dict[str, Tensor]:
    """The model after all batches; a rank sees its half of each, wrapped as people wrap it."""
    variant, optimizers, options = TRAININGS[which]
    torch.manual_seed(1)
    model: nn.Module = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
    if options.get("find_unused_parameters"):
        model = Branching()
    wrapped = model if rank is None else nn.parallel.DistributedDataParallel(model, **options)
    steppers = [torch.optim.SGD(model.parameters(), lr=0.1 / (i + 1), momentum=0.9) for i in range(optimizers)]
    training = variant(wrapped, *steppers)
    for input, target in zip(*data(), strict=True):
        part = slice(None) if rank is None else slice(rank, None, WORLD_SIZE)
        training.step(input[part], target[part])
    return model.state_dict()


def statistics(rank: int | None) -> dict[str, Any]:
    """Counts, frequencies and scores of the stream; a rank sees unequal parts of it."""
    _, target = data()
    hit = correct(target)
    cut = {None: slice(None), 0: slice(0, 3), 1: slice(3, None)}[rank]
    shard = target[:, cut]
    stats = StreamingClassFrequency(CLASSES, 0.9)
    metric = LongTailAccuracy([200, 50, 30, 10, 3])
    for batch, batch_hit in zip(shard, hit[:, cut], strict=True):
        stats.update(batch, reduce=True)
        metric.update(batch_hit, batch)
    first = metric.compute(reduce=True)
    assert first.overall == metric.compute(reduce=True).overall, "to reduce changes nothing"
    mine = torch.tensor([1.0, 2.0])
    return {
        "sum": all_reduce_sum(mine),
        "summand": mine,
        "counts": longtail.class_counts(shard, CLASSES, reduce=True),
        "frequency": stats.frequency(),
        "num_targets": stats.num_targets,
        "scores": tuple(first),
        "own": metric.compute().overall,
        "epoch": list(ClassBalancedSampler(target.flatten(), num_samples=21, seed=3)),
    }


def work(rank: int, folder: str) -> None:
    """One process of the group; leaves what it has seen in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60)
    )
    alone = dist.new_group([0])
    seen = statistics(rank)
    if rank == 0:
        seen["group"] = longtail.class_counts(data()[1][:, :3], CLASSES, reduce=True, group=alone)
    seen["trained"] = [train(rank, which) for which in range(len(TRAININGS))]
    torch.save(seen, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
