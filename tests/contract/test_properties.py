"""Promise: the invariants of the mathematics hold for rows drawn by hypothesis, not only for chosen ones."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cases
import longtail
import shard_cases
from tolerances import assert_close

values = st.floats(-60, 60, allow_nan=False, width=32)
SMOOTH = st.sampled_from([0.0, 0.1, 0.9])
GAMMA = st.sampled_from([0.0, 0.5, 2.0])


@st.composite
def rows(draw: st.DrawFn, least: int = 1) -> tuple[Tensor, Tensor]:
    """float64 logits [N, C] of moderate and of wild rows alike, and a target in range for each."""
    count, classes = draw(st.integers(1, 4)), draw(st.integers(least, 21))
    flat = draw(st.lists(values, min_size=count * classes, max_size=count * classes))
    target = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    return torch.tensor(flat, dtype=torch.float64).view(count, classes), torch.tensor(target)


def loss_and_grad(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    loss = longtail.cross_entropy(x, target, reduction="none", **options)
    up = torch.linspace(0.5, 1.7, len(target), dtype=torch.float64)
    return loss.detach(), torch.autograd.grad(loss, x, up)[0]


@given(rows(), st.floats(-200, 200), SMOOTH, GAMMA)
def test_shifting_a_row_changes_nothing(
    row: tuple[Tensor, Tensor], shift: float, smoothing: float, gamma: float
) -> None:
    logits, target = row
    options = {"label_smoothing": smoothing, "focal_gamma": gamma, "complement_gamma": -1.0}
    loss, grad = loss_and_grad(logits, target, **options)
    shifted_loss, shifted_grad = loss_and_grad(logits + shift, target, **options)
    torch.testing.assert_close(shifted_loss, loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shifted_grad, grad, rtol=1e-10, atol=1e-10)


@given(rows(), SMOOTH, GAMMA, st.sampled_from([-1.0, 0.0, 3.0]))
def test_gradients_of_a_row_sum_to_zero(
    row: tuple[Tensor, Tensor], smoothing: float, gamma: float, complement: float
) -> None:
    _, grad = loss_and_grad(*row, label_smoothing=smoothing, focal_gamma=gamma, complement_gamma=complement, scale=1.3)
    assert (grad.sum(1).abs() <= 1e-13 + 1e-13 * grad.abs().sum(1)).all()


@given(rows(least=2), st.data(), st.sampled_from([0.0, 0.1]))
def test_combining_any_split_of_a_row_gives_its_statistics(
    row: tuple[Tensor, Tensor], data: st.DataObject, smoothing: float
) -> None:
    """Two pieces, each holding the target beside its own classes, go through the kernel and are joined."""
    logits, target = row
    classes = logits.shape[1]
    left = torch.tensor(data.draw(st.lists(st.booleans(), min_size=classes, max_size=classes), label="left"))
    weight = torch.linspace(0.5, 2.0, classes, dtype=torch.float64)
    whole, pieces = [], []
    for z, g in zip(logits, target.tolist(), strict=True):
        other = torch.arange(classes) != g

        def statistics(columns: Tensor, z: Tensor = z, g: int = g) -> Tensor:
            columns = torch.cat([columns, torch.tensor([g])])
            tail = cases.operator_options(len(columns), {"weight": weight[columns], "label_smoothing": smoothing})
            return torch.ops.longtail.softmax_loss(z[columns][None], torch.tensor([len(columns) - 1]), *tail)[1]

        parts = [statistics((other & side).nonzero().flatten()) for side in (left, ~left)]
        pieces.append(shard_cases.joined(*parts))
        whole.append(statistics(other.nonzero().flatten()))
    assert_close(torch.cat(pieces), torch.cat(whole))


@given(rows(), st.randoms(use_true_random=False), SMOOTH, GAMMA)
def test_the_order_of_the_classes_does_not_matter(
    row: tuple[Tensor, Tensor], random: Any, smoothing: float, gamma: float
) -> None:
    logits, target = row
    classes = logits.shape[1]
    order = list(range(classes))
    random.shuffle(order)
    permutation = torch.tensor(order)
    place = permutation.argsort()
    vectors = {
        "weight": torch.linspace(0.2, 1.9, classes, dtype=torch.float64),
        "class_bias": torch.linspace(-1, 1, classes, dtype=torch.float64),
        "class_margin": torch.linspace(0, 0.5, classes, dtype=torch.float64),
    }
    options = {"label_smoothing": smoothing, "focal_gamma": gamma, "complement_gamma": -1.0, "z_loss": 0.01}
    loss, grad = loss_and_grad(logits, target, **vectors, **options)
    moved = {name: vector[permutation] for name, vector in vectors.items()}
    moved_loss, moved_grad = loss_and_grad(logits[:, permutation], place[target], **moved, **options)
    assert_close(moved_loss, loss)
    assert_close(moved_grad, grad[:, permutation])


@given(rows(), st.floats(0, 8), SMOOTH, GAMMA)
def test_sample_weight_scales_loss_and_gradient(
    row: tuple[Tensor, Tensor], factor: float, smoothing: float, gamma: float
) -> None:
    logits, target = row
    options = {"label_smoothing": smoothing, "focal_gamma": gamma, "complement_gamma": 2.0}
    loss, grad = loss_and_grad(logits, target, **options)
    v = torch.full((len(target),), factor, dtype=torch.float64)
    scaled_loss, scaled_grad = loss_and_grad(logits, target, sample_weight=v, **options)
    assert_close(scaled_loss, loss * factor, factor=10)
    assert_close(scaled_grad, grad * factor, factor=10)


@given(rows(), st.floats(0, 4), st.floats(0, 4), SMOOTH, GAMMA)
def test_the_loss_is_linear_in_the_class_weights(
    row: tuple[Tensor, Tensor], a: float, b: float, smoothing: float, gamma: float
) -> None:
    logits, target = row
    classes = logits.shape[1]
    one = torch.linspace(0.3, 2.0, classes, dtype=torch.float64)
    two = torch.linspace(1.5, 0.1, classes, dtype=torch.float64)
    options = {"label_smoothing": smoothing, "focal_gamma": gamma, "complement_gamma": -1.0}
    parts = [loss_and_grad(logits, target, weight=w, **options) for w in (one, two, a * one + b * two)]
    for first, second, both in zip(*parts, strict=True):
        assert_close(both, a * first + b * second, factor=20)


@given(rows())
def test_members_add_up(row: tuple[Tensor, Tensor]) -> None:
    """Complement cross-entropy is cross-entropy plus its coefficient times complement entropy."""
    logits, target = row
    ce = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    h = longtail.complement_entropy(logits, target, balanced=True, reduction="none")
    assert (h >= -1e-14).all()
    cce = longtail.complement_cross_entropy(logits, target, gamma=-1.5, reduction="none")
    assert_close(cce, ce - 1.5 * h, factor=10)
