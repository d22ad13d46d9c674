"""Promise: `linear_hierarchical_cross_entropy` is the paper's formula of `input @ linear_weight.T + linear_bias`.

Whatever the chunks, the tree, the way the gradient is made and what computes it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from kernels import CPU, GPU, TRITON, Operators, over
from linear_cases import assert_results, leaves, moved
from linear_hierarchical_cases import ALPHA, N, Problem, formulas, fused, plain, upstream
from longtail import Hierarchy, linear_hierarchical_cross_entropy
from longtail.linear import rows as linear_rows
from tolerances import assert_close, assert_same

MODES = ("auto", *cases.MODES)
TREES = ("one", "one_deep", "two", "flat", "small", "deep", "deep_ordered", "too_deep")
# reduction, normalizer
WAYS = [("none", None), ("sum", None), ("mean", None), ("mean", "count"), ("mean", 3.5), ("mean", torch.tensor(11))]


def modes_of(reduction: str) -> tuple[str, ...]:
    """A gradient that is kept needs a mean or a sum."""
    return ("auto", "backward") if reduction == "none" else MODES


@pytest.mark.parametrize(
    ("kernels", "name", "dtype", "vectors"),
    [
        *over(CPU, TREES, cases.DTYPES[1:2], ["all"]),
        *over(CPU | GPU, ["small", "deep_ordered"], cases.DTYPES, ["all"]),
        *over(GPU, ["shuffled", "too_deep"], cases.DTYPES[1:2], ["all"]),
        *over(CPU, ["small"], cases.DTYPES[1:2], ["", "weight", "class_bias", "sample_weight"]),
        *over(TRITON, ["small"], cases.DTYPES[1:2], ["all"]),
    ],
)
def test_the_papers_formula(kernels: Operators, name: str, dtype: torch.dtype, vectors: str) -> None:
    """In every mode and reduction; ignored rows hold NaN and infinities."""
    data = Problem.of(name, dtype)
    options = data.vectors(*([] if vectors == "all" else [vectors])) if vectors else {}
    ways = [(reduction, normalizer, upstream(reduction, N, dtype)) for reduction, normalizer in WAYS]
    interpreted = kernels.backend == "triton" and kernels.device == "cpu"
    ways = ways[::2][:2] if interpreted else ways  # slow
    truth = formulas(data, torch.float64, ways, **options)
    eager = formulas(data.clear(), dtype, ways, **options) if dtype.itemsize > 2 else [
        plain(data, up, reduction=reduction, normalizer=normalizer, **options) for reduction, normalizer, up in ways
    ]  # fmt: skip
    factor = kernels.gradient_factor(dtype) * (2 if dtype.itemsize > 2 else 3)
    with longtail.use_backend(kernels.backend):
        for (reduction, normalizer, up), want, same in zip(ways, truth, eager, strict=True):
            given = options | {"reduction": reduction, "normalizer": normalizer}
            modes = modes_of(reduction)[: 1 if interpreted else None]
            for mode, chunk_size in zip(modes, (None, 5, None, 7), strict=False):
                got = fused(data, up, device=kernels.device, gradient=mode, chunk_size=chunk_size, **given)
                assert [t.dtype for t in got] == [cases.vector_dtype(dtype), *[dtype] * 3]
                assert_results(got, want, same, factor)
                assert (got[1][data.target == cases.IGNORE] == 0).all()


@pytest.mark.parametrize("name", ["small", "deep_ordered", "too_deep"])
@pytest.mark.parametrize(
    ("reduction", "kind"), [("none", "random"), ("none", "strided"), ("none", "stride0"), ("mean", "random")]
)
def test_chunk_size_changes_nothing(reduction: str, kind: str, name: str) -> None:
    data = Problem.of(name, torch.float64)
    options, up = data.vectors() | {"reduction": reduction}, upstream(reduction, N, torch.float64, kind)
    expected = plain(data, up, **options)
    for mode in modes_of(reduction):
        for chunk_size in (1, 7, N, N + 1):
            assert_results(fused(data, up, chunk_size=chunk_size, gradient=mode, **options), expected, expected)


@pytest.mark.parametrize("gradient", ["auto", "backward"])
def test_gradcheck(gradient: str) -> None:
    """Numerically: nothing of ours says what the gradient should be."""
    data = Problem.of("deep", torch.float64, rows=5).clear()

    def loss(*leaf: Tensor) -> Tensor:
        options = data.vectors() | {"reduction": "none"} if gradient == "backward" else data.vectors()
        return linear_hierarchical_cross_entropy(
            leaf[0], leaf[1], data.target, data.hierarchy, ALPHA, linear_bias=leaf[2], chunk_size=2, gradient=gradient,
            **options,
        )  # fmt: skip

    if gradient == "backward":
        assert torch.autograd.gradcheck(loss, leaves(data.x[:, :4], data.linear_weight[:, :4], data.linear_bias))
        return
    # One backward only, so that central differences take the place of gradcheck; one direction.
    once = leaves(*data[:3])
    ways = [torch.randn(t.shape, generator=cases.generator(i), dtype=t.dtype) for i, t in enumerate(once)]
    grads = torch.autograd.grad(loss(*once) * -1.7, once)
    with torch.no_grad():
        ahead, behind = (loss(*(t + s * d for t, d in zip(once, ways, strict=True))) for s in (1e-5, -1e-5))
    slope = sum((g * d).sum() for g, d in zip(grads, ways, strict=True))
    assert abs(slope + 1.7 * (ahead - behind) / 2e-5) < 1e-8 * abs(slope) + 1e-8


@pytest.mark.parametrize("kernels", over(CPU | GPU))
@pytest.mark.parametrize("margin", [20.0, 100.0, 1e4])
def test_saturation_at_each_level(kernels: Operators, margin: float) -> None:
    """By an identity projection: of each class either way, of the topmost node of the first class, of what is not."""
    hierarchy, names = Problem.of("deep")[4:]
    classes = len(names)
    noise, one = torch.randn(classes, classes, generator=cases.generator(0)), torch.eye(classes)
    node = torch.tensor([path[0] == names[0][0] for path in names]).float()
    x = torch.cat([noise + margin * s * which for which in (one, node) for s in (1.0, -1.0)])
    target = torch.arange(classes).repeat(4)
    data = Problem(x, one, torch.zeros(classes), target, hierarchy, names)
    up = upstream("none", len(x), torch.float32)
    with longtail.use_backend("reference"):
        truth = plain(data._replace(**{k: getattr(data, k).double() for k in ("x", "linear_weight", "linear_bias")}),
                      up.double(), reduction="none")  # fmt: skip
    with longtail.use_backend(kernels.backend):
        got = fused(data, up, device=kernels.device, reduction="none", chunk_size=9)
    # The GEMMs by an identity are exact: losses and the gradients of states keep the digits of each row.
    assert_close(got[0], truth[0], factor=4)
    assert_close(got[1], truth[1], truth[1].float(), factor=4)
    assert_results(got, truth, [t.float() for t in truth], factor=8)


@pytest.mark.parametrize("kernels", over(CPU | GPU))
def test_absent_classes(kernels: Operators) -> None:
    """Of a bias of -inf: without gradient, and the loss of the rest."""
    data = Problem.of("small", torch.float64)
    absent = next(j for j in range(len(data.names)) if j not in data.target)
    data.linear_bias[absent] = -torch.inf
    up = upstream("mean", N, torch.float64)
    (want,) = formulas(data, torch.float64, [("mean", None, up)])
    for mode in MODES:
        with longtail.use_backend(kernels.backend):
            got = fused(data, up, device=kernels.device, gradient=mode, chunk_size=5)
        assert_results(got, want, want)
        assert not got[2][absent].any()
        assert got[3][absent] == 0


@pytest.mark.parametrize("alpha", [0.0, 1.3])
@pytest.mark.parametrize("mode", MODES)
def test_it_is_linear_cross_entropy_where_nothing_is_weighted(mode: str, alpha: float) -> None:
    """Of alpha 0, or up to a factor of a flat tree."""
    data = Problem.of("flat" if alpha else "small", torch.float64)
    options = data.vectors()
    got = fused(data, gradient=mode, alpha=alpha, chunk_size=5, **options)
    x, weight, bias = leaves(*data[:3])
    loss = longtail.linear_cross_entropy(x, weight, data.target, linear_bias=bias, **options)
    loss = loss * torch.tensor(-alpha, dtype=torch.float64).exp()
    want = [loss.detach(), *torch.autograd.grad(loss, (x, weight, bias))]
    assert_results(got, want, want)


def test_alpha_is_a_tenth_where_nobody_says() -> None:
    data = Problem.of()
    given = (*data.clear()[:2], data.target, data.hierarchy)
    loss = linear_hierarchical_cross_entropy(*given)
    assert_same(loss, linear_hierarchical_cross_entropy(*given, 0.1))
    assert loss != linear_hierarchical_cross_entropy(*given, alpha=0.2)


@pytest.mark.parametrize("mode", MODES)
def test_another_ignore_index(mode: str) -> None:
    """A class, or none of them."""
    data = Problem.of("small", torch.float64)
    data = data._replace(x=torch.randn(data.x.shape, dtype=torch.float64), target=data.target.clamp(min=1))
    for index in (1, -7):
        other = data._replace(target=data.target.where(data.target != 1, index))
        got = fused(other, gradient=mode, ignore_index=index, chunk_size=5, **data.vectors())
        want = plain(data._replace(target=data.target.where(data.target != 1, cases.IGNORE)), **data.vectors())
        assert_results(got, want, want)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_ignored_rows_reach_no_gradient(bad: float, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left out of the products, or, as on a GPU, cleared."""
    data, up = Problem.of("deep"), upstream(reduction, N, torch.float32)
    ignored = (data.target == cases.IGNORE)[:, None]
    for cleared in (False, True):
        if cleared:
            monkeypatch.setattr(linear_rows, "_counted", lambda *_: None)
        for mode in modes_of(reduction):
            actual, expected = (
                fused(data._replace(x=data.x.masked_fill(ignored, value)), up, reduction=reduction, gradient=mode,
                      chunk_size=7)
                for value in (bad, 0.0)
            )  # fmt: skip
            for a, b in zip(actual, expected, strict=True):
                assert b.abs().max() > 0
                assert_same(a, b)
            assert not actual[1][ignored[:, 0]].any()


@pytest.mark.parametrize("kernels", over(CPU | GPU))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=cases.name)
def test_nothing_counts(dtype: torch.dtype, kernels: Operators) -> None:
    for rows in (0, 3):
        data = Problem.of("small", dtype, rows)
        data.target.fill_(cases.IGNORE)
        data.x.fill_(torch.nan)
        for reduction, normalizer in (("none", None), ("sum", None), ("mean", None), ("mean", "count"), ("mean", 2.0)):
            for mode in modes_of(reduction):
                up = upstream(reduction, rows, dtype)
                with longtail.use_backend(kernels.backend):
                    loss, *grads = fused(data, up, device=kernels.device, reduction=reduction, normalizer=normalizer,
                                         gradient=mode)  # fmt: skip
                assert loss.isnan() if (reduction, normalizer) == ("mean", None) else not loss.any()
                for grad, leaf in zip(grads, data[:3], strict=True):
                    assert_same(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("layout", ["row_stride", "offset", "transposed", "every_other"])
@pytest.mark.parametrize("which", ["x", "linear_weight"])
def test_layouts(which: str, layout: str) -> None:
    data = Problem.of("small", torch.float64)
    expected = plain(data)
    laid = cases.LAYOUTS[layout](getattr(data, which)).requires_grad_()
    given = {"x": data.x, "linear_weight": data.linear_weight} | {which: laid}
    loss = linear_hierarchical_cross_entropy(
        given["x"], given["linear_weight"], data.target.repeat_interleave(3)[::3], data.hierarchy, ALPHA,
        linear_bias=data.linear_bias, chunk_size=5,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, laid)
    assert_close(loss, expected[0])
    assert_close(grad, expected[1 if which == "x" else 2])


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(2, 6), (2, 2, 3), (12,)])
def test_states_of_sequences(shape: tuple[int, ...], reduction: str, shift: bool) -> None:
    data = Problem.of("small", torch.float64)
    x = torch.randn(N, data.x.shape[1], dtype=torch.float64, generator=cases.generator(4))
    target, options = data.target.view(shape), data.vectors()
    rows = moved(target, cases.IGNORE) if shift else target
    sample_weight = options.pop("sample_weight").view(shape)
    of_rows = (moved(sample_weight, 0.0) if shift else sample_weight).reshape(-1)
    up = upstream(reduction, N, torch.float64)
    want = plain(data._replace(x=x, target=rows.reshape(-1)), up, reduction=reduction, sample_weight=of_rows, **options)
    states = data._replace(x=x.view(*shape, -1), target=target)
    got = fused(states, up.view(shape) if up.dim() else up, reduction=reduction, sample_weight=sample_weight,
                shift=shift, chunk_size=5, **options)  # fmt: skip
    assert got[0].shape == (shape if reduction == "none" else ())
    assert got[1].shape == states.x.shape
    if shift:
        assert not got[1][..., -1, :].any()
    assert_results([g.reshape(w.shape) for g, w in zip(got, want, strict=True)], want, want)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_one_row(reduction: str) -> None:
    """(D,) with a target of no dimension, or one."""
    data = Problem.of("small", torch.float64)
    one = data._replace(x=data.x[0], target=data.target[0])
    want = plain(data._replace(x=data.x[:1], target=data.target[:1]), torch.tensor([2.0]), reduction="none")
    for target in (one.target, one.target[None]):
        got = fused(one._replace(target=target), torch.full(target.shape if reduction == "none" else (), 2.0).double(),
                    reduction=reduction)  # fmt: skip
        assert got[0].shape == (target.shape if reduction == "none" else ())
        assert_results([g.reshape(w.shape) for g, w in zip(got, want, strict=True)], want, want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_narrow_targets(dtype: torch.dtype) -> None:
    data = Problem.of()
    data = data._replace(x=torch.randn(data.x.shape), target=data.target.clamp(min=0))
    narrow = data._replace(target=data.target.to(dtype))
    for a, b in zip(fused(narrow, shift=True), fused(data, shift=True), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("mode", ["auto", "backward"])
@pytest.mark.parametrize("weights", ["weight", "sample_weight"])
def test_float16_at_large_weights(weights: str, mode: str) -> None:
    """The kept gradient neither overflows nor vanishes, whatever the weights and alpha."""
    data = Problem.of("small", torch.float16)
    for size, alpha in ((1e-7, 0.1), (1e7, 0.1), (1.0, 20.0)):
        options: dict[str, Any] = {weights: torch.full((len(data.names) if weights == "weight" else N,), size)}
        up = torch.tensor(1024.0 * torch.tensor(alpha).exp().item() / size)
        options |= {"alpha": alpha, "reduction": "sum"}
        got = fused(data, up, gradient=mode, **options)
        wide = data._replace(x=data.x.double(), linear_weight=data.linear_weight.double(),
                             linear_bias=data.linear_bias.double())  # fmt: skip
        for a, b in zip(got[1:], plain(wide, up.double(), **options)[1:], strict=True):
            assert a.isfinite().all()
            assert (a.double() - b).norm() < 4e-3 * b.norm()


@pytest.mark.parametrize("mode", ["auto", "backward"])
def test_a_float16_mean_survives_a_loss_scale(mode: str) -> None:
    """A mean over many rows folded into a float16 gradient would be subnormal, or zero, before the scale."""
    data, scale = Problem.of("deep", torch.float16, rows=4096), torch.tensor(65536.0)
    data = data._replace(linear_weight=data.linear_weight * 0.1)
    got = fused(data, scale, gradient=mode)
    wide = data._replace(**{k: getattr(data, k).double() for k in ("x", "linear_weight", "linear_bias")})
    for a, b in zip(got[1:], plain(wide, scale.double())[1:], strict=True):
        assert a.isfinite().all()
        assert (a.double() - b).norm() < 4e-3 * b.norm()


def test_float16_gradients_accumulate_without_overflow() -> None:
    """Of a sum over rows of one target: a float16 total would pass 65504 before the upstream gradient shrinks it."""
    rows = 2048
    hierarchy = Hierarchy.from_paths(["a/0", "a/1", "b/2"])
    x, weight = leaves(torch.full((rows, 4), 60.0).half(), torch.zeros(3, 4).half())
    target = torch.full((rows,), 2)
    for mode in MODES:
        loss = linear_hierarchical_cross_entropy(x, weight, target, hierarchy, 0.0, reduction="sum", gradient=mode,
                                                 chunk_size=512)  # fmt: skip
        (grad,) = torch.autograd.grad(loss, weight, torch.tensor(2.0**-10))
        want = (F.softmax(torch.zeros(3), 0) - torch.tensor([0.0, 0.0, 1.0])) * rows * 60 * 2.0**-10
        assert_close(grad, want[:, None].expand(3, 4).double(), factor=4)


def test_wider_accumulation() -> None:
    data = Problem.of("small", torch.float32)
    up = upstream("mean", N, torch.float32)
    got = fused(data, up, chunk_size=3, accumulate_dtype=torch.float64)
    assert got[2].dtype == torch.float32
    assert_results(got, formulas(data, torch.float64, [("mean", None, up)])[0], plain(data, up))
