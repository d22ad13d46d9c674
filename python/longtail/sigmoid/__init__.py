"""The sigmoid family: from options to the operators, and its autograd."""
