"""Labelled texts, and how they are cut into training and test."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MANY, FEW = 100, 20
"""Classes with more and with fewer training samples than these are many- and few-shot, as Liu et al. 2019 have it."""


class Corpus(NamedTuple):
    """Texts and what they are."""

    texts: list[str]
    target: Tensor  # int64 [N], the class of each, or bool [N, C], its labels
    classes: list[str]
    groups: list[str]  # of each text; texts of a group are alike, so that none is in the test while one is trained on
    paths: list[tuple[str, ...]] | None  # of each class from the root of a tree
    source: str  # package and version, and a digest of texts and labels

    @property
    def several_labels(self) -> bool:
        return self.target.dim() == 2


class Split(NamedTuple):
    """Indices of texts, int64."""

    train: Tensor
    test: Tensor


def one_label(
    labelled: Iterable[tuple[str, str, str]], source: str, path_of: Callable[[str], Sequence[str]] | None
) -> Corpus:
    """A corpus of (text, class, group); classes are in alphabetical order, equal texts of a class are taken once."""
    unique = {(label, text): group for text, label, group in labelled}
    classes = sorted({label for label, _ in unique})
    index = {label: i for i, label in enumerate(classes)}
    return Corpus(
        texts=[text for _, text in unique],
        target=torch.tensor([index[label] for label, _ in unique]),
        classes=classes,
        groups=list(unique.values()),
        paths=None if path_of is None else [(*path_of(label), label) for label in classes],
        source=f"{source}, {digest(f'{label} {text}' for label, text in unique)}",
    )


def several_labels(labelled: Sequence[tuple[str, Iterable[str], str]], source: str) -> Corpus:
    """A corpus of (text, labels, group)."""
    classes = sorted({label for _, labels, _ in labelled for label in labels})
    index = {label: i for i, label in enumerate(classes)}
    target = torch.zeros(len(labelled), len(classes), dtype=torch.bool)
    for row, (_, labels, _) in enumerate(labelled):
        target[row, [index[label] for label in labels]] = True
    lines = (f"{' '.join(sorted(labels))} {text}" for text, labels, _ in labelled)
    return Corpus(
        *([text for text, _, _ in labelled], target, classes, [group for _, _, group in labelled], None),
        f"{source}, {digest(lines)}",
    )


def digest(lines: Iterable[str]) -> str:
    found = hashlib.sha256()
    for line in lines:
        found.update(f"{line}\n".encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:16]


def split(corpus: Corpus, share: float, seed: int) -> Split:
    """Holds out about a share of the groups, for the test; every class keeps some text to train on.

    Of one label a text, the share is that of each class's groups, at least one where it has two. A class of one group
    is in training alone: it competes, and is not tested.
    """
    chance = random.Random(seed)
    test = _test_rows(corpus, share, chance) if corpus.several_labels else _test_rows_by_class(corpus, share, chance)
    is_test = torch.zeros(len(corpus.texts), dtype=torch.bool)
    is_test[test] = True
    return Split((~is_test).nonzero().flatten(), is_test.nonzero().flatten())


def _test_rows_by_class(corpus: Corpus, share: float, chance: random.Random) -> list[int]:
    members: list[defaultdict[str, list[int]]] = [defaultdict(list) for _ in corpus.classes]
    for row, (label, group) in enumerate(zip(corpus.target.tolist(), corpus.groups, strict=True)):
        members[label][group].append(row)
    test: list[int] = []
    for of_class in members:
        groups = list(of_class.values())
        chance.shuffle(groups)
        held_out = max(1, round(share * len(groups))) if len(groups) > 1 else 0
        test += (row for group in groups[:held_out] for row in group)
    return test


def _test_rows(corpus: Corpus, share: float, chance: random.Random) -> list[int]:
    """Whole groups by chance; where a class would have no text left, one group that has it is trained on after all."""
    members: defaultdict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(corpus.groups):
        members[group].append(row)
    names = list(members)
    chance.shuffle(names)
    test = dict.fromkeys(names[: round(share * len(names))])
    left = corpus.target.sum(0)
    for name in test:
        left -= corpus.target[members[name]].sum(0)
    for label in (left == 0).nonzero().flatten().tolist():
        if left[label] == 0:
            name = next(name for name in test if corpus.target[members[name], label].any())
            del test[name]
            left += corpus.target[members[name]].sum(0)
    return [row for name in test for row in members[name]]


def thinned(corpus: Corpus, every: int) -> Corpus:
    """Every so many-th text, and the classes that are left."""
    rows = torch.arange(0, len(corpus.texts), every)
    target = corpus.target[rows]
    if corpus.several_labels:
        kept = target.any(0).nonzero().flatten()
        target = target[:, kept]
    else:
        kept, target = target.unique(return_inverse=True)
    indices = kept.tolist()
    return Corpus(
        [corpus.texts[i] for i in rows.tolist()],
        target,
        [corpus.classes[i] for i in indices],
        [corpus.groups[i] for i in rows.tolist()],
        None if corpus.paths is None else [corpus.paths[i] for i in indices],
        f"{corpus.source}, every text of {every}",
    )
