"""A small language model over text with a Zipf tail: one objective three ways, and objectives against each other.

First three models advance together, a step each in turn: plain PyTorch, the loss fused, projection and loss fused.
They start from the same weights and read the same tokens, so that every step has to give them the same loss; time and
memory are theirs. Then one model for each of the other objectives, all with the projection fused, same start and order.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..class_balance import class_counts, effective_number_weight, logit_adjustment
from ..functional import cross_entropy
from ..linear_cross_entropy import linear_cross_entropy
from ..peak_memory import PeakMemory
from .output import Advance, Row, with_provenance
from .tokens_data import UNKNOWN_ID, Corpus

WIDTH = 64
SEQUENCES, LENGTH = 16, 64  # of a batch
LEARNING_RATE, EPSILON = 0.03, 1e-4  # of Adam; chosen for cross-entropy alone, on a seed that is not the default
WARM_UP = 0.1  # of the steps
HELD_OUT_SEQUENCES = 1024
HEAD_RANK, MID_RANK = 128, 1024
TOLERANCE = 1e-3
"""Largest relative difference between the losses of equal objectives at any step."""


class UnequalLosses(AssertionError):
    """Two ways to compute one objective disagree."""


class Objective(NamedTuple):
    """A loss on hidden states [N, D], output weights [V, D] and the next tokens [N]."""

    name: str
    implementation: str
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    prior: Tensor | None = None  # log-priors [V] that belong to the logits as a model of the text


class LanguageModel(nn.Module):
    """A GRU between an embedding and the same embedding as output layer; most of its work is that layer.

    Args:
        vocabulary_size: V.
        seed: of the initialisation.
    """

    def __init__(self, vocabulary_size: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary_size, WIDTH)
            nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)
            self.layer = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] to hidden states [B * T, WIDTH]."""
        hidden, _ = self.layer(self.embedding(tokens) * WIDTH**0.5)
        flat: Tensor = hidden.flatten(0, 1)
        return flat


def cross_entropies() -> list[Objective]:
    """Cross-entropy three ways; the first is the one that the others have to equal."""

    def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), target)

    def fused(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = cross_entropy(F.linear(hidden, weight), target, gradient="inplace")
        return loss

    return [
        Objective("cross-entropy", "F.cross_entropy", plain),
        Objective("cross-entropy", "longtail.cross_entropy", fused),
        Objective("cross-entropy", "longtail.linear_cross_entropy", linear_cross_entropy),
    ]


def variants(counts: Tensor) -> list[Objective]:
    """The objectives for long tails; counts [V] are of the training text."""

    def objective(name: str, prior: Tensor | None = None, **options: Any) -> Objective:
        def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            value: Tensor = linear_cross_entropy(hidden, weight, target, **options)
            return value

        return Objective(name, "longtail.linear_cross_entropy", loss, prior)

    def weights(beta: float) -> dict[str, Any]:
        return {"weight": effective_number_weight(counts, beta, "clamp"), "normalizer": "count"}

    prior = logit_adjustment(counts, 1.0, "clamp")
    return [
        objective("logit adjustment, tau 1", prior, class_bias=prior),
        objective("class-balanced, beta 0.9", **weights(0.9)),
        objective("class-balanced, beta 0.9999", **weights(0.9999)),
        objective("complement cross-entropy", complement_gamma=-1.0),
        objective("softmax focal, gamma 1", focal_gamma=1.0),
    ]


class Learner:
    """One objective and the model that is trained with it."""

    def __init__(self, objective: Objective, corpus: Corpus, steps: int, seed: int) -> None:
        self.objective, self.steps = objective, steps
        self.model = LanguageModel(len(corpus.vocabulary), seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, eps=EPSILON, fused=True)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.peak: int | None = None  # bytes of one step

    def step(self, tokens: Tensor) -> None:
        """One step on [B, T + 1] tokens; the learning rate rises over the first steps, then falls to 0 in a line."""
        start = time.perf_counter()
        done, warm_up = len(self.losses), max(1, round(WARM_UP * self.steps))
        rate = min((done + 1) / warm_up, (self.steps - done) / max(1, self.steps - warm_up))
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        self._update(tokens)
        self.seconds.append(time.perf_counter() - start)

    def _update(self, tokens: Tensor) -> None:
        self.optimizer.zero_grad()
        hidden = self.model(tokens[:, :-1])
        loss = self.objective.loss(hidden, self.model.embedding.weight, tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def measure_memory(self, tokens: Tensor) -> None:
        """Peak memory of one more step, beyond what model and optimizer hold; leaves losses and times as they are."""
        self.optimizer.zero_grad()
        gc.collect()
        with PeakMemory(torch.device("cpu")) as peak:
            self._update(tokens)
        self.losses.pop()
        self.peak = peak.extra


def batches(tokens: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Random windows [SEQUENCES, LENGTH + 1] of the text, the same for every model of a seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(tokens.numel() - LENGTH, (SEQUENCES, 1), generator=generator)
        yield tokens[starts + torch.arange(LENGTH + 1)]


def train_together(corpus: Corpus, steps: int, seed: int, advance: Advance) -> list[Learner]:
    """The three cross-entropies, a step each in an order that rotates.

    Raises:
        UnequalLosses: at some step a loss is not that of plain PyTorch.
    """
    learners = [Learner(objective, corpus, steps, seed) for objective in cross_entropies()]
    for i, tokens in enumerate(batches(corpus.train, steps, seed)):
        for learner in learners[i % len(learners) :] + learners[: i % len(learners)]:
            learner.step(tokens)
            advance(f"step {i + 1} of {steps}: {learner.objective.implementation}")
        for learner in learners[1:]:
            largest_difference(learners[0], learner)
    last = next(batches(corpus.train, 1, seed))
    for learner in learners:
        learner.measure_memory(last)
    return learners


def largest_difference(first: Learner, other: Learner) -> float:
    """Largest relative difference between their losses, step by step.

    Raises:
        UnequalLosses: it exceeds ``TOLERANCE``.
    """
    largest = 0.0
    for i, (a, b) in enumerate(zip(first.losses, other.losses, strict=True)):
        difference = abs(a - b) / abs(a)
        if not difference <= TOLERANCE:  # NaN too
            raise UnequalLosses(
                f"step {i + 1}: {other.objective.implementation} has loss {b!r}, {first.objective.implementation} {a!r}"
            )
        largest = max(largest, difference)
    return largest


def train_variants(corpus: Corpus, steps: int, seed: int, advance: Advance) -> list[Learner]:
    """The other objectives, one after the other."""
    learners = []
    for objective in variants(class_counts(corpus.train, len(corpus.vocabulary))):
        learner = Learner(objective, corpus, steps, seed)
        for i, tokens in enumerate(batches(corpus.train, steps, seed)):
            learner.step(tokens)
            advance(f"step {i + 1} of {steps}: {objective.name}")
        learners.append(learner)
    return learners


class Scores(NamedTuple):
    """Of one group of held-out tokens."""

    perplexity: float
    accuracy: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: LanguageModel, corpus: Corpus, prior: Tensor | None = None, sequences: int = HELD_OUT_SEQUENCES
) -> dict[str, Scores]:
    """Perplexity and accuracy on evenly spaced held-out windows, by the rank of the token in the training text.

    The logits are the model's own; ``prior`` [V] is added to them. Tokens outside of the vocabulary are context alone.
    """
    length = min(LENGTH, corpus.held_out.numel() - 1)
    starts = torch.linspace(0, corpus.held_out.numel() - length - 1, sequences).long()
    log_probs, correct, targets = [], [], []
    for block in starts.split(SEQUENCES):
        tokens = corpus.held_out[block[:, None] + torch.arange(length + 1)]
        target = tokens[:, 1:].flatten()
        weight = model.embedding.weight
        _, stats = linear_cross_entropy(
            *(model(tokens[:, :-1]), weight, target), class_bias=prior, reduction="none", return_stats=True
        )
        log_probs.append(stats.log_prob)
        correct.append(stats.correct)
        targets.append(target)
    rank, log_prob, hit = torch.cat(targets), torch.cat(log_probs).double(), torch.cat(correct).double()
    groups = {
        "overall": rank != UNKNOWN_ID,
        "head": (rank != UNKNOWN_ID) & (rank <= HEAD_RANK),
        "mid": (rank > HEAD_RANK) & (rank <= MID_RANK),
        "tail": rank > MID_RANK,
    }
    return {
        name: Scores((-log_prob[mask].mean()).exp().item(), hit[mask].mean().item(), int(mask.sum()))
        for name, mask in groups.items()
    }


def rows_of(
    corpus: Corpus, together: list[Learner], others: list[Learner], seed: int, sequences: int = HELD_OUT_SEQUENCES
) -> list[Row]:
    """A row for each model and way of evaluating it: the raw softmax, and with log-priors where there are any."""
    rows = []
    for learner in together + others:
        for prior in [None] if learner.objective.prior is None else [None, learner.objective.prior]:
            row = _settings(corpus, learner, seed)
            row["evaluated"] = "softmax of the logits" if prior is None else "softmax of logits + log-priors"
            for name, scores in evaluate(learner.model, corpus, prior, sequences).items():
                row |= {f"perplexity_{name}": scores.perplexity, f"accuracy_{name}": scores.accuracy}
                row[f"held_out_{name}"] = scores.tokens
            row |= _speed(learner, together)
            rows.append(with_provenance(row))
    return rows


def _settings(corpus: Corpus, learner: Learner, seed: int) -> Row:
    return {
        "experiment": "tokens",
        "objective": learner.objective.name,
        "implementation": learner.objective.implementation,
        "seed": seed,
        "steps": learner.steps,
        "tokens_per_step": SEQUENCES * LENGTH,
        "width": WIDTH,
        "learning_rate": LEARNING_RATE,
        "vocabulary": len(corpus.vocabulary),
        "train_tokens": corpus.train.numel(),
        "train_coverage": corpus.coverage(corpus.train),
        "held_out_coverage": corpus.coverage(corpus.held_out),
        "corpus": corpus.digest,
        "last_losses": statistics.fmean(learner.losses[-20:]),
    }


def _speed(learner: Learner, together: list[Learner]) -> Row:
    """Time, memory and agreement of the models that advanced together; empty for the others."""
    if learner not in together:
        return dict.fromkeys(("step_ms", "tokens_per_second", "peak_extra_MB", "largest_loss_difference"))
    seconds = statistics.median(learner.seconds)
    return {
        "step_ms": 1e3 * seconds,
        "tokens_per_second": SEQUENCES * LENGTH / seconds,
        "peak_extra_MB": None if learner.peak is None else learner.peak / 1e6,
        "largest_loss_difference": largest_difference(together[0], learner),
    }
