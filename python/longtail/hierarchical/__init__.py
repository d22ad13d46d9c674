"""Hierarchical cross-entropy: from options to the operators, and its autograd."""
