"""The benchmark's hierarchical losses: one tree everywhere, and an eager form that is the paper's formula."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

import longtail

pytest.importorskip("rich")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CORRECT = longtail.hierarchical_cross_entropy


@pytest.fixture(autouse=True)
def _bench_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def sizes(tree):
    """How many nodes of each number of classes there are, by depth."""
    return [Counter((level.members >= 0).sum(1).tolist()) for level in tree.levels]


def test_a_node_of_32768_classes_has_about_13_below_it():
    from bench import trees

    assert trees.widths(32768) == [2521, 194, 15, 1]
    assert [trees.widths(classes)[-1] for classes in (2, 3, 96, 1000)] == [1] * 4


@pytest.mark.parametrize("classes", [2, 97, 1000])
def test_the_tree_is_one_whether_shuffled_or_not(classes):
    from bench import trees

    along, shuffled, again = (trees.of_classes(classes, CPU, shuffled=s) for s in (False, True, True))
    assert along.hierarchy.tables().order is None, "numbered along the tree"
    assert (classes > 2) == (shuffled.hierarchy.tables().order is not None)
    assert sizes(along) == sizes(shuffled)
    assert torch.equal(shuffled.hierarchy.order, again.hierarchy.order)
    for tree in (along, shuffled):
        assert tree.hierarchy.depth == 4
        assert tree.hierarchy.num_classes == classes
        path = tree.hierarchy.tables().path
        for depth, level in enumerate(tree.levels):
            for node, row in enumerate(level.members.tolist()):
                members = [c for c in row if c >= 0]
                assert (level.node[members] == node).all()
                assert path[members, depth].unique().numel() == 1, "a node of longtail's tree"
                assert (path[:, depth] == path[members[0], depth]).sum() == len(members)


@pytest.mark.parametrize("loss", ["hierarchical", "hierarchical_shuffled"])
def test_eager_is_the_formula_and_ours(loss):
    from bench import contenders

    problem = contenders.Problem.make((7, 97), torch.float32, CPU)
    eager, *ours = contenders.of_loss(loss, problem, compiled=False)
    tree = problem.case(loss)[1]["tree"]
    z = problem.logits.double().requires_grad_()
    e = z.exp()
    expected = z.new_zeros(())
    for row, g in enumerate(problem.target.tolist()):
        nodes = [level.node == level.node[g] for level in tree.levels]
        sums = [e[row].sum(), *(e[row][inside].sum() for inside in nodes), e[row, g]]
        for depth in range(1, 5):
            expected = expected - math.exp(-0.1 * depth) * (sums[depth] / sums[depth - 1]).log() / 7
    (grad,) = torch.autograd.grad(expected, z)
    assert [(x.name, x.gradient) for x in ours] == [("longtail", mode) for mode in contenders.GRADIENTS]
    for contender in (eager, *ours):
        x = problem.logits.clone().requires_grad_() * 1.0
        found = contender.forward(x)
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found, x)[0].double(), grad, rtol=2e-5, atol=1e-8)


def other_alpha(logits, target, hierarchy, alpha, **options):
    return CORRECT(logits, target, hierarchy, 2 * alpha, **options)


def without_the_topmost_nodes(logits, target, hierarchy, alpha, **options):
    paths = [tuple(path[1:]) for path in hierarchy.tables().path.tolist()]
    return CORRECT(logits, target, longtail.Hierarchy.from_paths(paths), alpha, **options)


@pytest.mark.parametrize("wrong", [other_alpha, without_the_topmost_nodes])
def test_a_wrong_loss_is_refused(wrong, monkeypatch):
    from bench import measure, suite

    monkeypatch.setattr(longtail, "hierarchical_cross_entropy", wrong)
    plan = suite.Plan("tail", ((64, 96),), (torch.float32,), ("hierarchical",), rounds=1, compiled=False)
    with pytest.raises(measure.Mismatch, match=r"hierarchical .* of longtail backward is not that of eager"):
        list(suite.run(plan, lambda *_: None))
