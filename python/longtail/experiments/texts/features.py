"""Texts as bags of hashed n-grams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Bags = tuple[Tensor, Tensor]
"""A batch of bags: the n-grams of all, int32 [M], and where each bag begins, int32 [N]."""


class NGrams(NamedTuple):
    """What is hashed of a text: scikit-learn's ``analyzer`` ("word", "char_wb": within words), lengths, buckets."""

    analyzer: str
    shortest: int
    longest: int
    buckets: int


class HashedTexts:
    """The n-grams of every text, each once."""

    def __init__(self, texts: Sequence[str], kinds: Sequence[NGrams]) -> None:
        from scipy import sparse
        from sklearn.feature_extraction.text import HashingVectorizer

        found = [
            HashingVectorizer(
                analyzer=kind.analyzer,
                ngram_range=(kind.shortest, kind.longest),
                n_features=kind.buckets,
                norm=None,
                alternate_sign=False,
            ).transform(texts)
            for kind in kinds
        ]
        self.matrix: Any = sparse.hstack(found, format="csr")

    @property
    def buckets(self) -> int:
        return int(self.matrix.shape[1])

    def bags(self, rows: Tensor) -> Bags:
        """Of the texts ``rows`` [N]."""
        chosen = self.matrix[rows.numpy()]
        ids, starts = (torch.from_numpy(x).to(torch.int32) for x in (chosen.indices, chosen.indptr[:-1]))
        return ids, starts
