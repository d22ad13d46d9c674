"""One training step by number of classes: places to ever smaller regions, two losses in plain PyTorch and fused."""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...class_balance import class_counts, effective_number_weight, logit_adjustment
from ...functional import cross_entropy, linear_cross_entropy
from ..methods import Classifier
from ..output import Advance, Row, with_provenance
from ..peak_memory import PeakMemory, return_freed_memory
from ..plain_losses import softmax_loss
from ..pool import in_processes
from ..tokens import GRADIENT_TOLERANCE, LOSS_TOLERANCE, UnequalLosses
from .features import Bags
from .model import adam_of, make_model
from .settings import SETTINGS
from .training import load

EXPERIMENT = "places"
CLASSES, QUICK_CLASSES = (100, 1000, 10_000, 100_000), (100, 1000)
THREADS, BATCH, SEED = 2, 1024, 0
LEAST_STEPS, MOST_STEPS, LOGITS_COLUMNS = 8, 32, 200_000
"""Steps of each implementation: ``LOGITS_COLUMNS`` over the classes, within these; the first is not timed."""
QUICK_STEPS = 3
BETA, FOCAL_GAMMA, COMPLEMENT_GAMMA = 0.999, 1.0, -1.0

Loss = Callable[[Tensor, Classifier, Tensor], Tensor]
"""Of features [N, D], the model with its head, and target [N]."""


class Contender(NamedTuple):
    """A loss in one implementation."""

    loss: str
    implementation: str
    compute: Loss


class Difference(NamedTuple):
    """Largest relative differences to plain PyTorch at the same weights."""

    loss: float = 0.0
    gradient: float = 0.0


def timed_steps(classes: int, quick: bool) -> int:
    return QUICK_STEPS if quick else max(LEAST_STEPS, min(MOST_STEPS, LOGITS_COLUMNS // classes))


def units(classes: int, quick: bool) -> int:
    """Steps of all contenders."""
    return timed_steps(classes, quick) * sum(map(len, contenders(torch.ones(classes))))


def merged_or_split(region: Tensor, classes: int) -> Tensor:
    """The class of each place, [N]: a contiguous range of regions, or of places sorted by region where regions are few.

    Raises:
        ValueError: there are fewer places than classes.
    """
    places, regions = region.numel(), int(region.max()) + 1
    if classes > places:
        raise ValueError(f"{places} places cannot be {classes} classes")
    if classes <= regions:
        return region * classes // regions
    target = torch.empty_like(region)
    target[region.argsort(stable=True)] = torch.arange(places) * classes // places
    return target


def contenders(counts: Tensor) -> list[list[Contender]]:
    """Of each loss: plain PyTorch, the loss fused, projection and loss fused. counts [C]."""
    options = {
        "weight": effective_number_weight(counts, BETA),
        "class_bias": logit_adjustment(counts),
        "focal_gamma": FOCAL_GAMMA,
        "complement_gamma": COMPLEMENT_GAMMA,
    }
    every = "class-balanced softmax focal + complement, logit adjustment"
    return [
        _three("cross-entropy", "F.cross_entropy", F.cross_entropy, {}),
        _three(every, "PyTorch operations", softmax_loss, options),
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

    def __init__(self, buckets: int, classes: int) -> None:
        self.classes, setting = classes, SETTINGS[EXPERIMENT]
        self.model = make_model(buckets, setting.width, classes, SEED)
        self.optimizer = adam_of(self.model)([{"params": [*self.model.parameters()], "weight_decay": 0.0}])
        for group in self.optimizer.param_groups:
            group["lr"] = setting.learning_rate

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


def run(classes: tuple[int, ...], quick: bool, advance: Advance) -> list[Row]:
    """A row for each number of classes, loss and implementation.

    Raises:
        UnequalLosses: loss or gradients of a fused loss are not those of plain PyTorch.
        ValueError: there are fewer places than classes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        rows = [row for number in classes for row in _timed(number, quick, advance)]
    finally:
        torch.set_num_threads(threads)
    steps = [_step_of(number, quick) for number in classes]
    with contextlib.closing(in_processes(steps, peaks, 1)) as found:
        of_rows = itertools.chain.from_iterable(found)
        for row, peak in zip(rows, of_rows, strict=True):
            row["peak_extra_MB"] = None if peak is None else peak / 1e6
    return rows


def _timed(classes: int, quick: bool, advance: Advance) -> Iterator[Row]:
    corpus, target = load(EXPERIMENT, quick).corpus, target_of(classes, quick)
    counts = class_counts(target, classes)
    facts: Row = {"data": corpus.source, "regions": len(corpus.classes)}
    facts |= {"largest": int(counts.max()), "rarest": int(counts.min())}
    for rivals in contenders(counts):
        for row in measure(rivals, target, classes, quick, advance):
            yield with_provenance({"experiment": "growth", "part": "speed", **row, **facts}, threads=THREADS)


class Step(NamedTuple):
    """What a step needs."""

    buckets: int
    counts: Tensor  # [C]
    bags: Bags
    target: Tensor


def _step_of(classes: int, quick: bool) -> Step:
    texts, target = load(EXPERIMENT, quick).texts, target_of(classes, quick)
    (rows,) = batches_of(target, 1)
    return Step(texts.buckets, class_counts(target, classes), texts.bags(rows), target[rows])


def peaks(step: Step) -> list[int | None]:
    """Of every contender, after a step whose memory is not counted; for a process of its own.

    In one that has freed much, malloc takes blocks from what it kept, and a peak says nothing.
    """
    return_freed_memory()
    torch.set_num_threads(THREADS)
    found = []
    for rivals in contenders(step.counts):
        learner = Learner(step.buckets, step.counts.numel())
        for contender in rivals:
            learner.loss_and_gradients(contender, step.bags, step.target)
            gc.collect()
            found.append(learner.peak(contender, step.bags, step.target))
    return found


def target_of(classes: int, quick: bool) -> Tensor:
    return merged_or_split(load(EXPERIMENT, quick).corpus.target, classes)


def batches_of(target: Tensor, steps: int) -> Tensor:
    """Rows of texts, [steps, BATCH]; the first are the same for any number of steps."""
    return torch.randint(target.numel(), (steps, BATCH), generator=torch.Generator().manual_seed(SEED))


def measure(rivals: list[Contender], target: Tensor, classes: int, quick: bool, advance: Advance) -> Iterator[Row]:
    """Medians of steps that take turns in an order that rotates; results compared before and after them."""
    texts, steps = load(EXPERIMENT, quick).texts, timed_steps(classes, quick)
    learner, batches = Learner(texts.buckets, classes), batches_of(target, steps)
    first = texts.bags(batches[0]), target[batches[0]]
    before = learner.differences(rivals, *first)
    seconds: dict[Contender, list[tuple[float, float]]] = {contender: [] for contender in rivals}
    for i, rows in enumerate(batches):
        bags, labels = texts.bags(rows), target[rows]
        for contender in rivals[i % len(rivals) :] + rivals[: i % len(rivals)]:
            seconds[contender].append(learner.timed_step(contender, bags, labels))
            advance(f"{classes} classes, {contender.loss}: {contender.implementation}")
    after = learner.differences(rivals, *first)
    for contender, *apart in zip(rivals, before, after, strict=True):
        step, optimizer = (1e3 * statistics.median(times) for times in zip(*seconds[contender][1:], strict=True))
        yield {
            "classes": classes,
            "loss": contender.loss,
            "implementation": contender.implementation,
            "step_ms": step,
            "optimizer_ms": optimizer,
            "peak_extra_MB": None,
            "loss_difference": max(difference.loss for difference in apart),
            "gradient_difference": max(difference.gradient for difference in apart),
            "steps": steps - 1,
            "batch_size": BATCH,
            "width": SETTINGS[EXPERIMENT].width,
        }
