"""The tree of classes of the hierarchical losses: one for each number of classes, wherever it is used."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import longtail
from longtail.experiments.plain_losses import Level, level_of

DEPTH = 4
"""Nodes from below the root down to a class, which is the last of them."""


@dataclass(frozen=True)
class Tree:
    """One tree, as longtail takes it and as tables for others."""

    hierarchy: longtail.Hierarchy
    levels: tuple[Level, ...]
    """From below the root down to the nodes above the classes."""


def widths(classes: int) -> list[int]:
    """Positions that a node of each depth spans: so that each has about as many children, 13 of 32768 classes."""
    branching, found = round(classes ** (1 / DEPTH)), [classes]
    while len(found) < DEPTH:
        found.append(-(-found[-1] // branching))
    return [*found[1:], 1]


def of_classes(classes: int, device: torch.device, shuffled: bool = False) -> Tree:
    """The tree of so many classes, numbered along it, or shuffled, always in the same way."""
    position = torch.arange(classes)
    if shuffled:
        position = torch.randperm(classes, generator=torch.Generator().manual_seed(0))
    # A span that ends within another's is a node in each: names of nodes are those of the path down to them.
    names = torch.stack([position // width for width in widths(classes)], 1)
    levels = [level_of(names[:, :depth].unique(dim=0, return_inverse=True)[1]) for depth in range(1, DEPTH)]
    hierarchy = longtail.Hierarchy.from_paths(names.tolist())
    return Tree(hierarchy.to(device), tuple(Level(*(table.to(device) for table in level)) for level in levels))
