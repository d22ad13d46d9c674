"""Long-tailed handwritten digits: every method against cross-entropy, over imbalance factors and seeds.

The data are scikit-learn's 1797 images of 8 x 8 pixels, cut as in :mod:`.demo_digits`: a seed draws 50 test images of
each class and a long-tailed training subset of the rest. All methods of a seed see the same images in the same order
and start from the same weights. Learning rate, epochs and weight decay are the same for all of them; they were chosen
for cross-entropy alone, on seeds that the results do not use (``TUNING_SEEDS``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional import cross_entropy
from ..training.scores import scores_of_samples
from . import demo_digits
from .comparison import add_verdicts, columns_of
from .methods import CROSS_ENTROPY, Classifier, Method, MethodTraining, grid
from .output import Advance, Row, with_provenance
from .pool import train_all
from .statistics import mean_and_std

BATCH_SIZE = 64
LEARNING_RATE = 0.1
WEIGHT_DECAY = 2e-4
WARM_UP = 0.1  # of the epochs
TUNING_SEEDS = range(1000, 1005)
METRICS = ("balanced", "few", "medium", "many")
TESTED = ("balanced", "few")


class Plan(NamedTuple):
    """What to run."""

    imbalance_factors: tuple[float, ...] = (10.0, 20.0, 50.0)
    seeds: int = 10
    epochs: int = 50
    jobs: int = 2

    def tasks(self) -> list[Task]:
        return [
            Task(factor, seed, method, self.epochs)
            for factor in self.imbalance_factors
            for seed in range(self.seeds)
            for method in grid()
        ]


class Task(NamedTuple):
    """One network to be trained."""

    imbalance_factor: float
    seed: int
    method: Method
    epochs: int


class Outcome(NamedTuple):
    """Shares of correct images: test images of all classes and of groups of them, and training images."""

    balanced: float
    few: float
    medium: float
    many: float
    train: float


def check(plan: Plan) -> None:
    """Raises ValueError where an imbalance factor leaves a class without training images."""
    for factor in plan.imbalance_factors:
        demo_digits.load_split(factor, 0)


def make_model(seed: int) -> Classifier:
    """Images [N, 1, 8, 8] to logits [N, 10]: two convolutions, each halving the image, and a linear layer."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
        )
        return Classifier(features, nn.Linear(32 * 2 * 2, demo_digits.NUM_CLASSES))


def train(task: Task, learning_rate: float = LEARNING_RATE) -> Outcome:
    """Trains and tests one network; the learning rate rises at first, then falls along a half cosine."""
    split = demo_digits.load_split(task.imbalance_factor, task.seed)
    counts = split.counts()
    model = make_model(task.seed)

    def rate(epoch: int) -> float:
        warm_up = min(1.0, (epoch + 1) / max(1, round(WARM_UP * task.epochs)))
        return learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * epoch / task.epochs))

    training = MethodTraining(task.method, model, counts, task.epochs, rate, WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(task.seed)
    for epoch in range(task.epochs):
        training.start_epoch(epoch)
        for batch in torch.randperm(split.train_labels.numel(), generator=generator).split(BATCH_SIZE):
            training.step(split.train_images[batch], split.train_labels[batch])
        training.next_learning_rate()
    correct = _correct(model, split.test_images, split.test_labels)
    scores = scores_of_samples(correct, split.test_labels, counts, *demo_digits.group_thresholds(counts))
    correct = _correct(model, split.train_images, split.train_labels)
    return Outcome(scores.balanced, scores.few, scores.medium, scores.many, correct.float().mean().item())


@torch.no_grad()
def _correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Whether the target has the largest logit, without adjustment or margin: the decision of every method."""
    _, stats = cross_entropy(model(images), labels, return_stats=True)
    correct: Tensor = stats.correct
    return correct


def run(plan: Plan, advance: Advance) -> dict[Task, Outcome]:
    """Trains everything, in ``plan.jobs`` processes; errors as :func:`.pool.train_all`."""

    def tell(task: Task) -> None:
        advance(f"imbalance factor {task.imbalance_factor:g}, seed {task.seed}, {task.method.name}")

    return train_all(plan.tasks(), train, plan.jobs, tell, _row_of)


def _row_of(task: Task, outcome: Outcome) -> Row:
    """One network of a run that was not finished."""
    row: Row = {"experiment": "digits", "imbalance_factor": task.imbalance_factor, "seed": task.seed}
    row |= {"method": task.method.name, "epochs": task.epochs, **outcome._asdict()}
    return with_provenance(row, threads=1)


def summarize(plan: Plan, outcomes: dict[Task, Outcome]) -> list[Row]:
    """A row for each imbalance factor and method.

    The paired test compares a method with cross-entropy, seed by seed. Holm's correction takes all comparisons of a
    metric as one family: every method at every imbalance factor.
    """
    rows = []
    for factor in plan.imbalance_factors:
        counts = demo_digits.load_split(factor, 0).counts()
        many, few = demo_digits.group_thresholds(counts)
        for method in grid():
            row: Row = {
                "experiment": "digits",
                "imbalance_factor": factor,
                "method": method.name,
                "family": method.family,
                "beta": method.beta,
                "focal_gamma": method.gamma,
                "seeds": plan.seeds,
                "epochs": plan.epochs,
                "learning_rate": LEARNING_RATE,
                "train_images": int(counts.sum()),
                "many_above": many,
                "few_below": few,
            }
            rows.append(row | _figures(plan, outcomes, factor, method))
    add_verdicts(rows, TESTED, CROSS_ENTROPY.name)
    return [with_provenance(row, threads=1) for row in rows]


def _figures(plan: Plan, outcomes: dict[Task, Outcome], factor: float, method: Method) -> Row:
    """Means, spreads and comparisons of one method at one imbalance factor."""
    by_seed, control = (
        [outcomes[Task(factor, seed, each, plan.epochs)] for seed in range(plan.seeds)]
        for each in (method, CROSS_ENTROPY)
    )
    train, _ = mean_and_std([outcome.train for outcome in by_seed])
    tested = [{name: getattr(outcome, name) for name in METRICS} for outcome in by_seed]
    against = None if method == CROSS_ENTROPY else [outcome._asdict() for outcome in control]
    return {"train_mean": train, **columns_of(tested, against, TESTED)}
