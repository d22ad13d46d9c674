"""ZLPR and the two-way loss: from options to the operators, and their autograd."""
