"""Hierarchical cross-entropy: the tree over the classes, from options to the operators, and its autograd."""

from .hierarchy import Hierarchy, HierarchyTables

__all__ = ["Hierarchy", "HierarchyTables"]
