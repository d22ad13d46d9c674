"""A linear model over bags of n-grams, and Adam for its two kinds of gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..methods import Classifier
from .features import Bags


class BagOfNGrams(nn.Module):
    """The mean of the vectors of a text's n-grams, [N, D]; an empty bag is 0."""

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(buckets, width, mode="mean", sparse=True)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, bags: Bags) -> Tensor:
        ids, starts = bags
        vectors: Tensor = self.embedding(ids, starts)
        return vectors


def make_model(buckets: int, width: int, num_classes: int, seed: int) -> Classifier:
    """Bags to logits [N, C]."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return Classifier(BagOfNGrams(buckets, width), nn.Linear(width, num_classes))


def adam_of(model: Classifier) -> Callable[[list[dict[str, Any]]], Optimizer]:
    """Makes optimizers of the model's parameters in groups."""
    assert isinstance(model.features, BagOfNGrams)
    return functools.partial(SparseAndDenseAdam, sparse=model.features.embedding.weight)


class SparseAndDenseAdam(Optimizer):
    """Adam; embeddings move only where a batch has touched them (torch.optim.SparseAdam).

    Args:
        groups: of parameters, with learning rates that start from 1; embeddings are told by their table ``sparse``.
    """

    def __init__(self, groups: list[dict[str, Any]], sparse: Tensor) -> None:
        dense = [{**group, "params": [p for p in group["params"] if p is not sparse]} for group in groups]
        self.parts: tuple[Optimizer, ...] = (
            torch.optim.SparseAdam([sparse], lr=1.0),
            torch.optim.AdamW([group for group in dense if group["params"]], lr=1.0, weight_decay=0.0),
        )
        # The parts' own groups, so that a schedule reaches them.
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step(closure)
