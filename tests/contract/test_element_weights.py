"""Promise: weights of elements in every shape that torch broadcasts, and numbers of each class, mean what they say."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import longtail
from multi_label_cases import KINDS, data, dense, reduced, with_grad
from tolerances import assert_close, assert_same

BACKENDS = ("cpu", "reference")


def broadcastable(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every shape that broadcasts to it, leading ones left out too; not [W] of images, which torch reads otherwise."""
    whole = list(itertools.product(*((1, n) for n in shape)))
    found = {size[k:] for size in whole for k in range(len(size) + 1)}
    return sorted(size for size in found if len(shape) <= 2 or len(size) != 1 or size[0] not in (shape[1], shape[-1]))


SHAPES = ((4, 3), (5,), (2, 3, 4), (3, 1), (1, 4))
CASES = [(shape, size) for shape in SHAPES for size in broadcastable(shape)]
CASES += [((2, 3, 2, 5), size) for size in ((3, 1, 1), (2, 1, 1, 1), (2, 5), (5,), (1, 3, 2, 1), (2, 3, 2, 5))]


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
def test_every_shape_is_torchs(shape: tuple[int, ...], size: tuple[int, ...], name: str) -> None:
    value = 0.2 + 2 * torch.rand(size, generator=cases.generator(1), dtype=torch.float64)
    for kind in ("hard", "soft"):
        z, y = data(shape, kind)
        for reduction in ("none", "sum", "mean"):
            options = {name: value, "reduction": reduction}
            exact = with_grad(lambda x, y=y, o=options: F.binary_cross_entropy_with_logits(x, y, **o), z)
            for mode in cases.MODES:
                found = with_grad(
                    lambda x, y=y, o=options, m=mode: longtail.sigmoid_cross_entropy(x, y, gradient=m, **o), z
                )
                for got, expected in zip(found, exact, strict=True):
                    assert_close(got, expected, what=f"{kind} {reduction} {mode}", factor=4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=cases.name)
def test_both_in_every_dtype(dtype: torch.dtype, backend: str) -> None:
    weight, pos_weight = (torch.rand(s, generator=cases.generator(2)) + 0.2 for s in ((6, 1), (6, 37)))
    for kind in ("bool", "soft"):
        z, y = data((6, 37), kind, dtype)
        options = {"weight": weight, "pos_weight": pos_weight, "reduction": "none"}
        with longtail.use_backend(backend):
            found = with_grad(lambda x, y=y, o=options: longtail.sigmoid_cross_entropy(x, y, **o), z)
        wide = {"weight": weight.double(), "pos_weight": pos_weight.double(), "reduction": "none"}
        soft = dense(y, z)
        exact = with_grad(lambda x, t=soft, o=wide: F.binary_cross_entropy_with_logits(x, t, **o), z.double())
        assert_close(found[0], exact[0], what=kind)
        assert_close(found[1], exact[1], what=kind, factor=4)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_every_other_option(backend: str, mode: str) -> None:
    """The same vector of classes, once as it is and once written out for each element."""
    vector = torch.rand(5, generator=cases.generator(3), dtype=torch.float64) * 3
    others = {"gamma": 1.5, "alpha": vector / 3, "gamma_negative": 3.0, "clip": 0.1, "detach": True}
    others |= {"negative_scale": 2.0, "class_bias": vector - 1, "sample_weight": torch.rand(6).double()}
    for shape, size in (((6, 5), (6, 5)), ((6, 5, 2), (6, 5, 2))):
        z, y = data(shape, "soft")  # hard ones among them
        y[4, :2] = 255
        rows = {"sample_weight": others["sample_weight"].reshape(6, *[1] * (len(shape) - 2)).expand(6, *shape[2:])}
        column = vector.reshape(5, *[1] * (len(shape) - 2)).expand(size).contiguous()
        for name, smoothing, reduction in itertools.product(
            ("weight", "pos_weight"), (0.0, 0.1), ("none", "rows", "sum", "mean")
        ):
            results = []
            for given in (column, vector):
                options = {**others, **rows, name: given, "reduction": reduction, "label_smoothing": smoothing}
                with longtail.use_backend(backend):
                    results.append(
                        with_grad(
                            lambda x, o=options, y=y: longtail.sigmoid_focal_loss(
                                x, y, ignore_index=255, gradient=mode, **o
                            ),
                            z.masked_fill(y == 255, torch.nan),
                        )
                    )
            for got, wanted in zip(*results, strict=True):
                assert_close(got, wanted, what=f"{shape} {name} {reduction}", factor=8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits(backend: str) -> None:
    """Right ones cost 0, wrong ones are infinite, as torch's; whichever way the weights of positives come."""
    z = torch.tensor([[torch.inf, -torch.inf, torch.inf, -torch.inf]])
    y = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    for pos_weight in (torch.full((4,), 2.0), torch.full((2, 4), 2.0), torch.full((2, 1), 2.0)):
        with longtail.use_backend(backend):
            loss = longtail.sigmoid_cross_entropy(
                z.expand(2, 4), y.expand(2, 4), pos_weight=pos_weight, reduction="none"
            )
        assert loss.tolist() == [[0.0, torch.inf, torch.inf, 0.0]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(7,), (1, 7), (4, 7), (4, 1)], ids=str)
def test_a_weight_of_positives_says_nothing_of_negatives(size: tuple[int, ...], backend: str) -> None:
    """A class without positives divides by 0: infinite, in value and gradient of no negative; nor of ignored ones."""
    z, y = data((4, 7), "hard", torch.float32)
    y[0], y[3, 1] = 255, 0
    z[2, 3], z[3, 1] = torch.nan, torch.inf
    y[2, 3] = 255
    pos_weight = torch.full(size, torch.inf)
    for gamma in (0.0, 0.5, 2.0):
        options = {"alpha": None, "gamma": gamma, "ignore_index": 255}
        with longtail.use_backend(backend):
            found, plain = (
                with_grad(lambda x, w=w, o=options: longtail.sigmoid_focal_loss(x, y, pos_weight=w, **o), z)
                for w in (pos_weight, None)
            )
        negative = y != 1
        for got, expected in zip(found, plain, strict=True):
            assert_same(got[negative], expected[negative])
        assert found[0][~negative].isinf().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_each_class(kind: str, mode: str, backend: str) -> None:
    """alpha, gamma and class_bias: each column as by itself."""
    alpha, gamma = torch.tensor([0.0, 0.25, 0.7, 1.0]), torch.tensor([0.0, 0.5, 2.0, 5.0])
    bias = torch.tensor([-3.0, 0.0, 1.5, 0.2])
    for shape in ((6, 4), (2, 4, 3)):
        z, y = data(shape, kind)
        soft = dense(y, z)
        for reduction in ("none", "sum"):
            options = {"alpha": alpha, "gamma": gamma, "class_bias": bias, "reduction": reduction, "gradient": mode}
            with longtail.use_backend(backend):
                found = with_grad(lambda x, o=options, y=y: longtail.sigmoid_focal_loss(x, y, **o), z)

            def columns(x: Tensor, y: Tensor = soft, reduction: str = reduction) -> Tensor:
                x = x.unbind(1)
                losses = [
                    longtail.binary_focal_loss(x[c] + bias[c], y[:, c], alpha[c].item(), gamma[c].item(), "none")
                    for c in range(4)
                ]
                return reduced(torch.stack(losses, 1), reduction)

            for got, expected in zip(found, with_grad(columns, z), strict=True):
                assert_close(got, expected, what=f"{shape} {reduction}", factor=4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_label_smoothing(kind: str, backend: str) -> None:
    """The same as smoothed targets, of labels as of class indices; and as torch's binary cross-entropy of these."""
    for shape in ((6, 4), (2, 4, 3)):
        z, y = data(shape, kind)
        for epsilon in (0.0, 0.1, 1.0):
            smooth = (1 - epsilon) * dense(y, z) + epsilon / 2
            weight, pos_weight = torch.rand(4, dtype=torch.float64), 2 * torch.rand(4, dtype=torch.float64)
            options = {"weight": weight, "pos_weight": pos_weight, "reduction": "none"}
            given = {**options, "label_smoothing": epsilon}
            with longtail.use_backend(backend):
                found = with_grad(lambda x, o=given, y=y: longtail.sigmoid_cross_entropy(x, y, **o), z)
            column = {name: v.reshape(4, *[1] * (len(shape) - 2)) for name, v in options.items() if name != "reduction"}
            exact = with_grad(
                lambda x, o=column, t=smooth: F.binary_cross_entropy_with_logits(x, t, reduction="none", **o), z
            )
            for got, expected in zip(found, exact, strict=True):
                assert_close(got, expected, what=f"{shape} {epsilon}", factor=4)
            focal = longtail.sigmoid_focal_loss(z, y, label_smoothing=epsilon)
            assert_close(focal, longtail.sigmoid_focal_loss(z, smooth), factor=4)


def test_smoothing_leaves_ignored_elements_out() -> None:
    z, y = data((6, 4), "soft", torch.float32)
    y[4] = -1
    z[4] = torch.nan
    found = with_grad(lambda x: longtail.sigmoid_cross_entropy(x, y, label_smoothing=0.3, ignore_index=-1), z)
    kept = y[:, 0] != -1
    exact = F.binary_cross_entropy_with_logits(z[kept].double(), 0.7 * y[kept].double() + 0.15)
    assert_close(found[0], exact)
    assert torch.equal(found[1][4], torch.zeros(4))


@pytest.mark.parametrize(
    "module", [longtail.SigmoidFocalLoss, longtail.BinaryFocalLoss, longtail.SigmoidCrossEntropyLoss]
)
def test_numbers_of_each_class_are_buffers(module: Any) -> None:
    z, y = data((6, 4), "hard", torch.float32)
    alpha, gamma = torch.rand(4), torch.rand(4)
    plain = module(alpha=0.3, gamma=1.0)
    assert not plain.state_dict()
    loss = module(alpha=alpha, gamma=gamma)
    assert set(loss.state_dict()) == {"alpha", "gamma"}
    plain.alpha, plain.gamma = alpha, gamma
    expected = longtail.sigmoid_cross_entropy(z, y, alpha=alpha, gamma=gamma)
    for again in (loss, plain, copy.deepcopy(loss), pickle.loads(pickle.dumps(plain))):
        assert_same(again(z, y), expected)
        assert "alpha=[4], gamma=[4]" in repr(again) or "gamma=[4], alpha=[4]" in repr(again)
    assert loss.double().alpha.dtype == torch.float64
    assert_close(
        loss(z.double(), y.double()), longtail.sigmoid_cross_entropy(z.double(), y.double(), alpha=alpha, gamma=gamma)
    )
    other = module(alpha=torch.ones(4), gamma=torch.ones(4))
    other.load_state_dict(plain.state_dict())
    assert_same(other(z, y), expected)
    plain.persistent = False
    assert not plain.state_dict()
    for name, wrong in (("alpha", [0.5] * 4), ("alpha", torch.ones(4).long()), ("gamma", "two"), ("gamma", -1.0)):
        with pytest.raises((TypeError, ValueError), match=name):
            setattr(plain, name, wrong)
    assert_same(plain(z, y), expected)
    plain.alpha, plain.gamma = 0.3, 1.0
    assert not dict(plain.named_buffers()).keys() & {"alpha", "gamma"}
    assert_same(plain(z, y), longtail.sigmoid_cross_entropy(z, y, alpha=0.3, gamma=1.0))


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_shapes_that_do_not_fit(name: str) -> None:
    z, y = data((4, 3), "hard", torch.float32)
    for size in ((4,), (2, 3), (3, 1), (1, 4, 3), (4, 3, 1), (0, 3)):
        with pytest.raises(ValueError, match=rf"^{name} has shape"):
            longtail.sigmoid_cross_entropy(z, y, **{name: torch.ones(size)})
    for wrong in (torch.ones(4, 1).long(), torch.ones(4, 1).requires_grad_(), [1.0, 1.0, 1.0]):
        with pytest.raises((TypeError, ValueError), match=name):
            longtail.sigmoid_cross_entropy(z, y, **{name: wrong})
    with pytest.raises(ValueError, match=rf"{name} has shape \[4, 1\], expected \[3\]"):
        longtail.sigmoid_cross_entropy(z, torch.arange(4) % 3, **{name: torch.ones(4, 1)})
