"""The start of a sigmoid classifier: its bias, and the parameter groups that leave the bias alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from longtail.training import init_sigmoid_bias_, parameter_groups_without_bias_decay
from tolerances import assert_close


def test_bias_makes_every_sigmoid_the_prior() -> None:
    layer = nn.Linear(4, 10)
    weight = layer.weight.detach().clone()
    assert init_sigmoid_bias_(layer) is layer.bias
    assert_close(layer.bias, torch.full((10,), -math.log(9), dtype=torch.float64))
    assert torch.equal(layer.weight, weight)
    assert layer.bias.requires_grad
    assert layer.bias.grad_fn is None
    init_sigmoid_bias_(layer, prior=0.01)
    assert_close(layer.bias.sigmoid(), torch.full((10,), 0.01, dtype=torch.float64), factor=4)
    init_sigmoid_bias_(layer, prior=1e-320)
    assert_close(layer.bias, torch.full((10,), math.log(1e-320), dtype=torch.float64))
    prior = torch.linspace(0.001, 0.999, 10, dtype=torch.float64)
    init_sigmoid_bias_(layer, prior)
    assert_close(layer.bias, -((1 - prior) / prior).log())


def test_bias_of_convolutions_and_half_precision() -> None:
    layer = nn.Conv2d(3, 100, 1, dtype=torch.bfloat16)
    init_sigmoid_bias_(layer)
    assert_close(layer.bias, torch.full((100,), -math.log(99), dtype=torch.float64))


class Twice(nn.Module):
    def forward(self, half):
        return 2 * half

    def right_inverse(self, bias):
        return bias / 2


class Exponential(nn.Module):
    """Makes no negative bias."""

    def forward(self, logarithm):
        return logarithm.exp()

    def right_inverse(self, bias):
        return bias.log()


class OneWay(nn.Module):
    def forward(self, bias):
        return -bias


def parametrized(*parametrizations: nn.Module) -> nn.Linear:
    layer = nn.Linear(4, 3)
    nn.init.constant_(layer.bias, 0.25)
    for one in parametrizations:
        parametrize.register_parametrization(layer, "bias", one)
    return layer


def test_a_parametrized_bias_is_set_through_its_parametrizations() -> None:
    layer = parametrized(Twice(), Twice())
    prior = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    assert_close(init_sigmoid_bias_(layer, prior), torch.logit(prior))
    assert_close(layer(torch.zeros(4)), torch.logit(prior))
    init_sigmoid_bias_(layer)
    assert_close(layer.bias, torch.full((3,), -math.log(2), dtype=torch.float64))
    assert_close(layer.parametrizations.bias.original, torch.full((3,), -math.log(2) / 4, dtype=torch.float64))


@pytest.mark.parametrize("parametrizations", [(Exponential(),), (OneWay(),), (Twice(), Exponential())])
def test_a_parametrized_bias_that_cannot_be_set_stays(parametrizations: tuple[nn.Module, ...]) -> None:
    layer = parametrized(*parametrizations)
    before = layer.parametrizations.bias.original.clone()
    with pytest.raises(ValueError, match=r"\(ParametrizedLinear\) is parametrized by .*, which cannot make it -0\.69"):
        init_sigmoid_bias_(layer)
    assert torch.equal(layer.parametrizations.bias.original, before)


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(3))

    @property
    def bias(self):
        return 2 * self.latent


class Shared(nn.Module):
    """Its bias is a part of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.biases = nn.Parameter(torch.zeros(5))

    @property
    def bias(self):
        return self.biases[2:]


def test_a_bias_that_is_computed_anew() -> None:
    for layer, source in ((Computed(), ""), (prune.identity(nn.Linear(4, 3), "bias"), " from bias_orig")):
        with pytest.raises(ValueError, match=rf"the bias of the layer \(\w+\) is computed{source}, expected"):
            init_sigmoid_bias_(layer)
    layer = Shared()
    init_sigmoid_bias_(layer)
    assert_close(layer.biases, torch.tensor([0, 0] + [-math.log(2)] * 3, dtype=torch.float64))


def test_decay_spares_what_a_parametrized_bias_is_made_of() -> None:
    layer = parametrized(Twice())
    decayed, free = parameter_groups_without_bias_decay(layer, layer, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(layer.weight)]
    assert [id(p) for p in free["params"]] == [id(layer.parametrizations.bias.original)]


EMPTIED = nn.Linear(2, 3)
EMPTIED.bias = nn.Parameter(torch.zeros(0))


@pytest.mark.parametrize(
    ("layer", "prior", "exception", "message"),
    [
        (nn.Linear(2, 3, bias=False), None, ValueError, r"the layer \(Linear\) has no bias, expected"),
        (EMPTIED, 0.1, ValueError, r"the bias of the layer \(Linear\) is empty, as parameters that ZeRO-3"),
        (nn.ReLU(), None, ValueError, r"the layer \(ReLU\) has no bias"),
        ("head", None, TypeError, r"layer is a str, expected a torch\.nn\.Module"),
        (nn.Linear(2, 1), None, ValueError, "the layer has one output, for which there is no default"),
        (nn.Linear(2, 3), 0, ValueError, r"prior is 0, expected a number in \(0, 1\)"),
        (nn.Linear(2, 3), 1.0, ValueError, r"prior is 1, expected"),
        (nn.Linear(2, 3), math.nan, ValueError, "prior is nan"),
        (nn.Linear(2, 3), 10**400, ValueError, "prior is inf, expected a finite number"),
        (nn.Linear(2, 3), "0.1", TypeError, "prior is a str, expected a number"),
        (nn.Linear(2, 3), torch.tensor([0.1, 0.2]), ValueError, r"prior has shape \[2\], expected \[3\] as the bias"),
        (nn.Linear(2, 3), torch.tensor([0.1, 0.2, 1.0]), ValueError, r"prior holds 1, expected numbers in \(0, 1\)"),
        (nn.Linear(2, 3), torch.tensor([0.1, math.nan, 0.5]), ValueError, "prior holds nan"),
    ],
)
def test_wrong_bias_arguments(layer, prior, exception, message) -> None:
    with pytest.raises(exception, match=message):
        init_sigmoid_bias_(layer, prior)


class Model(nn.Module):
    """With a tied weight, a frozen layer, a bare parameter and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.other = nn.Linear(4, 3)


def test_no_parameter_is_lost_or_doubled() -> None:
    model = Model()
    for layers, biases in (
        (model.head, [model.head.bias]),
        ([model.head, model.other], [model.head.bias, model.other.bias]),
        (model.frozen, [model.frozen.bias]),
    ):
        decayed, free = parameter_groups_without_bias_decay(model, layers, 0.25)
        assert (decayed["weight_decay"], free["weight_decay"]) == (0.25, 0.0)
        assert [id(p) for p in free["params"]] == [id(p) for p in biases]
        together = [id(p) for p in decayed["params"] + free["params"]]
        assert sorted(together) == sorted(id(p) for p in model.parameters())
        assert len(set(together)) == len(together) == 7


def test_the_optimizer_decays_everything_else() -> None:
    model = Model()
    optimizer = torch.optim.SGD(parameter_groups_without_bias_decay(model, model.head, 0.5), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, p in model.named_parameters():
        kept = 1.0 if name == "head.bias" or name.startswith("frozen") else 0.5
        assert_close(p, kept * before[name].double())


def test_a_tied_bias_is_one_parameter() -> None:
    model = Model()
    model.other = nn.Linear(4, 7)
    model.other.bias = model.head.bias
    _, free = parameter_groups_without_bias_decay(model, [model.head, model.other], 0.1)
    assert len(free["params"]) == 1


def test_nothing_left_to_decay() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))

    layer = Bias()
    (group,) = parameter_groups_without_bias_decay(layer, layer, 0.1)
    assert group["weight_decay"] == 0
    torch.optim.SGD([group], lr=0.1)


def test_wrong_groups() -> None:
    model = Model()
    with pytest.raises(ValueError, match="the bias of a layer is no parameter of the model"):
        parameter_groups_without_bias_decay(model, nn.Linear(4, 7), 0.1)
    with pytest.raises(ValueError, match=r"the layer \(Embedding\) has no bias"):
        parameter_groups_without_bias_decay(model, [model.head, model.embedding], 0.1)
    with pytest.raises(ValueError, match=r"weight_decay is -0\.1, expected"):
        parameter_groups_without_bias_decay(model, model.head, -0.1)
    with pytest.raises(TypeError, match=r"layer is a str, expected a torch\.nn\.Module"):
        parameter_groups_without_bias_decay(model, ["head"], 0.1)
