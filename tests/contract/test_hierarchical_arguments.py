"""Promise: hierarchical cross-entropy takes inputs of any shape, in graphs too, and refuses what is no tree of them.

Nothing is read beyond a row, whatever the tables hold.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import hierarchy_cases
import longtail
from hierarchy_cases import losses, tree
from longtail import hierarchical_cross_entropy
from tolerances import assert_close, assert_same

ALPHA = 0.3


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("shape", [(23,), (2, 23, 3), (2, 23, 2, 3)])
def test_shapes(shape: tuple[int, ...], mode: str) -> None:
    hierarchy, _ = tree("small")
    logits = torch.randn(shape, generator=cases.generator(0))
    target = torch.randint(23, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=cases.generator(1))
    rows = logits.movedim(1, -1).reshape(-1, 23) if len(shape) > 1 else logits[None]
    one, two = logits.clone().requires_grad_(), rows.clone().requires_grad_()
    loss = hierarchical_cross_entropy(one * 1, target, hierarchy, reduction="none", gradient=mode)
    flat = hierarchical_cross_entropy(two, target.reshape(-1), hierarchy, reduction="none")
    up = torch.randn(target.shape, generator=cases.generator(2))
    loss.backward(up)
    flat.backward(up.reshape(-1))
    assert loss.shape == target.shape
    assert one.grad is not None
    assert two.grad is not None
    assert_same(loss.detach().reshape(-1), flat.detach())
    grad = one.grad.movedim(1, -1).reshape(-1, 23) if len(shape) > 1 else one.grad[None]
    assert_close(grad, two.grad.double())


def test_float16_gradients_keep_their_size() -> None:
    """The kept gradient neither overflows nor vanishes, whatever the weights and alpha."""
    hierarchy, names = tree("small")
    logits, target = cases.random_case(6, len(names), torch.float16, ignore=False)
    for size, alpha in ((1e-7, 0.1), (1e7, 0.1), (1.0, 8.0)):
        weight = torch.full((len(names),), size)
        grads = []
        for mode in ("forward", "backward"):
            leaf = logits.clone().requires_grad_()
            loss = hierarchical_cross_entropy(
                leaf * 1, target, hierarchy, alpha, weight=weight, reduction="sum", gradient=mode
            )
            loss.backward(torch.tensor(1024.0 * torch.tensor(alpha).exp().item() / size))
            grads.append(leaf.grad)
        assert grads[0].isfinite().all()
        assert grads[0].abs().max() > 1
        assert_close(grads[0], grads[1].double(), factor=4)


@pytest.mark.parametrize("name", ["small", "too_deep", "one_deep"])
def test_the_reference_differentiates_twice(name: str) -> None:
    hierarchy, names = tree(name)
    logits, target = cases.random_case(2, len(names), torch.float64)
    options = hierarchy_cases.vectors(len(names), 2, torch.float64) | hierarchy.tables()._asdict()
    options["node_weight"] = hierarchy.node_weight(ALPHA, torch.float64)

    def loss(x: Tensor) -> Tensor:
        return longtail.reference.hierarchical_loss(x, target, **options)

    x = logits.requires_grad_()
    own = hierarchy_cases.vectors(len(names), 2, torch.float64)
    assert_close(loss(x).detach(), losses(x.detach(), target, names, ALPHA, **own))
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x, fast_mode=True)


def test_second_derivatives_are_refused() -> None:
    hierarchy, names = tree("small")
    logits, target = cases.random_case(4, len(names))
    x = logits.requires_grad_()
    (grad,) = torch.autograd.grad(hierarchical_cross_entropy(x, target, hierarchy), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_compiled_and_exported() -> None:
    hierarchy, names = tree("small")
    logits, target = cases.random_case(4, len(names))
    module = longtail.HierarchicalCrossEntropyLoss(hierarchy, alpha=ALPHA)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    one, two = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, again = module(one, target), compiled(two, target)
    loss.backward()
    again.backward()
    assert_same(again.detach(), loss.detach())
    assert_same(two.grad, one.grad)
    exported = torch.export.export(module, (logits, target)).module()
    assert_close(exported(logits, target), loss.detach().double())


def arguments(name: str, which: str) -> list[Any]:
    hierarchy, names = tree(which)
    logits, target = cases.random_case(6, len(names))
    tables = hierarchy.tables()
    vectors = hierarchy_cases.vectors(len(names), 6, torch.float32)
    tail: list[Any] = [*tables[:3], hierarchy.node_weight(ALPHA), *tables[3:], *vectors.values(), cases.IGNORE]
    up = torch.randn(6, generator=cases.generator(5))
    if name == "hierarchical_loss":
        return [logits, target, *tail]
    if name in ("hierarchical_loss_backward", "hierarchical_loss_backward_"):
        return [up, logits, target, torch.ops.longtail.hierarchical_loss(logits, target, *tail)[1], *tail]
    return [up, logits, target, *tail]


OPERATORS = tuple("hierarchical_loss" + end for end in ("", "_backward", "_backward_", "_and_grad", "_and_grad_"))


@pytest.mark.parametrize(("name", "which"), [*((name, "small") for name in OPERATORS), ("hierarchical_loss", "flat")])
def test_opcheck(name: str, which: str) -> None:
    results = torch.library.opcheck(getattr(torch.ops.longtail, name).default, tuple(arguments(name, which)))
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (2, torch.zeros(5, 2, dtype=torch.int32), "path has shape"),
        (3, torch.zeros(2, dtype=torch.int32), "node_end has shape"),
        (6, None, "one of order and position"),
        (8, torch.ones(3), "weight has shape"),
    ],
)
def test_operators_refuse_what_does_not_fit(backend: str, place: int, value: Any, text: str) -> None:
    args = arguments("hierarchical_loss", "small")
    args[place] = value
    with longtail.use_backend(backend), pytest.raises(RuntimeError, match=text):
        torch.ops.longtail.hierarchical_loss(*args)


@pytest.mark.parametrize("place", [2, 3, 4, 6])
def test_kernels_trap_tables_that_are_no_tree(place: int) -> None:
    """Never a read beyond a row."""
    args = arguments("hierarchical_loss", "small")
    for value in (10**6, -5):
        broken = list(args)
        broken[place] = torch.full_like(args[place], value)
        with longtail.use_backend("cpu"), pytest.raises(RuntimeError, match=r"do not nest|order holds"):
            torch.ops.longtail.hierarchical_loss(*broken)


@pytest.mark.parametrize("place", [2, 3, 4, 6, 7])
def test_the_reference_refuses_tables_that_are_no_tree(place: int) -> None:
    for value in (10**6, -5):
        broken = arguments("hierarchical_loss", "small")
        broken[place] = torch.full_like(broken[place], value)
        with longtail.use_backend("reference"), pytest.raises(RuntimeError, match=r"longtail: .*(nest|order)"):
            torch.ops.longtail.hierarchical_loss(*broken)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("place", "change", "text"),
    [
        (2, lambda x: x.flip(1), "do not nest"),
        (2, lambda x: x.roll(1, 0), "do not nest"),
        (2, lambda x: x.long(), "path has dtype"),
        (3, lambda x: x.long(), "node_begin has dtype"),
        (7, lambda x: x.long(), "position has dtype"),
        (2, lambda x: x[0, 0], "path has shape"),
        (2, lambda x: x.new_zeros(9), "path has shape"),
    ],
)
def test_tables_of_another_tree(backend: str, place: int, change: Any, text: str) -> None:
    args = arguments("hierarchical_loss", "small")
    args[place] = change(args[place])
    with longtail.use_backend(backend), pytest.raises(RuntimeError, match=text):
        torch.ops.longtail.hierarchical_loss(*args)


def test_a_compiled_loss_copies_no_tree_that_was_moved() -> None:
    hierarchy, names = tree("small")
    hierarchy.to("meta")
    copies: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        copies.extend(n for n in graph.graph.nodes if any(isinstance(x, torch.device) for x in n.args))
        return graph.forward

    compiled = torch.compile(lambda x, y: hierarchical_cross_entropy(x, y, hierarchy), backend=backend, fullgraph=True)
    compiled(torch.zeros(2, len(names), device="meta"), torch.zeros(2, dtype=torch.int64, device="meta"))
    assert not copies
