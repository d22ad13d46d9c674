"""Promise: the hierarchical loss of hidden states holds one chunk of logits, and refuses what is wrong by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import longtail
from allocations import peak_while
from linear_cases import Calls, leaves
from linear_hierarchical_cases import ALPHA, Head, N, Problem, states, upstream
from longtail import Hierarchy, linear_hierarchical_cross_entropy
from longtail.linear import rows as linear_rows

ops = torch.ops.longtail


def work(data: Problem, needs: tuple[bool, ...], chunk_size: int) -> tuple[Calls, Any]:
    """All that runs within the operator, as on a GPU."""
    with Calls() as seen:
        out = linear_rows.row_losses_and_grad(
            linear_rows.HIERARCHICAL, torch.ones(len(data.x)), *data[:4], None, chunk_size, *[data.x.dtype] * 4, *needs,
            *tail(data),
        )  # fmt: skip
    return seen, out


def tail(data: Problem) -> list[Any]:
    tables, dtype = data.hierarchy.tables(), cases.vector_dtype(data.x.dtype)
    vectors = data.vectors("weight", "class_bias", "sample_weight").values()
    return [*tables[:3], data.hierarchy.node_weight(ALPHA, dtype), *tables[3:], *vectors, cases.IGNORE]


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("name", ["small", "too_deep"])
def test_the_operator_makes_what_is_needed_a_chunk_at_a_time(
    name: str, needs: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_rows, "_counted", lambda *_: None)  # as on a GPU
    monkeypatch.setattr(linear_rows, "_check_target", lambda *_: None)
    data = Problem.of(name)
    calls, out = work(data, needs, 5)
    assert [g.numel() > 0 for g in out[2:]] == list(needs)
    assert len([name for name, _ in calls.seen if "mm" in name]) == 3 * (1 + needs[0] + needs[1])
    tensors = [x for _, found in calls.seen for x in (found if isinstance(found, tuple | list) else [found])]
    shapes = {tuple(x.shape) for x in tensors if isinstance(x, Tensor)}
    assert (5, len(data.names)) in shapes
    assert not [shape for shape in shapes if {N, len(data.names)} <= {*shape}]
    if name != "too_deep":  # the reference looks at its tables, which on a GPU it does not
        for sync in ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"):
            assert not [name for name, _ in calls.seen if name.split("::")[1].split(".")[0] == sync]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=cases.name)
@pytest.mark.parametrize("mode", ["auto", "none", "no_grad"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_peak_memory_is_an_eighth_of_the_logits(shuffled: bool, mode: str, dtype: torch.dtype) -> None:
    """Above inputs and gradients, a BLAS's own workspaces aside."""
    rows, features, classes = 2304, 16, 8192
    order = torch.randperm(classes, generator=cases.generator(0)).tolist() if shuffled else range(classes)
    hierarchy = Hierarchy.from_paths([(c // 512, c // 32, c) for c in order])
    x, weight = (torch.randn(n, features, dtype=dtype).requires_grad_(mode != "no_grad") for n in (rows, classes))
    target = torch.randint(classes, (rows,))
    hierarchy.node_weight(0.1)

    def step() -> None:
        reduction = "none" if mode == "none" else "mean"
        loss = linear_hierarchical_cross_entropy(x, weight, target, hierarchy, reduction=reduction)
        if mode != "no_grad":
            loss.backward(torch.full_like(loss, 0.5))

    peak, _ = peak_while(step)
    grads = sum(leaf.grad.nbytes for leaf in (x, weight) if leaf.grad is not None)
    logits = rows * classes * dtype.itemsize
    assert logits / 32 < peak - grads <= logits / 8


def test_the_parameter_takes_the_gradient_uncopied() -> None:
    head, (x, target) = Head("auto"), states()
    with Calls() as calls:
        loss = head(x, target)
    (out,) = [out for name, out in calls.seen if name == "longtail::linear_hierarchical_loss_and_grad"]
    loss.backward()
    assert head.weight.grad.data_ptr() == out[3].data_ptr()


def arguments(name: str, data: Problem) -> list[Any]:
    up, wide = upstream("none", len(data.x), data.x.dtype), cases.vector_dtype(data.x.dtype)
    how = [4, data.x.dtype, wide]
    if name == "linear_hierarchical_loss":
        return [*data[:4], *how, *tail(data)]
    return [up, *data[:4], None, *how, data.x.dtype, data.x.dtype, True, False, True, *tail(data)]


OPERATORS = ("linear_hierarchical_loss", "linear_hierarchical_loss_and_grad")


@pytest.mark.parametrize(
    ("name", "tree", "backend"),
    [
        *((name, "small", backend) for name in OPERATORS for backend in ("cpu", "reference")),
        (OPERATORS[1], "flat", "cpu"),
    ],
)
def test_opcheck(name: str, tree: str, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with longtail.use_backend(backend):
            results = torch.library.opcheck(getattr(ops, name).default, tuple(arguments(name, Problem.of(tree, dtype))))
        assert set(results.values()) == {"SUCCESS"}, results


def test_operators_differentiate() -> None:
    """As an exported graph does; not twice, and not in their constants."""
    args = arguments(OPERATORS[0], Problem.of("small", torch.float64).clear())
    for place in range(3):

        def losses(value: Tensor, place: int = place) -> Tensor:
            return ops.linear_hierarchical_loss(*(value if i == place else x for i, x in enumerate(args)))[0]

        value = args[place].clone().requires_grad_()
        assert torch.autograd.gradcheck(losses, value, fast_mode=True)
        (grad,) = torch.autograd.grad(losses(value).square().sum(), value, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(grad.square().sum(), value)
    args[10] = args[10].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"linear_hierarchical_loss is not differentiable in its argument 10"):
        ops.linear_hierarchical_loss(*args)[0].sum().backward()


X, W, T = torch.zeros(2, 4, 3), torch.zeros(5, 3), torch.zeros(2, 4, dtype=torch.int64)
TREE = Hierarchy.from_paths(["a/0", "a/1", "b/2", "b/3", "4"])
LARGER = Hierarchy.from_paths([f"{c % 2}/{c}" for c in range(6)])
NONE = {"gradient": "forward", "reduction": "none"}
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "hierarchy": ((X, W, T, LARGER), {}, ValueError, r"linear_weight has shape \[5, 3\], .* 5 classes, expected 6 as"),
    "no_hierarchy": ((X, W, T, [0, 1]), {}, TypeError, "hierarchy is a list, expected a longtail.Hierarchy"),
    "k": ((X[0], torch.zeros(5, 2, 3), T[:, :2], TREE), {}, ValueError, r"\[5, 2, 3\], expected \(C, D\)"),
    "k_states": ((X, torch.zeros(5, 2, 3), T, TREE), {}, ValueError, "dimensionality 1 or 2"),
    "row_weight": ((X, W[0], T, TREE), {}, ValueError, "at least 2"),
    "features": ((X, torch.zeros(5, 4), T, TREE), {}, ValueError, "got 3 and 4"),
    "weight_dtype": ((X, W.double(), T, TREE), {}, TypeError, "linear_weight has dtype torch.float64"),
    "integers": ((X.long(), W.long(), T, TREE), {}, TypeError, "input has dtype torch.int64"),
    "target_dtype": ((X, W, T.float(), TREE), {}, TypeError, "target has dtype torch.float32, expected an integer"),
    "probabilities": ((X, W, torch.rand(2, 4, 5), TREE), {}, TypeError, "target has dtype torch.float32, .* class ind"),
    "target_shape": ((X, W, T.flatten(), TREE), {}, ValueError, r"target has shape \[8\], expected \[2, 4\]"),
    "bounds": ((X, W, T + 5, TREE), {}, IndexError, "target 5 in row 0 is out of bounds"),
    "negative": ((X, W, T - (torch.arange(8) == 6).view(2, 4).long(), TREE), {}, IndexError, "target -1 in row 6"),
    "bias": ((X, W, T, TREE), {"linear_bias": torch.zeros(4)}, ValueError, r"expected linear_bias shape \(5,\)"),
    "alpha": ((X, W, T, TREE, -0.1), {}, ValueError, "alpha is -0.1, expected"),
    "nan_alpha": ((X, W, T, TREE, torch.nan), {}, ValueError, "alpha is nan"),
    "high_alpha": ((X, W, T, TREE, 50.0), {}, ValueError, "alpha is 50.0, expected at most 43.6"),
    "tensor_alpha": ((X, W, T, TREE, torch.tensor(0.1)), {}, TypeError, "alpha is a Tensor, expected a number"),
    "vector": ((X, W, T, TREE), {"weight": torch.ones(6)}, ValueError, r"weight has shape \[6\], expected \[5\]"),
    "learned": ((X, W, T, TREE), {"class_bias": torch.ones(5, requires_grad=True)}, ValueError, "requires grad"),
    "samples": ((X, W, T, TREE), {"sample_weight": torch.ones(8)}, ValueError, r"\[8\], expected \[2, 4\]"),
    "shifted_samples": (
        (X, W, T, TREE), {"sample_weight": torch.ones(8), "shift": True}, ValueError, r"expected \[2, 4\]"
    ),
    "shift": ((X, W, T, TREE), {"shift": 1}, TypeError, "shift is a int, expected a bool"),
    "gradient": ((X, W, T, TREE), {"gradient": "always"}, ValueError, "gradient is 'always', expected one of 'auto'"),
    "kept": ((X, W, T, TREE), NONE, ValueError, "gradient='forward' needs one scalar loss"),
    "reduction": ((X, W, T, TREE), {"reduction": "max"}, ValueError, "reduction is 'max'"),
    "normalizer": ((X, W, T, TREE), {"normalizer": "rows"}, ValueError, "normalizer is 'rows', expected 'count'"),
    "normalized_sum": ((X, W, T, TREE), {"normalizer": 2.0, "reduction": "sum"}, ValueError, "normalizer is given"),
    "chunk_size": ((X, W, T, TREE), {"chunk_size": 0}, ValueError, "chunk_size is 0"),
    "accumulates": ((X, W, T, TREE), {"accumulate_dtype": torch.float16}, ValueError, "accumulate_dtype is"),
    "smoothing": ((X, W, T, TREE), {"label_smoothing": 0.1}, TypeError, "unexpected keyword argument 'label_smooth"),
    "hint": ((X, W, T, TREE), {"bias": torch.ones(5)}, TypeError, r"'bias'\. Did you mean 'linear_bias'\?"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    data, given, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        linear_hierarchical_cross_entropy(*data, **given)
    if case not in ("bounds", "negative"):  # before anything is computed, so on tensors without values too
        data, given = ([x.to("meta") if isinstance(x, Tensor) and x.dim() else x for x in data],
                       {k: x.to("meta") if isinstance(x, Tensor) else x for k, x in given.items()})  # fmt: skip
        with pytest.raises(error, match=text):
            linear_hierarchical_cross_entropy(*data, **given)


def test_a_wrong_target_counts_ignored_rows_and_moved_positions() -> None:
    x, weight = torch.zeros(2, 4, 3), leaves(W)[0]
    target = torch.tensor([[0, -100, 1, -100], [-100, 2, 9, 0]])
    for shift, row in ((False, 6), (True, 5)):
        for mode, reduction in (("auto", "sum"), ("auto", "mean"), ("backward", "sum"), ("backward", "none")):
            how: dict[str, Any] = {"shift": shift, "gradient": mode, "reduction": reduction}
            with pytest.raises(IndexError, match=f"target 9 in row {row} is out of bounds"):
                linear_hierarchical_cross_entropy(x, weight, target, TREE, chunk_size=2, **how)
