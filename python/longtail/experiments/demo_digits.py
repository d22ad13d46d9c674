"""A small convolutional network on long-tailed handwritten digits: ``demo --data digits``, without its output.

The data are real: scikit-learn's 1797 images of 8 x 8 pixels. 50 images of each class are kept for testing,
the rest is cut to an exponential long tail, anew for each seed. All losses of a seed start from the same network
and see the same images in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..class_balance import class_counts, effective_number_weight, logit_adjustment
from ..functional import cross_entropy
from ..training import LongTailScores, long_tailed_indices
from ..training.scores import scores_of_samples
from .demo_parts import LossTime, time_both
from .plain_losses import softmax_loss

NUM_CLASSES = 10
TEST_PER_CLASS = 50
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
BETA, FOCAL_GAMMA, COMPLEMENT_GAMMA, TAU = 0.99, 2.0, -1.0, 1.0
TIMED_ROUNDS = 300

LOSSES = {
    "cross-entropy": "cross-entropy",
    "logit-adjustment": "logit adjustment",
    "class-balanced-softmax": "class-balanced softmax",
    "class-balanced-softmax-focal": "class-balanced softmax focal",
    "complement-cross-entropy": "complement cross-entropy",
    "class-balanced-softmax-focal-complement": "class-balanced softmax focal + complement",
}
"""The losses by name on the command line."""


class Plan(NamedTuple):
    """What to run."""

    losses: list[str]
    imbalance_factor: float = 50.0
    seeds: int = 5
    epochs: int = 40


class Split(NamedTuple):
    """The images [N, 1, 8, 8] float32 and labels [N] int64 of one seed."""

    seed: int
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def counts(self) -> Tensor:
        """Training images of each class, [C]."""
        return class_counts(self.train_labels, NUM_CLASSES)


class Result(NamedTuple):
    """What one loss achieved: the scores of every seed, and its time."""

    loss: str
    scores: list[LongTailScores]
    time: LossTime


def load(plan: Plan) -> list[Split]:
    """The data of every seed.

    Raises:
        ValueError: the imbalance factor is below 1, or leaves the rarest class without images.
    """
    return [load_split(plan.imbalance_factor, seed) for seed in range(plan.seeds)]


def load_split(imbalance_factor: float, seed: int) -> Split:
    """The data of one seed; the test images do not depend on the imbalance factor. Errors as :func:`load`."""
    images, labels = _digits()
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(labels.numel(), generator=generator)
    by_class = [shuffled[labels[shuffled] == c] for c in range(NUM_CLASSES)]
    test = torch.cat([members[:TEST_PER_CLASS] for members in by_class])
    rest = torch.cat([members[TEST_PER_CLASS:] for members in by_class])
    train = rest[long_tailed_indices(labels[rest], imbalance_factor, generator=generator)]
    return Split(seed, images[train], labels[train], images[test], labels[test])


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1)
    return images, torch.as_tensor(digits.target, dtype=torch.int64)


def group_thresholds(counts: Tensor) -> tuple[int, int]:
    """(many, few) for ``LongTailAccuracy``: a third of the classes each for the most and the fewest images.

    The usual 100 and 20 are meant for larger data sets. Classes of equal count stay together, in the middle.
    """
    ordered = sorted(counts.tolist(), reverse=True)
    third = len(ordered) // 3
    return ordered[third], ordered[-third - 1]


def loss_options(loss: str, counts: Tensor) -> dict[str, Any]:
    """Keyword arguments of ``longtail.cross_entropy`` for one of ``LOSSES``, which is a mean over the rows."""
    options: dict[str, Any] = {}
    if loss == "logit-adjustment":
        options["class_bias"] = logit_adjustment(counts, TAU)
    if loss.startswith("class-balanced"):
        options["weight"] = effective_number_weight(counts, BETA)
    if "focal" in loss:
        options["focal_gamma"] = FOCAL_GAMMA
    if "complement" in loss:
        options["complement_gamma"] = COMPLEMENT_GAMMA
    return options


def make_model(seed: int) -> nn.Module:
    """Images [N, 1, 8, 8] to logits [N, 10], two convolutions and a linear layer."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, NUM_CLASSES),
        )


def train(model: nn.Module, split: Split, loss_function: Callable[..., Tensor], epochs: int) -> Iterator[int]:
    """Trains the model in place; yields after each epoch."""
    generator = torch.Generator().manual_seed(split.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for batch in torch.randperm(split.train_labels.numel(), generator=generator).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss_function(model(split.train_images[batch]), split.train_labels[batch]).backward()
            optimizer.step()
        schedule.step()
        yield epoch


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> LongTailScores:
    """Accuracy on the test images; what is correct comes with the loss, for free."""
    many, few = group_thresholds(split.counts())
    correct = []
    for images, labels in zip(split.test_images.split(250), split.test_labels.split(250), strict=True):
        _, stats = cross_entropy(model(images), labels, return_stats=True)
        correct.append(stats.correct)
    return scores_of_samples(torch.cat(correct), split.test_labels, split.counts(), many, few)


def time_loss(logits: Tensor, target: Tensor, options: dict[str, Any]) -> LossTime:
    """Errors as :func:`.demo_parts.time_both`."""
    return time_both(
        lambda logits: cross_entropy(logits, target, **options, normalizer="count"),
        lambda logits: softmax_loss(logits, target, **options),
        *(logits, TIMED_ROUNDS, 1e-7),
    )


def run(plan: Plan, splits: list[Split], advance: Callable[[str], None]) -> list[Result]:
    """Trains and tests one network per seed and loss; tells ``advance`` after every epoch what it is at.

    An interrupt (Ctrl-C) ends it early: the results are then of the seeds that all losses have finished.

    Raises:
        KeyboardInterrupt: interrupted before there was such a seed.
        AssertionError: a fused loss differs from the plain one.
    """
    by_seed: list[dict[str, LongTailScores]] = []
    times: dict[str, LossTime] = {}
    try:
        for split in splits:
            scores = {}
            for loss in plan.losses:
                options = loss_options(loss, split.counts())
                model = make_model(split.seed)
                for _ in train(
                    model, split, functools.partial(cross_entropy, **options, normalizer="count"), plan.epochs
                ):
                    advance(f"seed {split.seed}, {LOSSES[loss]}")
                scores[loss] = evaluate(model, split)
                if loss not in times:
                    logits = model(split.train_images[:BATCH_SIZE])
                    times[loss] = time_loss(logits, split.train_labels[:BATCH_SIZE], options)
            by_seed.append(scores)
    except KeyboardInterrupt:
        if not by_seed:
            raise
    return [Result(loss, [scores[loss] for scores in by_seed], times[loss]) for loss in plan.losses]
