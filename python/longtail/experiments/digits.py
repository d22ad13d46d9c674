"""Long-tailed handwritten digits: every method against cross-entropy, over imbalance factors and seeds.

The data are scikit-learn's 1797 images of 8 x 8 pixels, cut as in :mod:`.demo`: a seed draws 50 test images of each
class and a long-tailed training subset of the rest. All methods of a seed see the same images in the same order and
start from the same weights. Learning rate, epochs and weight decay are the same for all of them; they were chosen for
cross-entropy alone, on seeds that the results do not use (``TUNING_SEEDS``).
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import signal
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional import cross_entropy
from ..training.scores import scores_of_samples
from . import demo
from .methods import CROSS_ENTROPY, Classifier, Method, MethodTraining, grid
from .output import Advance, Interrupted, Row, with_provenance
from .statistics import holm, mean_and_std, paired_comparison

BATCH_SIZE = 64
LEARNING_RATE = 0.1
WEIGHT_DECAY = 2e-4
WARM_UP = 0.1  # of the epochs
TUNING_SEEDS = range(1000, 1005)
LEVEL = 0.05
"""Of the tests, after the correction."""

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
        demo.load_split(factor, 0)


def make_model(seed: int) -> Classifier:
    """Images [N, 1, 8, 8] to logits [N, 10]: two convolutions, each halving the image, and a linear layer."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
        )
        return Classifier(features, nn.Linear(32 * 2 * 2, demo.NUM_CLASSES))


def train(task: Task, learning_rate: float = LEARNING_RATE) -> Outcome:
    """Trains and tests one network; the learning rate rises at first, then falls along a half cosine."""
    split = demo.load_split(task.imbalance_factor, task.seed)
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
        training.end_epoch()
    correct = _correct(model, split.test_images, split.test_labels)
    scores = scores_of_samples(correct, split.test_labels, counts, *demo.group_thresholds(counts))
    correct = _correct(model, split.train_images, split.train_labels)
    return Outcome(scores.balanced, scores.few, scores.medium, scores.many, correct.float().mean().item())


@torch.no_grad()
def _correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Whether the target has the largest logit, without adjustment or margin: the decision of every method."""
    _, stats = cross_entropy(model(images), labels, return_stats=True)
    correct: Tensor = stats.correct
    return correct


def _prepare_process() -> None:
    """One thread: networks this small gain nothing from more, and sums come out the same in every process.

    Subnormal numbers become 0: confident rows have gradients that small, which slow the convolutions down tenfold.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


@contextlib.contextmanager
def _prepared_process() -> Iterator[None]:
    threads = torch.get_num_threads()
    _prepare_process()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all: it is for the one that waits."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(plan: Plan, advance: Advance) -> dict[Task, Outcome]:
    """Trains everything, in ``plan.jobs`` processes of one thread each; the outcomes do not depend on their number.

    Raises:
        Interrupted: by Ctrl-C, with a row for each network that was trained and tested by then.
    """
    outcomes: dict[Task, Outcome] = {}
    tasks = plan.tasks()
    try:
        with contextlib.closing(_outcomes(plan)) as finished:
            for task, outcome in zip(tasks, finished, strict=True):
                outcomes[task] = outcome
                advance(f"imbalance factor {task.imbalance_factor:g}, seed {task.seed}, {task.method.name}")
    except KeyboardInterrupt:
        done = f"{len(outcomes)} of {len(tasks)} networks"
        raise Interrupted([_row_of(*each) for each in outcomes.items()], done) from None
    return outcomes


def _row_of(task: Task, outcome: Outcome) -> Row:
    """One network of a run that was not finished."""
    row: Row = {"experiment": "digits", "imbalance_factor": task.imbalance_factor, "seed": task.seed}
    row |= {"method": task.method.name, "epochs": task.epochs, **outcome._asdict()}
    return with_provenance(row, threads=1)


def _outcomes(plan: Plan) -> Generator[Outcome]:
    if plan.jobs == 1:
        with _prepared_process():
            yield from map(train, plan.tasks())
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(plan.jobs, mp_context=context, initializer=_prepare_process)
    try:
        with _interrupts_ignored():
            outcomes = pool.map(train, plan.tasks())
        yield from outcomes
    finally:
        pool.shutdown(cancel_futures=True)


def verdict(difference: float, p_holm: float) -> str:
    """What the test says of a method against cross-entropy; nothing without a test."""
    if math.isnan(p_holm):
        return ""
    if p_holm >= LEVEL:
        return "no difference shown"
    return "better" if difference > 0 else "worse"


def summarize(plan: Plan, outcomes: dict[Task, Outcome]) -> list[Row]:
    """A row for each imbalance factor and method.

    The paired test compares a method with cross-entropy, seed by seed. Holm's correction takes all comparisons of a
    metric as one family: every method at every imbalance factor.
    """
    rows = []
    for factor in plan.imbalance_factors:
        counts = demo.load_split(factor, 0).counts()
        many, few = demo.group_thresholds(counts)
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
    for metric in TESTED:
        compared = [row for row in rows if row["method"] != CROSS_ENTROPY.name]
        for row, p in zip(compared, holm([float(row[f"{metric}_p"] or 0) for row in compared]), strict=True):
            row[f"{metric}_p_holm"] = p
            row[f"{metric}_verdict"] = verdict(float(row[f"{metric}_difference"] or 0), p)
    return [with_provenance(row, threads=1) for row in rows]


def _figures(plan: Plan, outcomes: dict[Task, Outcome], factor: float, method: Method) -> Row:
    """Means, spreads and comparisons of one method at one imbalance factor."""
    by_seed = [outcomes[Task(factor, seed, method, plan.epochs)] for seed in range(plan.seeds)]
    control = [outcomes[Task(factor, seed, CROSS_ENTROPY, plan.epochs)] for seed in range(plan.seeds)]
    figures: Row = {"train_mean": mean_and_std([outcome.train for outcome in by_seed])[0]}
    for metric in METRICS:
        values = [getattr(outcome, metric) for outcome in by_seed]
        figures[f"{metric}_mean"], figures[f"{metric}_std"] = mean_and_std(values)
    for metric in TESTED:
        values = [getattr(outcome, metric) for outcome in by_seed]
        compared = None
        if method != CROSS_ENTROPY:
            compared = paired_comparison(values, [getattr(outcome, metric) for outcome in control])
        for name in ("difference", "half_width", "p"):
            figures[f"{metric}_{name}"] = getattr(compared, name, None)
        figures |= {f"{metric}_p_holm": None, f"{metric}_verdict": ""}
        figures[f"{metric}_by_seed"] = " ".join(f"{value:.4f}" for value in values if not math.isnan(value))
    return figures
