"""What each of two processes does in training/test_distributed.py; a module of its own, which they can import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import longtail
from accuracies import without_torchmetrics
from longtail.parallel.ranks import checked_sum, group_or_alone
from longtail.training import (
    ClassBalancedSampler,
    ComplementObjectiveTraining,
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


class Heads(nn.Module):
    """Two layers, each for one of the losses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(FEATURES, CLASSES, dtype=torch.float64) for _ in range(2))

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(input), self.second(input)


def train_heads(rank: int | None) -> dict[str, Tensor]:
    """The model after all batches; what a loss does not reach has no gradient, so that no weight decay moves it."""
    torch.manual_seed(1)
    model = Heads()
    wrapped = model if rank is None else nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    training = SingleForwardComplementObjectiveTraining(
        wrapped,
        torch.optim.SGD(model.first.parameters(), lr=0.1),
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1),
        loss=lambda logits, target: longtail.cross_entropy(logits[0], target),
        complement_loss=lambda logits, target: -longtail.complement_entropy(logits[1], target, balanced=True),
    )
    for input, target in zip(*data(), strict=True):
        part = slice(None) if rank is None else slice(rank, None, WORLD_SIZE)
        training.step(input[part], target[part])
    return model.state_dict()


def gradient_of_all_rows(rank: int | None) -> Tensor:
    """Of rows that are shared out unevenly; by DistributedDataParallel and the global count, or in one process."""
    torch.manual_seed(2)
    model: nn.Module = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
    input, target = (x.flatten(0, 1) for x in data())
    target = target.masked_fill(torch.arange(len(target)) < 11, -100)
    normalizer: Any = "count"
    if rank is not None:
        model = nn.parallel.DistributedDataParallel(model)
        input, target = ((x[:30], x[30:])[rank] for x in (input, target))
        count = (target != -100).sum()
        dist.all_reduce(count)
        normalizer = count / WORLD_SIZE
    longtail.cross_entropy(model(input), target, focal_gamma=1.0, normalizer=normalizer).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def scored(accuracy: Any, hit: Tensor, target: Tensor) -> dict[str, Any]:
    """Scores over all ranks, by each way to ask for them, and this rank's own, in between."""
    metric = accuracy([200, 50, 30, 10, 3])
    of_batches = [metric(batch_hit, batch).overall for batch_hit, batch in zip(hit, target, strict=True)]
    seen = {
        "of batches": of_batches == [batch.double().mean().item() for batch in hit],
        "together": [metric.compute(reduce=True), metric.compute(), metric.compute(reduce=True), metric.compute()],
        "own": [metric.compute(reduce=False).overall, accuracy_alone(accuracy, hit, target)],
    }
    metric.update(hit[0], target[0])
    return {**seen, "together": [tuple(x) for x in seen["together"]], "more": metric.compute().overall}


def accuracy_alone(accuracy: Any, hit: Tensor, target: Tensor) -> float:
    """Of a metric that is told not to look at the other ranks."""
    alone = accuracy([200, 50, 30, 10, 3], sync_on_compute=False)
    alone.update(hit, target)
    return alone.compute().overall


def average_precisions(metric: Any, rank: int | None) -> dict[str, Any]:
    """Scores over all ranks, of one of which alone, and this rank's own."""
    input, target = (x.flatten(0, 1) for x in data())
    cut = {None: slice(None), 0: slice(0, 30), 1: slice(30, None)}[rank]
    input, labels = input.bfloat16().double(), nn.functional.one_hot(target, CLASSES)[:, :FEATURES]
    seen = metric([200, 50, 30, 10], dtype=torch.float64)
    seen.update(input[cut], labels[cut])
    alone = metric([200, 50, 30, 10], score="mean", dtype=torch.bfloat16)
    empty = [alone.compute().item(), alone.compute(reduce=True).item()]
    if rank != 0:
        alone.update(input[cut], labels[cut])
    together = [seen.compute(reduce=True), seen.compute(), seen.compute(reduce=True), seen.compute()]
    return {
        "together": [tuple(x) for x in together],
        "own": seen.compute(reduce=False).mean,
        "of one": [alone.compute().item(), alone.compute(reduce=True).item()],
        "empty": empty,
        "rows": sum(map(len, seen.preds)),
    }


def statistics(rank: int | None) -> dict[str, Any]:
    """Counts, frequencies and scores of the stream; a rank sees unequal parts of it."""
    _, target = data()
    hit = correct(target)
    cut = {None: slice(None), 0: slice(0, 3), 1: slice(3, None)}[rank]
    shard = target[:, cut]
    stats = StreamingClassFrequency(CLASSES, 0.9)
    for batch in shard:
        stats.update(batch, reduce=True)
    with without_torchmetrics() as plain:
        scores = {"plain": scored(plain, hit[:, cut], shard)}
    with without_torchmetrics(name="LongTailMeanAveragePrecision") as plain:
        precisions = {"plain": average_precisions(plain, rank)}
    if find_spec("torchmetrics"):
        precisions["torchmetrics"] = average_precisions(longtail.training.LongTailMeanAveragePrecision, rank)
        scores["torchmetrics"] = scored(longtail.training.LongTailAccuracy, hit[:, cut], shard)
    mine = torch.tensor([1.0, 2.0], dtype=torch.float64)
    return {
        "sum": checked_sum(mine, {"length": 2}, group_or_alone(None), mine.device),
        "summand": mine,
        "counts": longtail.class_counts(shard, CLASSES, reduce=True),
        "rows": longtail.class_counts([[0, 1, 1], [0 if rank == 0 else 2, 0, 0]], 3, reduce=True).tolist(),
        "many counts": longtail.class_counts(shard * 700, 700 * CLASSES, reduce=True),
        "totals": longtail.class_counts([{0}, {1, 2}, set()][rank:], 3, reduce=True, return_totals=True),
        "frequency": stats.frequency(),
        "num_targets": stats.num_targets,
        "scores": scores,
        "average precisions": precisions,
        "epoch": list(ClassBalancedSampler(target.flatten(), num_samples=21, seed=3)),
    }


class BrokenFile(UnicodeError):
    """Of a type that the other ranks need not know."""


def broken(rank: int, error: Exception) -> Iterator[Tensor]:
    """Batches, of which rank 1 cannot read the second."""
    yield torch.tensor([0, 1])
    if rank == 1:
        raise error


def faults(rank: int) -> dict[str, Callable[[], Any]]:
    """Calls of which one rank's is wrong, or which do not fit together."""
    count, frequency = longtail.class_counts, StreamingClassFrequency
    other = torch.tensor([0, CLASSES if rank == 1 else 1])
    return {
        "target": lambda: count(other, CLASSES, reduce=True),
        "dtype": lambda: count(torch.ones(2) if rank == 0 else other, CLASSES, reduce=True),
        "loader": lambda: count(broken(rank, OSError(5, "no such sector")), CLASSES, reduce=True),
        "loader's type": lambda: count(broken(rank, BrokenFile("bad byte")), CLASSES, reduce=True),
        "num_classes": lambda: count([0], CLASSES + rank, reduce=True),
        "many num_classes": lambda: count([0], CLASSES if rank else 5000, reduce=True),
        "num_classes's type": lambda: count([0], CLASSES if rank else "five", reduce=True),  # type: ignore[arg-type]
        "ignore_index": lambda: count([0], CLASSES, -rank, reduce=True),
        "ignore_index's type": lambda: count([0], CLASSES, "a" if rank else 1, reduce=True),  # type: ignore[arg-type]
        "return_totals": lambda: count([0], CLASSES, reduce=True, return_totals=bool(rank)),  # type: ignore[call-overload]
        "rows of 0 and 1": lambda: count(torch.eye(CLASSES, dtype=torch.int64), CLASSES, reduce=True),
        "group": lambda: count([0], CLASSES, reduce=True, group="data"),  # type: ignore[arg-type]
        "call": lambda: frequency(2).update([0], reduce=True) if rank else count([0], 2, reduce=True),  # type: ignore[arg-type]
        "decay": lambda: frequency(2, 0.5 + 0.25 * rank).update(other[:1], reduce=True),
        "frequencies' num_classes": lambda: frequency(CLASSES - rank).update(other[:1], reduce=True),
        "dtype of average precisions": lambda: longtail.training.LongTailMeanAveragePrecision(
            [3, 3], dtype=torch.float32 if rank else torch.float64
        ).compute(reduce=True),
        "accuracy's num_classes": lambda: longtail.training.LongTailAccuracy([3] * (2 + rank)).compute(reduce=True),
    }


def refusals(rank: int) -> dict[str, tuple[str, str]]:
    """Type and text of what each call raises."""
    seen = {}
    for name, call in faults(rank).items():
        try:
            seen[name] = ("nothing", str(call()))
        except Exception as error:
            seen[name] = (type(error).__name__, str(error))
    return seen


def after_refused_batches(rank: int) -> tuple[list[float], int, int]:
    """The frequency after each batch, its updates and targets: rank 1's second is refused, the third has nothing."""
    stats, frequencies = StreamingClassFrequency(3, 0.5), []
    for batch in ([0, rank], [0, 9 * rank], [-100], [2, rank]):
        try:
            stats.update(torch.tensor(batch), reduce=True)
        except IndexError:
            assert batch[1] in (0, 9)
        frequencies += stats.frequency().tolist()
    return frequencies, int(stats.num_updates), int(stats.num_targets)


def work(rank: int, folder: str) -> None:
    """One process of the group; leaves what it has seen in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60)
    )
    alone = dist.new_group([0])
    seen = statistics(rank)
    seen["refused"] = refusals(rank)
    seen["after"] = after_refused_batches(rank)
    if rank == 0:
        seen["group"] = longtail.class_counts(data()[1][:, :3], CLASSES, reduce=True, group=alone)
    else:
        with pytest.raises(ValueError, match="does not belong to group"):
            longtail.class_counts([0], CLASSES, reduce=True, group=alone)
    seen["trained"] = [train(rank, which) for which in range(len(TRAININGS))]
    seen["heads"] = train_heads(rank)
    seen["of all rows"] = gradient_of_all_rows(rank)
    torch.save(seen, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
