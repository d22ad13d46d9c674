"""The language model of the tokens experiment, and the objectives that it is trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..class_balance import effective_number_weight, logit_adjustment
from ..functional import cross_entropy, linear_cross_entropy

WIDTH = 64


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
    """The objectives for long tails; counts [V] are of the training text.

    The published beta of 0.9999 is left out: on these counts it is nearly inverse frequency, and in short runs the
    model stayed at chance. The class-balanced means divide by the sum of the weights: those of frequent tokens are so
    small that dividing by the number of tokens would leave gradients below Adam's epsilon.
    """

    def objective(name: str, prior: Tensor | None = None, **options: Any) -> Objective:
        def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            value: Tensor = linear_cross_entropy(hidden, weight, target, **options)
            return value

        return Objective(name, "longtail.linear_cross_entropy", loss, prior)

    prior = logit_adjustment(counts, 1.0, "clamp")
    return [
        objective("logit adjustment, tau 1", prior, class_bias=prior),
        objective("class-balanced softmax, beta 0.9", weight=effective_number_weight(counts, 0.9, "clamp")),
        objective("class-balanced softmax, beta 0.99", weight=effective_number_weight(counts, 0.99, "clamp")),
        objective("complement cross-entropy", complement_gamma=-1.0),
        objective("softmax focal, gamma 1", focal_gamma=1.0),
    ]
