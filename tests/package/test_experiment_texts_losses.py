"""The losses of the experiments on texts are what their papers say; what they train with is what they are handed."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from longtail.experiments import methods
from longtail.experiments.texts import label_methods, report
from longtail.hierarchical import Hierarchy

COUNTS = torch.tensor([40, 20, 8, 3])
TREE = Hierarchy.from_paths(["a/x/0", "a/x/1", "a/y/2", "b/z/3"])
ANCESTORS = [[0, 1, 2, 3], [0, 1, 2], [0, 1], [0]], [[0, 1, 2, 3], [0, 1, 2], [0, 1], [1]]
ANCESTORS = (*ANCESTORS, [[0, 1, 2, 3], [0, 1, 2], [2], [2]], [[0, 1, 2, 3], [3], [3], [3]])
"""Of each class: the classes below each node from the root down."""


def make_training(method, **options):
    torch.manual_seed(5)
    model = methods.Classifier(torch.nn.Identity(), torch.nn.Linear(6, 4))
    return methods.MethodTraining(method, model, COUNTS, 10, lambda _: 0.5, 0.01, **options)


def hierarchical(z, target):
    """Bertinetto et al. 2020, section 3.1: conditional probabilities on the way down, alpha 0.1."""
    p, losses = z.softmax(1), []
    for i, g in enumerate(target.tolist()):
        sums = [p[i, members].sum() for members in ANCESTORS[g]]
        steps = [-(below / above).log() for above, below in itertools.pairwise(sums)]
        losses.append(sum((-0.1 * torch.tensor(level + 1.0)).exp() * step for level, step in enumerate(steps)))
    return torch.stack(losses).mean()


def of_target(p, target):
    return p.gather(1, target[:, None]).squeeze(1)


PUBLISHED = {
    methods.POLY: lambda z, t: F.cross_entropy(z, t) + (1 - of_target(z.softmax(1), t)).mean(),
    methods.GENERALIZED: lambda z, t: ((1 - of_target(z.softmax(1), t) ** 0.7) / 0.7).mean(),
    methods.HIERARCHICAL: hierarchical,
    methods.POST_HOC: F.cross_entropy,
}


@pytest.mark.parametrize("method", PUBLISHED, ids=lambda method: method.name)
def test_loss_of_every_new_method_is_the_published_one(method):
    training = make_training(method, tree=TREE)
    x, target = torch.randn(12, 6), torch.arange(12) % 4
    expected = PUBLISHED[method](training.model(x).double(), target)
    training.start_epoch(0)
    torch.testing.assert_close(training.step(x, target).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_post_hoc_adjustment_trains_as_cross_entropy():
    trained = []
    for method in (methods.CROSS_ENTROPY, methods.POST_HOC):
        training = make_training(method)
        for epoch in range(3):
            training.start_epoch(epoch)
            training.step(torch.arange(72.0).reshape(12, 6).sin(), torch.arange(12) % 4)
        trained.append(training.model.head.weight)
    assert torch.equal(*trained)


def test_the_hierarchical_loss_needs_a_tree():
    with pytest.raises(ValueError, match="hierarchical cross-entropy needs a tree of the classes, got None"):
        make_training(methods.HIERARCHICAL)


def test_the_selection_has_every_family_and_the_new_losses_once():
    names = [method.name for method in methods.selection()]
    assert names[0] == "cross-entropy"
    assert len(names) == len(set(names)) == 22
    families = {method.family for method in methods.selection()}
    assert families == {method.family for method in methods.grid()} | {
        "Poly-1",
        "generalized cross-entropy",
        "post-hoc logit adjustment",
    }
    betas = [method.beta for method in methods.selection() if method.family == "class-balanced softmax"]
    assert betas == [0.9, 0.99, 0.999, 0.9999]
    known = {*methods.grid(), methods.POLY, methods.GENERALIZED, methods.POST_HOC}
    assert known.issuperset(methods.selection()), "settings of the grid, and no others"


@pytest.mark.parametrize("method", methods.selection(), ids=lambda method: method.name)
def test_optimizers_are_made_by_who_asks_for_it_of_all_parameters(method):
    made = []

    def adam(groups):
        made.append([{**group} for group in groups])
        return torch.optim.Adam(groups, lr=1.0)

    training = make_training(method, make_optimizer=adam)
    assert len(made) == len(training.optimizers) == (2 if method.complement_step else 1)
    for groups, optimizer in zip(made, training.optimizers, strict=True):
        assert isinstance(optimizer, torch.optim.Adam)
        assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in training.model.parameters()}
        assert {group["weight_decay"] for group in groups} == ({0.01, 0} if method.sigmoid else {0.01})
        assert [group["lr"] for group in optimizer.param_groups] == [0.5] * len(groups)
    training.start_epoch(9)
    before = [p.clone() for p in training.model.parameters()]
    training.step(torch.randn(12, 6), torch.arange(12) % 4)
    assert not any(torch.equal(old, p) for old, p in zip(before, training.model.parameters(), strict=True))


def test_the_usual_optimizer_is_sgd_with_momentum():
    (optimizer,) = make_training(methods.CROSS_ENTROPY).optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9]


NUM_TEXTS = 60


def effective(beta):
    weight = (1 - beta) / (1 - beta ** COUNTS.double())
    return 4 * weight / weight.sum()


def binary(z, y, positive=1.0, gamma=0.0):
    """Mean over texts of sums over labels."""
    p = z.sigmoid()
    return -(positive * y * (1 - p) ** gamma * p.log() + (1 - y) * p**gamma * (1 - p).log()).sum(1)


def row_mean(y, beta):
    """The mean weight of a text's labels; without labels it weighs as the most frequent class."""
    weight = effective(beta)
    return torch.where(y.any(1), (y * weight).sum(1) / y.sum(1).clamp(min=1), weight.min())


ODDS = (NUM_TEXTS - COUNTS.double()) / COUNTS
LABEL_LOSSES = {
    "binary cross-entropy": binary,
    "positive weight, power 1": lambda z, y: binary(z, y, ODDS),
    "positive weight, power 0.5": lambda z, y: binary(z, y, ODDS.sqrt()),
    "logit adjustment": lambda z, y: binary(z - ODDS.log(), y),
    "sigmoid focal, gamma 2": lambda z, y: binary(z, y, gamma=2.0),
    "class-balanced sigmoid, beta 0.99": lambda z, y: row_mean(y, 0.99) * binary(z, y),
    "class-balanced sigmoid, beta 0.9999": lambda z, y: row_mean(y, 0.9999) * binary(z, y),
    "class-balanced sigmoid focal, beta 0.999, gamma 1": lambda z, y: row_mean(y, 0.999) * binary(z, y, gamma=1.0),
}
LABEL_METHODS = {method.name: method for method in label_methods.label_methods()}


@pytest.mark.parametrize("name", LABEL_LOSSES)
def test_losses_of_several_labels_have_the_published_options(name):
    z, y = torch.randn(9, 4), torch.arange(36).reshape(9, 4) * 7 % 5 < 2
    y[3] = False
    loss = LABEL_METHODS[name].make_loss(COUNTS, NUM_TEXTS)(z, y.float())
    torch.testing.assert_close(loss.double(), LABEL_LOSSES[name](z.double(), y.double()).mean(), rtol=1e-5, atol=1e-6)


def test_every_method_of_several_labels_stands_once_and_reaches_another_process():
    assert next(iter(LABEL_METHODS)) == "binary cross-entropy"
    assert len(LABEL_METHODS) == len(label_methods.label_methods()) == 14
    assert [name for name, method in LABEL_METHODS.items() if not method.sigmoid] == ["ZLPR", "two-way"]
    assert label_methods.label_methods()[0] == label_methods.BINARY, "the control is found by equality"
    z, y = torch.randn(9, 4), (torch.rand(9, 4) < 0.4).float()
    for method in LABEL_METHODS.values():
        sent = pickle.loads(pickle.dumps(method))
        losses = [each.make_loss(COUNTS, NUM_TEXTS)(z, y) for each in (method, sent)]
        assert torch.equal(*losses), method.name
        assert losses[0].isfinite(), method.name


def test_methods_that_are_drawn_are_methods():
    assert {method.name for method in methods.selection()}.issuperset(report.DRAWN["one"])
    assert set(LABEL_METHODS).issuperset(report.DRAWN["several"])
