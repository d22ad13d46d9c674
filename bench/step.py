"""A training step of a small language model with a large vocabulary.

The same model, weights and tokens three times: plain PyTorch, the fused loss on the logits, and the fused linear loss,
which never makes them. Losses and gradients are compared before anything is timed. Memory is the peak above the weights
and their gradients; the largest batch is the largest power of two whose measured peak fits in the budget.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import longtail
from longtail.experiments.command_line import Parser, positive_int
from longtail.experiments.output import print_table
from longtail.experiments.peak_memory import PeakMemory, return_freed_memory

from . import results
from .measure import TOLERANCE, CpuClock, CudaClock, Mismatch

FEATURES, LENGTH, VOCABULARY = 256, 256, 128256
SMALLEST_BATCH = 256

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states [N, D], weight [C, D] and targets [N] to a mean loss."""

CONTENDERS: dict[str, Loss] = {
    "plain PyTorch": lambda x, weight, target: F.cross_entropy(x @ weight.T, target),
    "fused loss": lambda x, weight, target: longtail.cross_entropy(x @ weight.T, target, gradient="inplace"),
    "fused linear loss": longtail.linear_cross_entropy,
}


class LanguageModel(nn.Module):
    """Two causal transformer layers; the embedding is also the head."""

    def __init__(self, vocabulary: int, features: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, features)
        nn.init.normal_(self.embedding.weight, std=features**-0.5)
        layer = nn.TransformerEncoderLayer(features, 4, 4 * features, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(features), enable_nested_tensor=False)

    def forward(self, tokens: Tensor, target: Tensor, loss: Loss) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        hidden = self.layers(self.embedding(tokens), mask, is_causal=True)
        return loss(hidden.flatten(0, 1), self.embedding.weight, target.flatten())


@dataclass(frozen=True)
class Row:
    """One contender. Times are of forward, backward and update; MB are decimal."""

    section: str
    device: str
    dtype: str
    N: int  # tokens in a batch
    D: int
    C: int
    contender: str
    rounds: int
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    speedup_over_plain: float | None
    peak_extra_MB: float | None  # beyond weights and gradients
    budget_MB: float
    largest_batch: int | None  # tokens, a power of two
    largest_tried: int


class Trainer:
    """A model with its optimizer and data; every contender trains the same."""

    def __init__(self, device: torch.device, vocabulary: int) -> None:
        torch.manual_seed(0)
        self.device, self.vocabulary = device, vocabulary
        self.model = LanguageModel(vocabulary, FEATURES).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)  # the same weights for every contender
        self.clock: Any = CudaClock() if device.type == "cuda" else CpuClock()

    def batch(self, size: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(size)
        shape = (max(1, size // LENGTH), min(size, LENGTH) + 1)
        return torch.randint(self.vocabulary, shape, generator=generator, device=self.device)

    def step(self, loss: Loss, tokens: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=False)
        value: Tensor = self.model(tokens[:, :-1], tokens[:, 1:], loss)
        value.backward()
        self.optimizer.step()
        return value.detach()

    def result(self, loss: Loss, tokens: Tensor) -> list[Tensor]:
        value = self.step(loss, tokens)
        return [value, *(p.grad.clone() for p in self.model.parameters() if p.grad is not None)]

    def seconds(self, loss: Loss, tokens: Tensor) -> float:
        start = self.clock.start()
        self.step(loss, tokens)
        seconds: float = self.clock.seconds(start, self.clock.mark())
        return seconds

    def peak(self, loss: Loss, tokens: Tensor) -> int | None:
        with PeakMemory(self.device) as peak:
            self.step(loss, tokens)
        return peak.extra


def compare(trainer: Trainer, tokens: Tensor) -> None:
    """Raises ``Mismatch`` where a contender's loss or gradients are not those of the first."""
    first: list[Tensor] = []
    loss_bound, grad_bound = TOLERANCE[torch.float32]
    for name, loss in CONTENDERS.items():
        result = trainer.result(loss, tokens)
        first = first or result
        for i, (got, want) in enumerate(zip(result, first, strict=True)):
            error = ((got - want).norm() / want.norm()).item()
            if not error <= (grad_bound if i else loss_bound):
                raise Mismatch(f"{name}: {'gradient' if i else 'loss'} differs by {error:.2g} of it")


def largest_batch(trainer: Trainer, loss: Loss, budget: int, most: int) -> int | None:
    """The largest power of two of tokens, up to ``most``, whose step stays within ``budget`` bytes."""
    fitting = None
    for exponent in range(int(math.log2(SMALLEST_BATCH)), int(math.log2(most)) + 1):
        peak = trainer.peak(loss, trainer.batch(1 << exponent))
        if peak is None or peak > budget:
            break
        fitting = 1 << exponent
    return fitting


def measure(size: int, rounds: int, budget: int, most: int, vocabulary: int, device: torch.device) -> list[Row]:
    """Compares, times in turn, then measures memory."""
    trainer = Trainer(device, vocabulary)
    tokens = trainer.batch(size)
    compare(trainer, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample([*CONTENDERS], len(CONTENDERS)):
            seconds[name].append(trainer.seconds(CONTENDERS[name], tokens))
    return_freed_memory()
    rows = []
    plain = results.quantiles(seconds["plain PyTorch"])[1]
    for name, loss in CONTENDERS.items():
        p20, median, p80 = results.quantiles(seconds[name])
        peak = trainer.peak(loss, tokens)
        rows.append(
            Row(
                section="step",
                device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                dtype="float32",
                N=size,
                D=FEATURES,
                C=vocabulary,
                contender=name,
                rounds=rounds,
                median_ms=median,
                p20_ms=p20,
                p80_ms=p80,
                speedup_over_plain=results.ratio(plain, median),
                peak_extra_MB=None if peak is None else peak / 1e6,
                budget_MB=budget / 1e6,
                largest_batch=largest_batch(trainer, loss, budget, most),
                largest_tried=most,
            )
        )
    return rows


def _show(rows: Sequence[Row]) -> None:
    first = rows[0]
    memory = ("extra MB", f"tokens in {first.budget_MB:.0f} MB")
    lines = []
    for row in rows:
        times = [f"{ms:.0f}" if ms is not None else "" for ms in (row.median_ms, row.p20_ms, row.p80_ms)]
        peak = "" if row.peak_extra_MB is None else f"{row.peak_extra_MB:.0f}"
        more = ">= " if row.largest_batch == row.largest_tried else ""
        lines.append((row.contender, *times, f"{row.speedup_over_plain:.2f}", peak, f"{more}{row.largest_batch}"))
    title = f"a step of {first.N} tokens, vocabulary {first.C}, on {first.device}"
    print_table(title, (("contender",), ("ms", "20 %", "80 %", "over plain"), memory), lines)


def add_options(parser: Parser) -> None:
    parser.add_argument("--tokens", type=int, default=1024, help="in the timed batch")
    parser.add_argument("--rounds", type=positive_int, default=7, help="default: %(default)s")
    parser.add_argument("--budget", type=int, default=1000, help="MB for the largest batch")
    parser.add_argument("--most", type=int, default=16384, help="tokens of the largest batch tried")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=results.csv_file, default=results.FOLDER / "step.csv", help="the CSV")


def run(arguments: argparse.Namespace, _parser: Parser) -> None:
    a = arguments
    rows = measure(a.tokens, a.rounds, a.budget * 10**6, a.most, a.vocabulary, torch.device(a.device))
    results.write(a.output, rows)
    _show(rows)
    print(f"wrote {a.output}")
