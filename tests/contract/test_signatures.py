"""Promise: signatures, which help and editors show, name every option of every function and module."""

from __future__ import annotations

import inspect
import typing

import pytest
import torch

import longtail

OPTIONS = set(inspect.signature(longtail.cross_entropy).parameters) - {"input", "target", "size_average", "reduce"}
FUNCTIONS = [longtail.focal_loss, longtail.complement_cross_entropy, longtail.linear_cross_entropy]
FUNCTIONS += [longtail.vocab_parallel_cross_entropy, longtail.vocab_parallel_linear_cross_entropy]
MODULES = {
    longtail.CrossEntropyLoss: longtail.cross_entropy,
    longtail.FocalLoss: longtail.focal_loss,
    longtail.ComplementCrossEntropyLoss: longtail.complement_cross_entropy,
    longtail.ComplementEntropyLoss: longtail.complement_entropy,
    longtail.SigmoidFocalLoss: longtail.sigmoid_focal_loss,
    longtail.SigmoidCrossEntropyLoss: longtail.sigmoid_cross_entropy,
    longtail.BinaryFocalLoss: longtail.binary_focal_loss,
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functions_name_what_they_take(function) -> None:
    parameters = inspect.signature(function).parameters
    renamed = {"focal_loss": {"focal_gamma"}, "complement_cross_entropy": {"complement_gamma"}}
    assert set(parameters) >= OPTIONS - renamed.get(function.__name__, set())
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'gama'"):
        function(*[None] * 3, gama=2.0)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_modules_name_what_their_functions_take(module) -> None:
    data = ("input", "target", "inputs", "targets")
    of_function = {n: p for n, p in inspect.signature(MODULES[module]).parameters.items() if n not in data}
    assert dict(inspect.signature(module).parameters) == of_function
    with pytest.raises(TypeError, match=r"takes .* positional arguments"):
        module(*[None] * 9)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_an_instance_shows_how_it_is_called(module) -> None:
    called = inspect.signature(torch.nn.Module().__call__)
    assert inspect.signature(module()) == called


def test_a_subclass_shows_its_own_constructor() -> None:
    class Warmed(longtail.FocalLoss):
        def __init__(self, warm_up: int) -> None:
            super().__init__(gamma=0.0)
            self.warm_up = warm_up

    class Again(Warmed):
        pass

    assert list(inspect.signature(Again).parameters) == ["warm_up"]
    assert Again(3).gamma == 0.0


def test_class_balanced_names_the_options_of_both_families() -> None:
    for what in (longtail.class_balanced_loss, longtail.ClassBalancedLoss):
        assert {"label_smoothing", "z_loss", "alpha", "pos_weight"} <= set(inspect.signature(what).parameters)
    assert "chunk_size" in inspect.signature(longtail.LinearCrossEntropyLoss).parameters


@pytest.mark.parametrize("name", longtail.functional.__all__)
def test_annotations_name_what_is_there(name: str) -> None:
    function = getattr(longtail.functional, name)
    assert {"target", "targets"} & set(typing.get_type_hints(function))


@pytest.mark.parametrize(
    "name", ["cross_entropy", "linear_cross_entropy", "CrossEntropyLoss", "LinearCrossEntropyLoss"]
)
def test_every_argument_of_torch_is_ours(name: str) -> None:
    """With its default; but for torch's record of how the linear loss is computed, ours are arguments of their own."""
    theirs = getattr(torch.nn if name.endswith("Loss") else torch.nn.functional, name, None)
    if theirs is None:
        pytest.skip("this torch has none")
    ours = inspect.signature(getattr(longtail, name)).parameters
    found = {parameter.name: parameter.default for parameter in inspect.signature(theirs).parameters.values()}
    found.pop("options", None)
    assert found == {argument: ours[argument].default for argument in found if argument in ours}
