"""Aids for training on long-tailed data: the published subsets, and accuracy by class frequency."""

from .long_tail import LongTailAccuracy, LongTailScores, long_tailed_counts, long_tailed_indices

__all__ = ["LongTailAccuracy", "LongTailScores", "long_tailed_counts", "long_tailed_indices"]
