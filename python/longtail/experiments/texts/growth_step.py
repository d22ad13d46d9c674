"""One training step of a model of places, by two losses in plain PyTorch and fused: times, peaks, differences.

For processes of their own: what a process did before shows in its memory, and so in its times.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...class_balance import effective_number_weight, logit_adjustment
from ...functional import cross_entropy, linear_cross_entropy
from ..methods import Classifier
from ..peak_memory import PeakMemory, return_freed_memory
from ..plain_losses import softmax_loss
from ..tokens import GRADIENT_TOLERANCE, LOSS_TOLERANCE, UnequalLosses
from .features import Bags
from .model import adam_of, make_model

THREADS, SEED = 2, 0
BETA, FOCAL_GAMMA, COMPLEMENT_GAMMA = 0.999, 1.0, -1.0

Loss = Callable[[Tensor, Classifier, Tensor], Tensor]
"""Of features [N, D], the model with its head, and target [N]."""


class Work(NamedTuple):
    """What the steps of one number of classes need."""

    buckets: int  # of n-grams
    width: int  # of the vector of a text
    learning_rate: float
    counts: Tensor  # texts of each class, [C]
    batches: list[tuple[Bags, Tensor]]  # with their targets [N]


class Contender(NamedTuple):
    """A loss in one implementation."""

    loss: str
    implementation: str
    compute: Loss


class Difference(NamedTuple):
    """Largest relative differences to plain PyTorch at the same weights."""

    loss: float = 0.0
    gradient: float = 0.0


class Measured(NamedTuple):
    """Of a contender: medians over its steps but the first one, and the larger of the differences before and after."""

    step_ms: float
    optimizer_ms: float
    difference: Difference


def measure(work: Work) -> list[Measured]:
    """Of all contenders, whose steps take turns in an order that rotates.

    Raises:
        UnequalLosses: loss or gradients of a fused loss are not those of plain PyTorch.
    """
    _as_usual()
    return [found for rivals in contenders(work.counts) for found in _measure(rivals, work)]


def _measure(rivals: list[Contender], work: Work) -> list[Measured]:
    learner = Learner(work)
    before = learner.differences(rivals, *work.batches[0])
    seconds: dict[Contender, list[tuple[float, float]]] = {contender: [] for contender in rivals}
    for i, batch in enumerate(work.batches):
        for contender in rivals[i % len(rivals) :] + rivals[: i % len(rivals)]:
            seconds[contender].append(learner.timed_step(contender, *batch))
    after = learner.differences(rivals, *work.batches[0])
    found = []
    for contender, *apart in zip(rivals, before, after, strict=True):
        step, optimizer = (1e3 * statistics.median(times) for times in zip(*seconds[contender][1:], strict=True))
        found.append(Measured(step, optimizer, Difference(*map(max, zip(*apart, strict=True)))))
    return found


def peaks(work: Work) -> list[int | None]:
    """Of every contender's step, in bytes, after one whose memory is not counted."""
    _as_usual()
    return_freed_memory()
    found = []
    for rivals in contenders(work.counts):
        learner = Learner(work)
        for contender in rivals:
            learner.loss_and_gradients(contender, *work.batches[0])
            gc.collect()
            found.append(learner.peak(contender, *work.batches[0]))
    return found


def _as_usual() -> None:
    """Not as a process of :mod:`..pool`."""
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(False)


def contenders(counts: Tensor) -> list[list[Contender]]:
    """Of each loss: plain PyTorch, the loss fused, projection and loss fused. counts [C]."""
    options = {
        "weight": effective_number_weight(counts, BETA),
        "class_bias": logit_adjustment(counts),
        "focal_gamma": FOCAL_GAMMA,
        "complement_gamma": COMPLEMENT_GAMMA,
    }
    return [
        _three("cross-entropy", "F.cross_entropy", F.cross_entropy, {}),
        _three("combined", "PyTorch operations", softmax_loss, options),
    ]


def _three(loss: str, plain_name: str, plain: Callable[..., Tensor], options: dict[str, Any]) -> list[Contender]:
    def with_plain(features: Tensor, model: Classifier, target: Tensor) -> Tensor:
        return plain(model.head(features), target, **options)

    fused = options | {"normalizer": "count"}

    def with_loss_fused(features: Tensor, model: Classifier, target: Tensor) -> Tensor:
        value: Tensor = cross_entropy(model.head(features), target, **fused, gradient="inplace")
        return value

    def with_all_fused(features: Tensor, model: Classifier, target: Tensor) -> Tensor:
        assert isinstance(model.head, nn.Linear)
        head = model.head
        value: Tensor = linear_cross_entropy(features, head.weight, target, linear_bias=head.bias, **fused)
        return value

    return [
        Contender(loss, plain_name, with_plain),
        Contender(loss, "longtail.cross_entropy, in place", with_loss_fused),
        Contender(loss, "longtail.linear_cross_entropy", with_all_fused),
    ]


class Learner:
    """A model that all contenders of a loss train in turn, so that each works at the same kind of weights."""

    def __init__(self, work: Work) -> None:
        self.classes = work.counts.numel()
        self.model = make_model(work.buckets, work.width, self.classes, SEED)
        self.optimizer = adam_of(self.model)([{"params": [*self.model.parameters()], "weight_decay": 0.0}])
        for group in self.optimizer.param_groups:
            group["lr"] = work.learning_rate

    def loss_and_gradients(self, contender: Contender, bags: Bags, target: Tensor) -> Tensor:
        """What the optimizer needs of a step."""
        self.optimizer.zero_grad()
        loss = contender.compute(self.model.features(bags), self.model, target)
        loss.backward()
        return loss.detach()

    def timed_step(self, contender: Contender, bags: Bags, target: Tensor) -> tuple[float, float]:
        """Seconds of forward, loss and backward, and of the optimizer."""
        start = time.perf_counter()
        self.loss_and_gradients(contender, bags, target)
        middle = time.perf_counter()
        self.optimizer.step()
        return middle - start, time.perf_counter() - middle

    def peak(self, contender: Contender, bags: Bags, target: Tensor) -> int | None:
        """Bytes that forward, loss and backward take beyond the model and the optimizer; None where unknown."""
        self.optimizer.zero_grad()
        with PeakMemory(torch.device("cpu")) as peak:
            self.loss_and_gradients(contender, bags, target)
        return peak.extra

    def gradients(self) -> Tensor:
        """All of them in one vector; of the table, those of the rows that the batch has touched."""
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.cat([(g.coalesce().values() if g.is_sparse else g).flatten() for g in found])

    def differences(self, rivals: list[Contender], bags: Bags, target: Tensor) -> list[Difference]:
        """Of all contenders to the first one.

        Raises:
            UnequalLosses: one is beyond the tolerances.
        """
        loss, gradients = self.loss_and_gradients(rivals[0], bags, target), self.gradients()
        found = [Difference()]
        for contender in rivals[1:]:
            own = self.loss_and_gradients(contender, bags, target)
            apart = Difference(
                ((own - loss).abs() / loss.abs()).item(),
                ((self.gradients() - gradients).norm() / gradients.norm()).item(),
            )
            if not (apart.loss <= LOSS_TOLERANCE and apart.gradient <= GRADIENT_TOLERANCE):  # NaN too
                raise UnequalLosses(
                    f"{contender.implementation}, {contender.loss}, {self.classes} classes: loss and gradient are "
                    f"{apart.loss:.2g} and {apart.gradient:.2g} off plain PyTorch's, relatively, expected at most "
                    f"{LOSS_TOLERANCE:g} and {GRADIENT_TOLERANCE:g}"
                )
            found.append(apart)
        return found
