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
    longtail.PolyCrossEntropyLoss: longtail.poly_cross_entropy,
    longtail.GeneralizedCrossEntropyLoss: longtail.generalized_cross_entropy,
    longtail.SigmoidFocalLoss: longtail.sigmoid_focal_loss,
    longtail.SigmoidCrossEntropyLoss: longtail.sigmoid_cross_entropy,
    longtail.BinaryFocalLoss: longtail.binary_focal_loss,
    longtail.AsymmetricLoss: longtail.asymmetric_loss,
    longtail.ZLPRLoss: longtail.zlpr_loss,
    longtail.TwoWayLoss: longtail.two_way_loss,
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functions_name_what_they_take(function) -> None:
    parameters = inspect.signature(function).parameters
    renamed = {"focal_loss": {"focal_gamma"}, "complement_cross_entropy": {"complement_gamma"}}
    assert set(parameters) >= OPTIONS - renamed.get(function.__name__, set())
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'gama'"):
        function(*[None] * 3, gama=2.0)


@pytest.mark.parametrize(
    ("function", "plain"),
    [
        (longtail.linear_hierarchical_cross_entropy, longtail.linear_cross_entropy),
        (longtail.vocab_parallel_hierarchical_cross_entropy, longtail.vocab_parallel_cross_entropy),
        (longtail.vocab_parallel_linear_hierarchical_cross_entropy, longtail.vocab_parallel_linear_cross_entropy),
    ],
    ids=lambda f: f.__name__,
)
def test_hierarchical_functions_name_what_they_take(function, plain) -> None:
    """The data and the ways of one function, the options of the other, each with its default."""
    of_tree = inspect.signature(longtail.hierarchical_cross_entropy).parameters
    of_plain = inspect.signature(plain).parameters
    without = (OPTIONS - set(of_tree)) | {"num_classes"}  # the tree knows how many
    found = inspect.signature(function).parameters
    assert set(found) == (set(of_tree) | set(of_plain)) - without - ({"input"} - set(of_plain))
    for name, parameter in found.items():
        origin = of_tree if name in of_tree and name != "gradient" else of_plain
        assert (parameter.default, parameter.kind) == (origin[name].default, origin[name].kind), name
    positional = [name for name, parameter in found.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional[-3:] == ["target", "hierarchy", "alpha"]
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'gama'"):
        function(*[None] * len(positional), gama=2.0)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_modules_name_what_their_functions_take(module) -> None:
    data = ("input", "target", "inputs", "targets")
    of_function = {n: p for n, p in inspect.signature(MODULES[module]).parameters.items() if n not in data}
    of_module = dict(inspect.signature(module).parameters)
    persistent = of_module.pop("persistent")
    assert (persistent.default, persistent.kind) == (True, persistent.KEYWORD_ONLY)
    if module is longtail.SigmoidFocalLoss:
        of_function["reduction"] = of_function["reduction"].replace(default="mean")
    assert of_module == of_function
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
    for module in (longtail.ClassBalancedLoss, longtail.LinearCrossEntropyLoss):
        assert inspect.signature(module).parameters["persistent"].default is True


WEIGHTS = r"weight=longtail\.effective_number_weight\(samples_per_class, beta\)"
ADJUSTMENT = r"class_bias=longtail\.logit_adjustment\(samples_per_class, tau\)"


@pytest.mark.parametrize(
    ("function", "name", "meant"),
    [
        (longtail.cross_entropy, "gamma", "'focal_gamma'"),
        (longtail.cross_entropy, "alpha", r"weight, a Tensor \[C\]"),
        (longtail.cross_entropy, "ignore_idx", "'ignore_index'"),
        (longtail.cross_entropy, "label_smooth", "'label_smoothing'"),
        (longtail.cross_entropy, "smoothing", "'label_smoothing'"),
        (longtail.cross_entropy, "samples_per_class", WEIGHTS),
        (longtail.cross_entropy, "beta", WEIGHTS),
        (longtail.cross_entropy, "tau", ADJUSTMENT),
        (longtail.cross_entropy, "temperature", "scale=1 / temperature"),
        (longtail.cross_entropy, "weigth", "'weight'"),
        (longtail.focal_loss, "focal_gamma", "'gamma'"),
        (longtail.focal_loss, "alpha", r"weight, a Tensor \[C\]"),
        (longtail.sigmoid_focal_loss, "focal_gamma", "'gamma'"),
        (longtail.sigmoid_focal_loss, "margin", None),
        (longtail.binary_focal_loss, "focal_alpha", "'alpha'"),
        (longtail.asymmetric_loss, "gamma_pos", "'gamma_positive'"),
        (longtail.asymmetric_loss, "gamma", "'gamma_positive'"),
        (longtail.asymmetric_loss, "asl_clip", "'clip'"),
        (longtail.asymmetric_loss, "disable_torch_grad_focal_loss", "detach=True"),
        (longtail.AsymmetricLoss, "gamma_neg", "'gamma_negative'"),
        (longtail.AsymmetricLoss, "smoothing", "'label_smoothing'"),
        (longtail.distribution_balanced_loss, "neg_scale", "'negative_scale'"),
        (longtail.distribution_balanced_loss, "init_bias", "'kappa'"),
        (longtail.distribution_balanced_loss, "map_alpha", "'rebalance_alpha'"),
        (longtail.distribution_balanced_loss, "map_beta", "'rebalance_beta'"),
        (longtail.DistributionBalancedLoss, "map_gamma", "'rebalance_mu'"),
        (longtail.sigmoid_focal_loss, "neg_scale", "'negative_scale'"),
        (longtail.linear_cross_entropy, "final_logit_softcapping", "'softcap'"),
        (longtail.class_balanced_loss, "cls_num_list", "'samples_per_class'"),
        (longtail.class_balanced_loss, "focal_gamma", "'gamma'"),
        (longtail.poly_cross_entropy, "eps", "'epsilon'"),
        (longtail.two_way_loss, "Tp", "'positive_temperature'"),
        (longtail.two_way_loss, "margin", None),
        (longtail.generalized_cross_entropy, "gce_q", "'q'"),
        (longtail.PolyCrossEntropyLoss, "epsilon1", "'epsilon'"),
        (longtail.cross_entropy, "flavour", None),
        (longtail.cross_entropy, "bias", ADJUSTMENT),
        (longtail.linear_cross_entropy, "bias", "'linear_bias'"),
        (longtail.class_balanced_loss, "focal", None),
        (longtail.linear_hierarchical_cross_entropy, "bias", "'linear_bias'"),
        (longtail.linear_hierarchical_cross_entropy, "chunksize", "'chunk_size'"),
        (longtail.vocab_parallel_hierarchical_cross_entropy, "ignore_idx", "'ignore_index'"),
        (longtail.vocab_parallel_hierarchical_cross_entropy, "label_smoothing", None),
        (longtail.vocab_parallel_linear_hierarchical_cross_entropy, "samples_per_class", WEIGHTS),
        (longtail.vocab_parallel_linear_hierarchical_cross_entropy, "seqence_parallel", "'sequence_parallel'"),
        (longtail.CrossEntropyLoss, "gamma", "'focal_gamma'"),
        (longtail.FocalLoss, "ignore_idx", "'ignore_index'"),
        (longtail.LinearCrossEntropyLoss, "inplace_backward", 'gradient="inplace"'),
        (longtail.ClassBalancedLoss, "alpha", None),
    ],
)
def test_unknown_options_bring_to_mind_the_right_ones(function, name: str, meant: str | None) -> None:
    data = {longtail.ClassBalancedLoss: [[1, 2], 0.9], longtail.LinearCrossEntropyLoss: [2, 3]}.get(function, [])
    data = [[1, 2], 9] if function is longtail.DistributionBalancedLoss else data
    if not isinstance(function, type):
        required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        data = [torch.ones(2, 3)] * len(required)
    hint = rf"\. Did you mean {meant}\?" if meant else ""
    with pytest.raises(TypeError, match=rf"(unexpected keyword argument '{name}'|unknown options: {name}){hint}$"):
        function(*data, **{name: 1.0})


def test_what_needs_no_option() -> None:
    for name in ("balance_param", "focal_balance", "loss_weight"):
        with pytest.raises(TypeError, match=rf"'{name}'\. Multiply the loss by {name}$"):
            longtail.distribution_balanced_loss(*[torch.ones(2, 3)] * 2, [1, 2, 3], 9, **{name: 2.0})
    with pytest.raises(TypeError, match=r"'eps'\. No logarithm is cut off$"):
        longtail.asymmetric_loss(*[torch.ones(2, 3)] * 2, eps=1e-8)


@pytest.mark.parametrize("name", ["weight", "class_weights"])
def test_class_balanced_weights_are_those_of_the_counts(name: str) -> None:
    with pytest.raises(TypeError, match=rf"'{name}'\. The weights are those of samples_per_class and beta or volume$"):
        longtail.class_balanced_loss(torch.ones(2, 3), torch.tensor([0, 1]), [3, 2, 1], 0.9, **{name: torch.ones(3)})


@pytest.mark.parametrize("name", ["alpha", "pos_weight", "clip"])
def test_sigmoid_options_are_refused_of_class_balanced_softmax(name: str) -> None:
    with pytest.raises(TypeError, match=rf"class_balanced_loss\(\) got an .* '{name}' with loss='softmax'"):
        longtail.class_balanced_loss(torch.ones(2, 3), torch.tensor([0, 1]), [3, 2, 1], 0.9, **{name: 0.5})


def test_the_number_of_classes_is_that_of_the_logits() -> None:
    with pytest.raises(TypeError, match=r"'num_classes'\. The number of classes is that of the logits$"):
        longtail.cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), num_classes=3)
    tree = longtail.Hierarchy.from_paths([*"abc"])
    with pytest.raises(TypeError, match=r"'num_classes'\. The number of classes is that of the hierarchy$"):
        longtail.vocab_parallel_hierarchical_cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), tree, num_classes=3)


@pytest.mark.parametrize("name", ["alpha", "gamma"])
def test_a_number_of_each_class_is_a_tensor(name: str) -> None:
    for call in (longtail.sigmoid_focal_loss, longtail.binary_focal_loss):
        with pytest.raises(TypeError, match=rf"{name} is a list, expected a number, or a tensor \[C\]"):
            call(torch.ones(3, 2), torch.ones(3, 2), **{name: [0.2, 0.8]})


@pytest.mark.parametrize("name", longtail.functional.__all__)
def test_annotations_name_what_is_there(name: str) -> None:
    function = getattr(longtail.functional, name)
    assert {"target", "targets", "statistics"} & set(typing.get_type_hints(function))


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
