"""Promise: the hierarchical loss of hidden states trains compiled, exported, under autocast, checkpointed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import cases
import longtail
from linear_cases import assert_results, leaves
from linear_hierarchical_cases import Head, Problem, fused, plain, states
from tolerances import assert_close, assert_same

MODES = ("auto", *cases.MODES, "none")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outcome(
    head: torch.nn.Module, x: Tensor, target: Tensor, step: Callable[..., Tensor] | None = None
) -> list[Tensor]:
    x = x.clone().requires_grad_()
    loss = (head if step is None else step)(x, target)
    return [loss.detach(), *torch.autograd.grad(loss * 2.5, (x, *head.parameters()))]


def assert_alike(got: list[Tensor], want: list[Tensor], factor: float = 4.0) -> None:
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0
        assert_close(a.reshape(1, -1), b.reshape(1, -1).double(), factor=factor)


@pytest.mark.parametrize("mode", ["auto", "backward", "none"])
def test_compiled_step_equals_eager(mode: str) -> None:
    """In one graph, for any number of rows, the chunks not unrolled."""
    counter = CompileCounterWithBackend("aot_eager")
    head = Head(mode, **Problem.of().vectors("weight", "class_bias"))
    compiled = torch.compile(head, fullgraph=True, backend=counter)
    for rows in (6, 9, 33):
        assert_alike(outcome(head, *states(rows), compiled), outcome(head, *states(rows)))
    assert counter.frame_count <= 2, "one graph for the first size, one for every other"
    assert counter.op_count <= 40


@pytest.mark.parametrize("fuses", [False, True])
def test_the_bound_of_float16_makes_no_graph_for_each_alpha(fuses: bool) -> None:
    """Gradients made in forward are as large as it allows; torch 2.10 makes those graphs of any number."""
    counters = []
    for dtype, mode in ((torch.float16, "forward"), (torch.float32, "backward")):
        data = Problem.of("small", dtype).clear()
        x, weight = leaves(*data[:2])

        def loss(
            alpha: float, data: Problem = data, x: Tensor = x, weight: Tensor = weight, mode: str = mode
        ) -> Tensor:
            if fuses:
                given = (x, weight, data.target, data.hierarchy, alpha)
                return longtail.linear_hierarchical_cross_entropy(*given, gradient=mode)
            logits = torch.nn.functional.linear(x, weight)
            return longtail.hierarchical_cross_entropy(logits, data.target, data.hierarchy, alpha, gradient=mode)

        torch._dynamo.reset()
        counters.append(CompileCounterWithBackend("aot_eager"))
        compiled = torch.compile(loss, fullgraph=True, backend=counters[-1])
        for alpha in (0.1, 0.2, 3.0):
            got, want = (torch.autograd.grad(function(alpha), (x, weight)) for function in (compiled, loss))
            assert_alike([*got], [*want])
    assert counters[0].frame_count == counters[1].frame_count


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_compiled_evaluation(grad_enabled: bool) -> None:
    head, (x, target) = Head("auto").requires_grad_(False), states()
    with torch.set_grad_enabled(grad_enabled):
        loss = torch.compile(head, fullgraph=True, backend="aot_eager")(x, target)
    assert not loss.requires_grad
    assert_close(loss, head(x, target).double())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["small", "deep_ordered"])
def test_exported_for_any_number_of_rows(name: str, strict: bool) -> None:
    """And trains, decomposed or not."""
    head, rows = Head("auto", name), torch.export.Dim("rows", min=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(head, states(6, name), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)
        programs = (program, program.run_decompositions())
    for exported in (found.module() for found in programs):
        for count in (4, 13):
            assert_alike(outcome(exported, *states(count, name)), outcome(head, *states(count, name)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.name)
@pytest.mark.parametrize("mode", ["auto", "none"])
def test_autocast(mode: str, dtype: torch.dtype, compiled: bool) -> None:
    head, (x, target) = Head(mode), states()
    function = torch.compile(head, fullgraph=True, backend="aot_eager") if compiled else head
    with torch.autocast("cpu", dtype):
        got = outcome(head, x, target, function)
        want = outcome(Head(mode, fuses=False), x, target)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()


def test_autocast_leaves_float64_alone() -> None:
    data = Problem.of("small", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert_results(fused(data), plain(data), plain(data))


@pytest.mark.parametrize("mode", MODES)
def test_only_what_requires_grad(mode: str) -> None:
    (x, target), options = states(), Problem.of().vectors()
    for subset in range(8):
        wanted = [bool(subset >> i & 1) for i in range(3)]
        results = []
        for head in (Head(mode, **options), Head(mode, fuses=False, **options)):
            tensors = [x.clone(), head.weight, head.bias]
            for tensor, need in zip(tensors, wanted, strict=True):
                tensor.requires_grad_(need)
            loss = head(tensors[0], target)
            assert loss.requires_grad == any(wanted)
            if any(wanted):
                loss.backward(torch.tensor(0.3))
            assert [t.grad is not None for t in tensors] == wanted
            results.append([loss.detach(), *(t.grad for t in tensors if t.grad is not None)])
        assert_alike(*results)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["auto", "none"])
def test_checkpoint(mode: str, reentrant: bool) -> None:
    head, (x, target) = Head(mode), states()
    got = []
    for step in (head, lambda x, y: checkpoint(head, x, y, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        head.zero_grad()
        loss = step(leaf, target)
        (loss * 2.5).backward()
        got.append([loss.detach(), leaf.grad, *(p.grad for p in head.parameters())])
    assert_alike(*got)


def test_second_backward() -> None:
    x, target = states()
    for mode in MODES:
        head = Head(mode)
        loss = head(x, target)
        loss.backward(retain_graph=True)
        first = head.weight.grad.clone()
        if mode in ("backward", "none"):
            (loss * 2).backward()
            assert_close(head.weight.grad, 3 * first.double(), factor=4)
            continue
        with pytest.raises(RuntimeError, match='gradient="backward"'):
            loss.backward()
        assert_same(head.weight.grad, first, "a refused backward adds nothing")


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_of_functions(mode: str) -> None:
    """torch.func.grad is autograd's; second derivatives and vmap are refused."""
    head, (x, target) = Head(mode), states()
    grads = torch.autograd.grad(head(x, target), list(head.parameters()), create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="second derivatives"):
            grad.square().sum().backward(retain_graph=True)
    expected = outcome(head, x, target)[1]
    head.requires_grad_(False)
    assert_close(torch.func.grad(lambda a: head(a, target) * 2.5)(x), expected.double(), factor=4)
    for function in (torch.func.grad(lambda a: head(a, target)), lambda a: head(a, target)):
        with pytest.raises(RuntimeError, match=r"no rule for vmap"):
            torch.func.vmap(function)(x.expand(3, *x.shape))


@pytest.mark.parametrize("mode", ["auto", "backward"])
def test_meta_tensors(mode: str) -> None:
    head, (x, target) = Head(mode).to("meta"), states()
    got = outcome(head, x.to("meta"), target.to("meta"))
    for grad, leaf in zip(got[1:], (x, *head.parameters()), strict=True):
        assert (grad.device.type, grad.shape) == ("meta", leaf.shape)
