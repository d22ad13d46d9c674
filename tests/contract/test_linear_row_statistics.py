"""Promise: `linear_row_statistics` is `row_statistics` of the logits that it never makes, whatever the chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from allocations import peak_while
from linear_cases import Data, leaves, problem
from longtail.linear import classes as linear_classes
from longtail.linear import rows as linear_rows
from statistics_cases import FIELDS, options, weighted
from tolerances import assert_close, assert_same

CLASSES = 200  # chunks of 64, 64, 64 and 8


@pytest.fixture(params=["rows", "chunk_size", "cleared", "classes"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Both ways of chunks, and the options that they need; "cleared": ignored rows are not left out, as on a GPU."""
    monkeypatch.setattr(linear_classes, "PLAN", linear_classes.Plan(share=4, least=1, budget=1 << 20))
    monkeypatch.setattr(linear_rows, "by_classes", lambda *_: request.param == "classes")
    if request.param == "cleared":
        monkeypatch.setattr(linear_rows, "_counted", lambda *_: None)
    return {"chunk_size": 7} if request.param in ("chunk_size", "cleared") else {}


def results(data: Data, whole: bool, **given: Any) -> list[Tensor]:
    """The statistics and the gradients of features, weight and bias."""
    x, weight, bias = leaves(*data[:3])
    if whole:
        for name in ("chunk_size", "accumulate_dtype"):
            given.pop(name, None)
        found = longtail.reference.row_statistics(F.linear(x, weight, bias), data[3], **given)
    else:
        found = longtail.linear_row_statistics(x, weight, data[3], linear_bias=bias, **given)
    return [*(v.detach() for v in found[:5]), *torch.autograd.grad(weighted(found), (x, weight, bias))]


def assert_results(actual: list[Tensor], truth: list[Tensor], eager: list[Tensor], factor: float = 1.0) -> None:
    for what, *found in zip((*FIELDS, "input", "weight", "bias"), actual, truth, eager, strict=True):
        got, want, same = (x.reshape(1, -1) for x in found)
        assert_close(got, want, same, what=what, factor=factor)


def double(data: Data) -> Data:
    x, weight, bias, target = data
    return x.double(), weight.double(), bias.double(), target


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("name", ["plain", "mixed", "tail"])
def test_equals_the_statistics_of_whole_logits(way: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    data = problem(CLASSES, dtype)
    given = options(name, CLASSES, dtype)
    truth, eager = results(double(data), True, **cases.to_float64(given)), results(data, True, **given)
    ignored = data[3] == cases.IGNORE
    poisoned = (cases.poison_ignored(data[0], data[3]), *data[1:])
    actual = results(poisoned, False, **given, **way)  # type: ignore[arg-type]
    assert [x.dtype for x in actual] == [x.dtype for x in eager]
    assert_results(actual, truth, eager, factor=1 if dtype.itemsize > 2 else 2)
    for value in actual[:6]:
        assert_same(value[ignored], torch.zeros_like(value[ignored]))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_what_requires_grad_gets_one(way: dict[str, Any], needs: tuple[bool, ...]) -> None:
    data = problem(CLASSES, torch.float64)
    want = results(data, False, **way)
    parts = [x.requires_grad_(need) for x, need in zip(leaves(*data[:3]), needs, strict=True)]
    found = longtail.linear_row_statistics(parts[0], parts[1], data[3], linear_bias=parts[2], **way)
    assert found.log_prob.requires_grad == any(needs)
    assert not found.correct.requires_grad
    if any(needs):
        weighted(found).backward()
    for part, grad, need in zip(parts, want[5:], needs, strict=True):
        assert (part.grad is not None) == need
        if need:
            assert_close(part.grad, grad)


def test_gemms_are_one_forward_and_three_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_rows, "_counted", lambda *_: None)  # as on a GPU: nothing is read back
    x, weight, bias, target = problem()
    x.requires_grad_()
    weight.requires_grad_()
    names = []
    for part in ("forward", "backward"):
        with torch.autograd.profiler.profile() as seen:
            if part == "forward":
                found = longtail.linear_row_statistics(x, weight, target, linear_bias=bias, chunk_size=len(x))
                loss = found.entropy.mean() - found.log_prob.sum()
            else:
                loss.backward()
        names.append([event.name for event in seen.function_events])
    assert [sum(name.startswith(("aten::mm", "aten::addmm")) for name in seen) for seen in names] == [1, 3]
    assert not {"aten::_local_scalar_dense", "aten::nonzero"} & {name for seen in names for name in seen}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=cases.name)
def test_peak_memory_is_an_eighth_of_the_logits(dtype: torch.dtype) -> None:
    rows, features, classes = 1152, 64, 16384
    x, weight = torch.randn(rows, features, dtype=dtype), torch.randn(classes, features, dtype=dtype)
    target = torch.randint(classes, (rows,))
    parts = x.requires_grad_(), weight.requires_grad_()

    def step() -> None:
        found = longtail.linear_row_statistics(*parts, target)
        (found.log_prob.exp() * found.entropy).sum().backward()

    peak, _ = peak_while(step)
    grads = sum(part.grad.nbytes for part in parts if part.grad is not None)
    logits = rows * classes * dtype.itemsize
    assert logits / 32 < peak - grads <= logits / 8


@pytest.mark.parametrize("margin", cases.MARGINS)
def test_saturation(margin: float) -> None:
    """Logits as the standing cases have them, by an identity projection."""
    logits, target = cases.margin_case(margin, 9, torch.float32)
    data = (logits, torch.eye(9), torch.zeros(9), target)
    assert_results(results(data, False, chunk_size=4), results(double(data), True), results(data, True))


def test_infinite_logits_and_a_lone_class() -> None:
    bias = torch.tensor([0.0, -torch.inf, 0.0], dtype=torch.float64)
    x, weight = torch.randn(4, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    data = (x, weight, bias, torch.tensor([0, 2, 1, 0]))
    for got, want in zip(results(data, False), results(data, True), strict=True):
        assert_close(got, want, what="an infinite logit")
    data = (x, weight[:1], bias[:1], torch.zeros(4, dtype=torch.int64))
    for got, want in zip(results(data, False), results(data, True), strict=True):
        assert_close(got, want, what="one class")


@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_counted(rows: int) -> None:
    x, weight, bias, target = problem(5, torch.float32, rows)
    target.fill_(cases.IGNORE)
    for value in results((x.fill_(torch.nan), weight, bias, target), False):
        assert_same(value, torch.zeros_like(value))


@pytest.mark.parametrize("shift", [False, True])
def test_leading_dimensions_are_rows(way: dict[str, Any], shift: bool) -> None:
    x, weight, bias, target = problem(CLASSES, torch.float64)
    states, targets = x.view(2, 5, 2, 16).movedim(1, 2), target.view(2, 2, 5)
    moved = targets.clone()
    if shift:
        moved[..., :-1], moved[..., -1] = targets[..., 1:], cases.IGNORE
    want = results((states.reshape(20, 16), weight, bias, moved.reshape(-1)), False, **way)
    got = results((states, weight, bias, targets), False, shift=shift, **way)
    assert got[0].shape == (2, 2, 5)
    assert got[5].shape == states.shape
    if shift:
        assert not any(v[..., -1].any() for v in (*got[:5], got[5].movedim(-1, 0)))
    for a, b in zip(got[:6], want, strict=False):
        assert_same(a.reshape(b.shape), b)
    for a, b in zip(got[6:], want[6:], strict=True):
        assert_close(a, b)


def test_in_plain_pytorch(way: dict[str, Any]) -> None:
    data, given = problem(CLASSES, torch.float64), options("mixed", CLASSES, torch.float64)
    with longtail.use_backend("reference"):
        got = results(data, False, **given, **way)
    for a, b in zip(got, results(data, True, **given), strict=True):
        assert_close(a, b)


def test_losses_of_one_graph() -> None:
    x, weight, bias, target = problem(13, torch.float64)
    x.requires_grad_()
    found = longtail.linear_row_statistics(x, weight, target, linear_bias=bias)
    first, second = found.log_prob.sum(), (found.entropy * found.log_prob).sum()
    grads = [torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (first, second, first + second)]
    assert_close(grads[2], grads[0] + grads[1])
    loss = longtail.linear_cross_entropy(x, weight, target, linear_bias=bias, reduction="sum")
    assert_close(grads[0], -torch.autograd.grad(loss, x)[0])
    (grad,) = torch.autograd.grad(first, x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_autocast_and_accumulation() -> None:
    data = problem(CLASSES, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = results(data, False, chunk_size=6)
    assert {x.dtype for x in actual} == {torch.float32}
    half = tuple(t.bfloat16() for t in data[:3])
    assert_results(actual, results(double(data), True), results((*half, data[3]), True), factor=2)  # type: ignore[arg-type]
    wide = results(data, False, chunk_size=3, accumulate_dtype=torch.float64)
    assert_results(wide, results(double(data), True), results(data, True))


def test_float16_survives_a_loss_scale() -> None:
    """A mean over many rows is subnormal in float16 logits' gradient, or zero, before the scale that it comes with."""
    rows, scale = 4096, 65536.0
    data = problem(50, torch.float16, rows)
    grads = []
    for kind in (torch.float16, torch.float64):
        x, weight = leaves(data[0].to(kind), data[1].to(kind) * 0.1)
        found = longtail.linear_row_statistics(x, weight, data[3])
        grads.append(torch.autograd.grad(-found.log_prob.mean() * scale, (x, weight)))
    for got, want in zip(*grads, strict=True):
        assert got.isfinite().all()
        assert (got.double() - want).norm() < 4e-3 * want.norm()


def _loss(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    found = longtail.linear_row_statistics(
        x, weight, target, linear_bias=bias, temperature=0.9, softcap=20.0, shift=True, chunk_size=6
    )
    return -(found.log_prob.exp() * 2.0).sum() - 0.01 * found.entropy.mean()


def test_compile_func_and_export() -> None:
    data = problem(13, torch.float64)
    parts = leaves(*data[:3])
    want = torch.autograd.grad(_loss(*parts, data[3]), parts)
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
            return _loss(x, weight, bias, target)

    exported = torch.export.export(Module(), (*parts, data[3])).module()
    found = [torch.autograd.grad(f(*parts, data[3]), parts) for f in (compiled, exported)]
    found.append(torch.func.grad(_loss, (0, 1, 2))(*(p.detach() for p in parts), data[3]))
    for grads in found:
        for got, expected in zip(grads, want, strict=True):
            assert_close(got, expected)
    with torch.no_grad():
        assert_close(compiled(*parts, data[3]), _loss(*parts, data[3]))


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_opcheck(chunk_size: int) -> None:
    x, weight, bias, target = problem(5, torch.float32, rows=6)
    values = cases.operator_options(5, {})
    stats = [x.requires_grad_(), weight.requires_grad_(), bias, target, chunk_size, torch.float32, torch.float32]
    applied = [torch.randn(6, 5), *leaves(x, weight), None, target, chunk_size, *[torch.float32] * 4]
    applied = [y.detach() if isinstance(y, Tensor) else y for y in applied]
    for name, given in (("linear_softmax_row_stats", stats), ("linear_softmax_apply", [*applied, True, True, False])):
        found = torch.library.opcheck(getattr(torch.ops.longtail, name).default, (*given, *values))
        assert set(found.values()) == {"SUCCESS"}, found


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "temperature": ({"temperature": 0}, ValueError, "temperature is 0.0, expected a positive number"),
    "shift": ({"shift": 1}, TypeError, "shift is a int, expected a bool"),
    "shifted_row": ({"input": torch.zeros(16), "target": torch.tensor(1), "shift": True}, ValueError, r"\(L, D\)"),
    "target": ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "target has shape"),
    "probabilities": ({"target": torch.rand(20, 13)}, TypeError, "expected an integer dtype"),
    "weight": ({"linear_weight": torch.zeros(13, 2, 16), "linear_bias": None}, ValueError, r"expected \(C, D\)"),
    "bias": ({"linear_bias": torch.zeros(4)}, ValueError, "linear_bias"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "chunk_size"),
    "bounds": ({"target": torch.full((20,), 13)}, IndexError, "target 13 in row 0"),
    "dtype": ({"input": torch.zeros(20, 16, dtype=torch.int64)}, TypeError, "input has dtype torch.int64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    given, error, text = WRONG[case]
    x, weight, bias, target = problem()
    named: dict[str, Any] = {"input": x, "linear_weight": weight, "target": target, "linear_bias": bias}
    with pytest.raises(error, match=text):
        longtail.linear_row_statistics(**{**named, **given})
