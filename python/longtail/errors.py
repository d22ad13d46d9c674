"""Exceptions for bad arguments: Python's usual types, and also what ``F.cross_entropy`` raises for the same fault."""


class ArgumentValueError(ValueError, RuntimeError):
    """A shape, device or value that does not fit."""


class ArgumentTypeError(TypeError, NotImplementedError):
    """A type or dtype that does not fit. NotImplementedError is a RuntimeError."""
