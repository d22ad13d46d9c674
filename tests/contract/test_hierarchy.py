"""Promise: a Hierarchy says which tree it cannot be, and keeps numbered classes in place; what its loss refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

import cases
import longtail
from hierarchy_cases import tree
from longtail import HierarchicalCrossEntropyLoss, Hierarchy, hierarchical_cross_entropy
from tolerances import assert_close, assert_same

PATHS = ["a/x/1", "b/2", "a/x/3", "a/y/4", "c"]
# Nodes 0 (root), 1 a, 2 b, 3 x, 4 y, then the classes, of which one is no class.
PARENTS = [-1, 0, 0, 1, 1, 3, 2, 3, 4, 0, 2]


def test_tables_describe_the_tree() -> None:
    hierarchy = Hierarchy.from_paths(PATHS)
    assert (hierarchy.num_classes, hierarchy.depth) == (5, 3)
    assert hierarchy.order.tolist() == [0, 2, 3, 1, 4]
    assert hierarchy.position.tolist() == [0, 3, 1, 2, 4]
    path, begin, end, order, position = hierarchy.tables()
    assert order is not None
    assert position is not None
    below = [[{hierarchy.order.tolist()[p] for p in range(begin[v], end[v])} for v in row] for row in path.tolist()]
    assert below[0] == [{0, 2, 3}, {0, 2}, {0}]
    assert below[1] == [{1}, {1}, {1}]
    assert below[4] == [{4}, {4}, {4}]
    assert repr(hierarchy) == "Hierarchy(num_classes=5, depth=3)"
    assert hierarchy.tables("cpu") is hierarchy.tables(torch.device("cpu"))
    hierarchy.order.zero_()
    hierarchy.position.zero_()
    assert hierarchy.tables().order.tolist() == [0, 2, 3, 1, 4]  # type: ignore[union-attr]
    assert hierarchy.tables().position.tolist() == [0, 3, 1, 2, 4]  # type: ignore[union-attr]


def test_two_classes_that_change_places_are_not_in_place() -> None:
    hierarchy = Hierarchy.from_paths(["a/1", "b/2", "a/3", "c"])
    assert hierarchy.order.tolist() == hierarchy.position.tolist() == [0, 2, 1, 3]
    assert hierarchy.tables().order is not None


def everything(hierarchy: Hierarchy, device: str = "cpu") -> list[torch.Tensor]:
    found = [*hierarchy.tables(device), hierarchy.order, hierarchy.position, hierarchy._on(torch.device(device))[1]]
    return [x for x in found if x is not None]


def trains(hierarchy: Hierarchy, device: str = "cpu") -> None:
    x = torch.zeros(2, hierarchy.num_classes, device=device, requires_grad=True)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    hierarchical_cross_entropy(x, target, hierarchy).backward()
    assert x.grad is not None


def test_trees_of_inference_mode_train_later() -> None:
    """Made there, copied there to a device, or unpickled there."""
    kept = Hierarchy.from_paths(PATHS)
    with torch.inference_mode():
        made = Hierarchy.from_paths(PATHS)
        hierarchical_cross_entropy(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), made)
        kept.tables("meta")
        kept.node_weight(0.1, device="meta")
        copies = [pickle.loads(pickle.dumps(made)), copy.deepcopy(made)]
    for hierarchy, device in ((made, "cpu"), (kept, "meta"), *((x, "cpu") for x in copies)):
        assert not any(x.is_inference() for x in everything(hierarchy, device))
        trains(hierarchy, device)


def test_the_default_device_does_not_hold_the_tables() -> None:
    with torch.device("meta"):
        hierarchy = Hierarchy.from_paths(PATHS)
    assert {x.device.type for x in everything(hierarchy)} == {"cpu"}
    for x, y in zip(everything(hierarchy), everything(Hierarchy.from_paths(PATHS)), strict=True):
        assert_same(x, y)


def test_pickles_hold_the_cpu_alone() -> None:
    hierarchy = Hierarchy.from_paths(PATHS)
    before = len(pickle.dumps(hierarchy))
    assert hierarchy.to("meta") is hierarchy
    assert len(pickle.dumps(hierarchy)) == before
    file = io.BytesIO()
    torch.save(hierarchy, file)
    file.seek(0)
    for again in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(hierarchy))):
        assert list(again._placed) == [torch.device("cpu")]
        for x, y in zip(everything(again), everything(hierarchy), strict=True):
            assert_same(x, y)
        trains(again)


def test_only_tensors_that_last_are_kept() -> None:
    hierarchy = Hierarchy.from_paths(PATHS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(hierarchy.tables("meta").path, FakeTensor)
    assert list(hierarchy._placed) == [torch.device("cpu")]
    torch.func.grad(lambda x: x * hierarchy.node_weight(0.1, device="meta").sum())(torch.zeros((), device="meta"))
    for device in hierarchy._placed:
        for x in everything(hierarchy, str(device)):
            assert type(x) is torch.Tensor
            assert not torch._C._functorch.is_functorch_wrapped_tensor(x)


def test_a_moved_tree_is_not_copied_again() -> None:
    hierarchy = Hierarchy.from_paths(PATHS).to("meta")
    path, depths = hierarchy.tables("meta").path, hierarchy._on(torch.device("meta"))[1]
    trains(hierarchy, "meta")
    assert hierarchy.to("meta").tables("meta").path is path
    assert hierarchy._on(torch.device("meta"))[1] is depths


def test_modules_take_their_tree_along() -> None:
    hierarchy = Hierarchy.from_paths(PATHS)
    module = HierarchicalCrossEntropyLoss(hierarchy, class_bias=torch.zeros(5))
    hierarchy._placed.pop(torch.device("meta"), None)  # of the check of its options
    assert torch.nn.Sequential(module).to("meta")[0] is module
    assert torch.device("meta") in hierarchy._placed


def test_node_weights() -> None:
    hierarchy = Hierarchy.from_paths(PATHS)
    weight, path = hierarchy.node_weight(0.5, torch.float64), hierarchy.tables().path.long()
    depths = torch.tensor([[1, 2, 3], [1, 2, 2], [1, 2, 3], [1, 2, 3], [1, 1, 1]], dtype=torch.float64)
    assert_close(weight[path], (-0.5 * depths).exp())


def test_classes_that_are_numbered_along_the_tree_keep_their_place() -> None:
    for name in ("flat", "ordered", "one_deep"):
        hierarchy, _ = tree(name)
        assert hierarchy.tables().order is None
        assert hierarchy.tables().position is None
        assert hierarchy.order.tolist() == [*range(hierarchy.num_classes)]


@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["list", "tensor"])
def test_parents_and_paths_are_the_same_tree(kind: Callable[[list[int]], Any]) -> None:
    logits, target = cases.random_case(6, 5)
    loss = hierarchical_cross_entropy(logits, target, Hierarchy.from_paths(PATHS))
    for root in (-1, 0):
        parents = Hierarchy.from_parents(kind([root, *PARENTS[1:]]), kind([5, 6, 7, 8, 9]))
        assert_same(hierarchical_cross_entropy(logits, target, parents), loss)
    names = [[("name", x) if x != "x" else 7 for x in path.split("/")] for path in PATHS]
    assert_same(hierarchical_cross_entropy(logits, target, Hierarchy.from_paths(names)), loss)


def test_the_leaves_are_the_nodes_without_children() -> None:
    given = Hierarchy.from_parents(PARENTS[:-1], [5, 6, 7, 8, 9])
    for x, y in zip(Hierarchy.from_parents(PARENTS[:-1]).tables(), given.tables(), strict=True):
        assert x is not None
        assert y is not None
        assert_same(x, y)


@pytest.mark.parametrize(
    ("parents", "leaves", "text"),
    [
        ([], None, "no root"),
        ([1, 2, 0], None, "no root"),
        ([-1, -1], None, "roots 0, 1"),
        ([-1, 1], None, "roots 0, 1"),
        ([-1, 2, 1, 0], None, "circle"),
        ([-1, 5], None, r"parents\[1\] is 5"),
        ([-1, -2], None, r"parents\[1\] is -2"),
        ([-1], None, "no class below"),
        ([-1, 0], [], "no class below"),
        ([-1, 0, 0], [1, 1], "classes 0 and 1"),
        ([-1, 0, 1], [1], "nodes below it"),
        ([-1, 0, 1], [0], "nodes below it"),
        ([-1, 0], [2], r"leaves\[0\] is 2"),
    ],
)
def test_wrong_parents(parents: list[int], leaves: list[int] | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Hierarchy.from_parents(parents, leaves)


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ([], "paths is empty"),
        ([()], "path 0 is empty"),
        (["a", ""], "empty name"),
        (["a//b"], "empty name"),
        (["a/b", "a/b"], "same path"),
        (["a", "a/b"], "begins with that of class 0"),
        (["a/b", "a"], "beginning of that of another"),
    ],
)
def test_wrong_paths(paths: list[Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Hierarchy.from_paths(paths)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Hierarchy.from_paths([3]),  # type: ignore[list-item]
        lambda: Hierarchy.from_paths([[["a"], "b"]]),  # type: ignore[list-item]
        lambda: Hierarchy.from_paths([["a", ("b", ["c"])]]),
        lambda: Hierarchy.from_paths("a/b"),
        lambda: Hierarchy.from_paths(b"ab"),  # type: ignore[arg-type]
        lambda: Hierarchy.from_paths([b"ab", b"c"]),
        lambda: Hierarchy.from_parents([-1, 0.5]),  # type: ignore[list-item]
        lambda: Hierarchy.from_parents([-1, False]),
        lambda: Hierarchy.from_parents(torch.tensor([-1.0, 0.0])),
        lambda: Hierarchy.from_parents(torch.tensor([[-1, 0]])),
    ],
)
def test_wrong_types(make: Callable[[], Hierarchy]) -> None:
    with pytest.raises(TypeError, match="expected"):
        make()


LOGITS, TARGET = torch.zeros(2, 5), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"input": torch.zeros(2, 4)}, ValueError, "expected 5 as the hierarchy"),
        ({"target": torch.tensor([0])}, ValueError, "target has shape"),
        ({"target": torch.rand(2, 5)}, TypeError, "integer dtype"),
        ({"hierarchy": PATHS}, TypeError, "expected a longtail.Hierarchy"),
        ({"alpha": -0.1}, ValueError, "alpha is -0.1"),
        ({"alpha": torch.tensor(0.1)}, TypeError, "alpha.item"),
        ({"alpha": 30.0}, ValueError, r"alpha is 30.0, expected at most 29\.1\d* for a tree of depth 3"),
        ({"alpha": 237, "input": torch.zeros(2, 5).double()}, ValueError, r"at most 236\.1"),
        ({"alpha": float("nan")}, ValueError, "alpha is nan"),
        ({"weight": torch.ones(4)}, ValueError, "weight has shape"),
        ({"class_bias": torch.ones(5, dtype=torch.int64)}, TypeError, "class_bias has dtype"),
        ({"reduction": "rows"}, ValueError, "reduction is 'rows'"),
        ({"normalizer": 1.0, "reduction": "sum"}, ValueError, "normalizer"),
        ({"gradient": "sideways"}, ValueError, "gradient is"),
        ({"input": torch.zeros(2, 5, requires_grad=True), "gradient": "inplace"}, ValueError, "leaf"),
        ({"samples": 1}, TypeError, "unexpected keyword"),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    given = {"input": LOGITS, "target": TARGET, "hierarchy": Hierarchy.from_paths(PATHS)} | changed
    with pytest.raises(error, match=text):
        hierarchical_cross_entropy(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_alpha_keeps_every_weight(dtype: torch.dtype) -> None:
    hierarchy, largest = Hierarchy.from_paths(PATHS), -math.log(torch.finfo(dtype).tiny) / 3
    assert hierarchy.node_weight(0.999 * largest, dtype).min() >= torch.finfo(dtype).tiny
    loss = hierarchical_cross_entropy(LOGITS.to(dtype), TARGET, hierarchy, 0.999 * largest)
    assert loss > 0
    with pytest.raises(ValueError, match="alpha"):
        hierarchical_cross_entropy(LOGITS.to(dtype), TARGET, hierarchy, 1.001 * largest)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [5, -1])
def test_targets_out_of_bounds(backend: str, bad: int) -> None:
    logits = torch.zeros(3, 5, requires_grad=True) * 1
    with longtail.use_backend(backend), pytest.raises(IndexError, match=f"target {bad} in row 1"):
        hierarchical_cross_entropy(
            logits, torch.tensor([0, bad, 1]), Hierarchy.from_paths(PATHS), reduction="sum", gradient="inplace"
        )
    assert (logits == 0).all()


def test_module() -> None:
    hierarchy, names = tree("small")
    logits, target = cases.random_case(6, len(names))
    weight, bias = torch.rand(len(names)), torch.randn(len(names))
    module = HierarchicalCrossEntropyLoss(hierarchy, 0.4, weight=weight, class_bias=bias, reduction="sum")
    loss = hierarchical_cross_entropy(logits, target, hierarchy, 0.4, weight=weight, class_bias=bias, reduction="sum")
    assert_same(module(logits, target), loss)
    assert_same(copy.deepcopy(module)(logits, target), loss)
    assert sorted(module.state_dict()) == ["class_bias", "weight"]
    assert "hierarchy=Hierarchy(num_classes=23, depth=4), alpha=0.4" in repr(module)
    module.alpha = 0.0
    truth = torch.nn.functional.cross_entropy(logits + bias, target, weight, reduction="sum")
    assert_close(module(logits, target), truth.double(), factor=4)
    for name, value in (("alpha", -1.0), ("hierarchy", None), ("reduction", "rows")):
        with pytest.raises((TypeError, ValueError)):
            setattr(module, name, value)
    with pytest.raises(TypeError, match="'hierarchy'"):
        HierarchicalCrossEntropyLoss()
