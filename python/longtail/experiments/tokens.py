"""A small language model over text with a Zipf tail: one objective three ways, and objectives against each other.

First three models advance together, a step each in turn: plain PyTorch, the loss fused, projection and loss fused.
They start from the same weights and read the same tokens: the first steps have to give them the same loss, and so,
with its gradients, any step at the same weights. Time and memory are theirs. Then one model for each of the other
objectives, all with the projection fused, same start and order.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ..class_balance import class_counts
from ..functional import linear_cross_entropy
from .output import Advance, Interrupted, Row, with_provenance
from .peak_memory import PeakMemory
from .tokens_data import UNKNOWN_ID, Corpus
from .tokens_model import WIDTH, LanguageModel, Objective, cross_entropies, variants

SEQUENCES, LENGTH = 16, 64  # of a batch
LEARNING_RATE, EPSILON = 0.03, 1e-4  # of Adam; chosen for cross-entropy alone, on a seed that is not the default
WARM_UP = 0.1  # of the steps
HELD_OUT_SEQUENCES = 1024
HEAD_RANK, MID_RANK = 128, 1024
EARLY_STEPS, EARLY_TOLERANCE = 40, 1e-4
"""Of equal objectives: relative difference of the losses in the first steps, each model at its own weights. Later the
paths part, as those of any two orders of summation do: training amplifies the last digit."""
CHECK_EVERY, LOSS_TOLERANCE, GRADIENT_TOLERANCE = 20, 1e-5, 1e-4
"""At the weights of plain PyTorch's model, every so many steps: loss, and norm of the gradients' difference."""


class UnequalLosses(AssertionError):
    """Two ways to compute one objective disagree."""


class Apart(NamedTuple):
    """Largest relative differences to plain PyTorch at the same weights."""

    loss: float
    gradient: float


class Learner:
    """One objective and the model that is trained with it."""

    def __init__(self, objective: Objective, corpus: Corpus, steps: int, seed: int) -> None:
        self.objective, self.steps = objective, steps
        self.model = LanguageModel(len(corpus.vocabulary), seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, eps=EPSILON, fused=True)
        self.learning_rate = LambdaLR(self.optimizer, self._share_of_learning_rate)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.peak: int | None = None  # bytes of one step
        self.apart = Apart(0.0, 0.0)

    def step(self, tokens: Tensor) -> None:
        """One step on [B, T + 1] tokens."""
        start = time.perf_counter()
        self._update(tokens)
        self.learning_rate.step()
        self.seconds.append(time.perf_counter() - start)

    def _share_of_learning_rate(self, step: int) -> float:
        """Rises over the first steps, then falls in a line: 0 after the last one."""
        warm_up = max(1, round(WARM_UP * self.steps))
        return min((step + 1) / warm_up, (self.steps - step) / max(1, self.steps - warm_up))

    def _update(self, tokens: Tensor) -> None:
        self.optimizer.zero_grad()
        hidden = self.model(tokens[:, :-1])
        loss = self.objective.loss(hidden, self.model.embedding.weight, tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def loss_and_gradients(self, model: LanguageModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and all gradients in one vector, at another model's weights, which stay as they are."""
        hidden = model(tokens[:, :-1])
        loss = self.objective.loss(hidden, model.embedding.weight, tokens[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    def measure_memory(self, tokens: Tensor) -> None:
        """Peak memory of one more step, beyond model and optimizer; after the last step it changes nothing."""
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
        UnequalLosses: loss or gradients are not those of plain PyTorch.
    """
    learners = [Learner(objective, corpus, steps, seed) for objective in cross_entropies()]
    for i, tokens in enumerate(batches(corpus.train, steps, seed)):
        if i % CHECK_EVERY == 0:
            check_at_the_same_weights(learners, tokens)
        for learner in learners[i % len(learners) :] + learners[: i % len(learners)]:
            learner.step(tokens)
            advance(f"step {i + 1} of {steps}: {learner.objective.implementation}")
        for learner in learners[1:] if i < EARLY_STEPS else ():
            _check(learner, f"loss of step {i + 1}", loss_difference(learners[0], learner, i), EARLY_TOLERANCE)
    last = next(batches(corpus.train, 1, seed))
    for learner in learners:
        learner.measure_memory(last)
    return learners


def check_at_the_same_weights(learners: list[Learner], tokens: Tensor) -> None:
    """Compares loss and gradients of all learners at the first one's weights, and keeps the largest differences."""
    first, *others = learners
    loss, gradient = first.loss_and_gradients(first.model, tokens)
    for learner in others:
        own_loss, own_gradient = learner.loss_and_gradients(first.model, tokens)
        found = Apart(
            ((own_loss - loss).abs() / loss).item(), ((own_gradient - gradient).norm() / gradient.norm()).item()
        )
        where = f"at the weights of step {len(first.losses) + 1}"
        _check(learner, f"loss {where}", found.loss, LOSS_TOLERANCE)
        _check(learner, f"gradient {where}", found.gradient, GRADIENT_TOLERANCE)
        learner.apart = Apart(max(found.loss, learner.apart.loss), max(found.gradient, learner.apart.gradient))


def loss_difference(first: Learner, other: Learner, step: int) -> float:
    """Relative difference of their losses at a step, each at its own weights."""
    return abs(first.losses[step] - other.losses[step]) / abs(first.losses[step])


def _check(learner: Learner, what: str, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:  # NaN too
        raise UnequalLosses(
            f"{learner.objective.implementation}: the {what} is {difference:.2g} off plain PyTorch's, relatively, "
            f"expected at most {tolerance:g}"
        )


def train_variants(corpus: Corpus, steps: int, seed: int, advance: Advance) -> Iterator[Learner]:
    """The other objectives, one after the other."""
    for objective in variants(class_counts(corpus.train, len(corpus.vocabulary))):
        learner = Learner(objective, corpus, steps, seed)
        for i, tokens in enumerate(batches(corpus.train, steps, seed)):
            learner.step(tokens)
            advance(f"step {i + 1} of {steps}: {objective.name}")
        yield learner


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


def run(corpus: Corpus, steps: int, seed: int, advance: Advance, sequences: int = HELD_OUT_SEQUENCES) -> list[Row]:
    """Trains and evaluates every model; a row for each, and way of evaluating it.

    Raises:
        UnequalLosses: loss or gradients of a fused loss are not those of plain PyTorch.
        Interrupted: by Ctrl-C, with the rows of the models that were evaluated by then.
    """
    rows: list[Row] = []
    try:
        together = train_together(corpus, steps, seed, advance)
        others = train_variants(corpus, steps, seed, advance)  # each is trained when its turn comes
        for learner in itertools.chain(together, others):
            rows += rows_of(corpus, learner, together, seed, sequences)
    except KeyboardInterrupt:
        raise Interrupted(rows, f"{len(rows)} rows, of the models trained so far,") from None
    return rows


def rows_of(corpus: Corpus, learner: Learner, together: list[Learner], seed: int, sequences: int) -> list[Row]:
    """A row for each way of evaluating a model: the raw softmax, and with log-priors where there are any."""
    rows = []
    for prior in (None,) if learner.objective.prior is None else (None, learner.objective.prior):
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
    names = ("step_ms", "tokens_per_second", "peak_extra_MB")
    differences = ("loss_difference", "gradient_difference", "early_loss_difference", "any_loss_difference")
    if learner not in together:
        return dict.fromkeys((*names, *differences))
    seconds = statistics.median(learner.seconds)
    peak = None if learner.peak is None else learner.peak / 1e6
    apart = [loss_difference(together[0], learner, step) for step in range(learner.steps)]
    return {
        **dict(zip(names, (1e3 * seconds, SEQUENCES * LENGTH / seconds, peak), strict=True)),
        **dict(zip(differences, (*learner.apart, max(apart[:EARLY_STEPS]), max(apart)), strict=True)),
    }
