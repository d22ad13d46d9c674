"""Promise: a Hierarchy restricts its tables to any shard of its classes, once, and a number says which tree it is."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch._subclasses import FakeTensorMode

import cases
from hierarchy_cases import TREES, paths, tree
from longtail import Hierarchy
from longtail.hierarchical.hierarchy import HierarchyTables
from tolerances import assert_same

PATHS = ["a/x/1", "b/2", "a/x/3", "a/y/4", "c"]


def below(tables: HierarchyTables, size: int) -> list[set[int]]:
    """The local classes of each node."""
    order = list(range(size)) if tables.order is None else tables.order.tolist()
    return [set(order[b:e]) for b, e in zip(tables.node_begin.tolist(), tables.node_end.tolist(), strict=True)]


def assert_alike(one: HierarchyTables, other: HierarchyTables) -> None:
    for x, y in zip(one, other, strict=True):
        if x is None or y is None:
            assert x is y
        else:
            assert_same(x, y)


@pytest.mark.parametrize("name", TREES)
def test_nodes_hold_the_classes_of_the_shard(name: str) -> None:
    hierarchy, _ = tree(name)
    classes, whole = hierarchy.num_classes, hierarchy.tables()
    everywhere = below(whole, classes)
    third = classes // 3
    for start, size in {(0, 0), (classes, 0), (0, 1), (classes - 1, 1), (third, third), (third, classes - third)}:
        shard = hierarchy.shard(start, size)
        assert shard.path is whole.path
        assert below(shard, size) == [{g - start for g in each if start <= g < start + size} for each in everywhere]
        assert (shard.order is None) == (shard.position is None) == (whole.order is None)
        if shard.order is not None and shard.position is not None:
            assert_same(shard.position[shard.order.long()], torch.arange(size, dtype=torch.int32))
        for table in shard:
            assert table is None or (table.dtype == torch.int32 and table.is_contiguous())
        begin, end = shard.node_begin.long(), shard.node_end.long()
        for nodes in shard.path.long().unbind(1):  # empty ones nest, too
            assert (begin[nodes] <= end[nodes]).all()
        for outer, inner in zip(shard.path.long().unbind(1), shard.path.long().unbind(1)[1:], strict=False):
            assert (begin[outer] <= begin[inner]).all()
            assert (end[inner] <= end[outer]).all()


@pytest.mark.parametrize("name", ["ordered", "shuffled"])
def test_the_shard_of_all_classes_is_the_tree(name: str) -> None:
    hierarchy, _ = tree(name)
    assert_alike(hierarchy.shard(0, hierarchy.num_classes), hierarchy.tables())


EITHER = pytest.mark.parametrize("given", [PATHS, sorted(PATHS)], ids=["shuffled", "ordered"])


@EITHER
def test_each_shard_is_made_once(given: list[str]) -> None:
    hierarchy = Hierarchy.from_paths(given)
    one = hierarchy.shard(1, 3)
    assert hierarchy.shard(1, 3, "cpu") is one
    assert hierarchy.shard(1, 2) is not one
    moved = hierarchy.shard(1, 3, "meta")
    assert {x.device.type for x in moved if x is not None} == {"meta"}
    assert hierarchy.shard(1, 3, torch.device("meta")) is moved
    assert hierarchy.shard(1, 3) is one


@EITHER
def test_copies_make_their_own_shards(given: list[str]) -> None:
    hierarchy = Hierarchy.from_paths(given)
    before = len(pickle.dumps(hierarchy))
    hierarchy.shard(1, 3)
    hierarchy.shard(1, 3, "meta")
    assert len(pickle.dumps(hierarchy)) == before
    for again in (pickle.loads(pickle.dumps(hierarchy)), copy.deepcopy(hierarchy)):
        assert again.shard(1, 3) is not hierarchy.shard(1, 3)
        assert_alike(again.shard(1, 3), hierarchy.shard(1, 3))


@EITHER
def test_shards_last_wherever_they_are_made(given: list[str]) -> None:
    """Of inference mode, of a default device, of fake tensors."""
    truth = Hierarchy.from_paths(given).shard(1, 3)
    inferred, placed, faked = (Hierarchy.from_paths(given) for _ in range(3))
    with torch.inference_mode():
        inferred.shard(1, 3)
        made = Hierarchy.from_paths(given)
        assert made.fingerprint() == inferred.fingerprint()
        made.shard(1, 3)
    with torch.device("meta"):
        placed.shard(1, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        faked.shard(1, 3)
        faked.shard(1, 3, "meta")
    torch.func.grad(lambda x: x * faked.shard(1, 3, "meta").path.sum())(torch.zeros((), device="meta"))
    for hierarchy in (inferred, made, placed, faked):
        assert_alike(hierarchy.shard(1, 3), truth)
        for device in ("cpu", "meta"):
            for x in hierarchy.shard(1, 3, device):
                assert x is None or (type(x) is torch.Tensor and not x.is_inference())


@EITHER
def test_shards_within_compiled_graphs(given: list[str]) -> None:
    hierarchy, fresh = Hierarchy.from_paths(given), Hierarchy.from_paths(given)
    hierarchy.shard(1, 3)
    for each in (hierarchy, fresh):
        compiled = torch.compile(
            lambda x, each=each: (x + each.shard(1, 3).node_begin, x + each.shard(1, 3).node_end),
            backend="aot_eager",
            fullgraph=True,
        )
        for got, want in zip(compiled(torch.zeros((), dtype=torch.int32)), hierarchy.shard(1, 3)[1:3], strict=True):
            assert_same(got, want)
        assert_alike(each.shard(1, 3), Hierarchy.from_paths(given).shard(1, 3))


def test_equal_trees_have_equal_fingerprints() -> None:
    hierarchy = Hierarchy.from_paths(PATHS)
    number = hierarchy.fingerprint()
    assert isinstance(number, int)
    assert 0 <= number < 2**48  # a float64 holds it
    parents = [-1, 0, 0, 1, 1, 3, 2, 3, 4, 0]
    backwards = [-1 if x < 0 else 9 - x for x in reversed(parents)]  # the same tree, its nodes counted from the end
    for again in (
        Hierarchy.from_paths(PATHS),
        Hierarchy.from_paths([path.replace("a", "z").replace("x", "w") for path in PATHS]),
        Hierarchy.from_parents(parents),
        Hierarchy.from_parents(backwards, [4, 3, 2, 1, 0]),
        pickle.loads(pickle.dumps(hierarchy)),
        hierarchy.to("meta"),
    ):
        assert again.fingerprint() == number, again
    hierarchy.shard(1, 2)
    hierarchy.order.zero_()  # the caller's own
    hierarchy.position.zero_()
    assert hierarchy.fingerprint() == number


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "classes change places": lambda p: [p[1], p[0], *p[2:]],
    "a class moves to another node": lambda p: ["a/y/1", *p[1:]],
    "a class moves up": lambda p: ["a/1", *p[1:]],
    "a level above all": lambda p: [f"root/{x}" for x in p],
    "a chain": lambda p: [p[0], "b/only/2", *p[2:]],
    "a class more": lambda p: [*p, "d"],
    "a class less": lambda p: p[:-1],
    "a node split": lambda p: [*p[:2], "a/w/3", *p[3:]],
    "in order": sorted,
}


def test_other_trees_have_other_fingerprints() -> None:
    found = {name: Hierarchy.from_paths(change(PATHS)).fingerprint() for name, change in CHANGES.items()}
    large = [(name, seed) for name, (classes, *_) in TREES.items() if classes > 11 for seed in (0, 1)]
    found |= {f"{name} {seed}": tree(name, seed)[0].fingerprint() for name, seed in large}
    found["as it was"] = Hierarchy.from_paths(PATHS).fingerprint()
    assert len(set(found.values())) == len(found), found


def test_classes_of_one_node_that_change_places_are_another_order() -> None:
    """Alike but for the numbers of its classes."""
    order = torch.randperm(40, generator=cases.generator(3)).tolist()
    names = paths("deep")
    moved = [names[i] for i in order]
    assert Hierarchy.from_paths(moved).fingerprint() != Hierarchy.from_paths(names).fingerprint()
