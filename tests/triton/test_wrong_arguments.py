"""Promise: the Triton launchers refuse what would be read or written out of place, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cases
import longtail
import sigmoid_cases
from interpreted import interpreted
from longtail.options import SoftmaxOptions

pytest.importorskip("triton")
ops = torch.ops.longtail


@interpreted
def test_softmax() -> None:
    tail = list(cases.operator_options(5, {}))
    logits, target, up = torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), torch.ones(3)
    ops = torch.ops.longtail
    wrong: list[tuple[Any, list[Any]]] = [
        (ops.softmax_loss, [logits, target[:2], *tail]),
        (ops.softmax_loss, [logits, target.int(), *tail]),
        (ops.softmax_loss, [logits.t().contiguous().t(), target, *tail]),
        (ops.softmax_loss, [logits, target, torch.ones(4), *tail[1:]]),
        (ops.softmax_loss, [logits, target, torch.ones(10)[::2], *tail[1:]]),
        (ops.softmax_loss, [logits, target, torch.ones(5).double(), *tail[1:]]),
        *((ops.softmax_loss, [logits, target, *tail[:i], torch.ones(4), *tail[i + 1 :]]) for i in (3, 4, 5)),
        (ops.softmax_loss_and_grad, [up[:2], logits, target, *tail]),
        (ops.softmax_loss_and_grad_, [up, logits[:1].expand(3, 5), target, *tail]),
        (ops.softmax_loss_backward, [up, logits, target, torch.zeros(3, 4), *tail]),
        (ops.scale_grad_, [logits, up[:2], None, -100]),
        (ops.scale_grad_, [logits, up, target[:2], -100]),
        (ops.mean_denominator, [target[:, None], None, -100, 5]),
        (ops.mean_denominator, [target.int(), None, -100, 5]),
        (ops.mean_denominator, [target, torch.ones(4), -100, 5]),
        (ops.mean_denominator, [target, torch.ones(5).half(), -100, 5]),
        (ops.mean_loss, [torch.ones(3, 1), torch.ones(())]),
        (ops.mean_loss, [torch.ones(6)[::2], torch.ones(())]),
        (ops.mean_loss, [torch.ones(3).half(), torch.ones(())]),
    ]
    with longtail.use_backend("triton"):
        for operator, arguments in wrong:
            with pytest.raises(RuntimeError, match="longtail"):
                operator(*arguments)
        with pytest.raises(IndexError, match="target 5 in row 1"):
            longtail.cross_entropy(logits, torch.tensor([0, 5, 1]))


@interpreted
def test_softmax_of_class_probabilities() -> None:
    tail = SoftmaxOptions(softcap=0.0)
    logits, target, up = torch.zeros(3, 5), torch.ones(3, 5), torch.ones(3)
    wrong: list[tuple[str, Any, list[Any]]] = [
        ("target", ops.softmax_loss, [logits, target[:2], *tail]),
        ("target", ops.softmax_loss, [logits, target[:, 0], *tail]),
        ("target", ops.softmax_loss, [logits, target.double(), *tail]),
        ("target", ops.softmax_loss, [logits, target.half(), *tail]),
        ("target", ops.softmax_loss, [logits, torch.ones(3, 10)[:, ::2], *tail]),
        ("target", ops.softmax_loss, [logits, target[:1].expand(3, 5), *tail]),
        ("target", ops.softmax_loss_and_grad, [up, logits, target, *tail]),
        ("target", ops.softmax_loss_and_grad_, [up, logits, target, *tail]),
        ("logits", ops.softmax_loss, [logits[:, :, None], target[:, :, None], *tail]),
        ("weight", ops.softmax_loss, [logits, target, *tail._replace(weight=torch.ones(4))]),
        ("stats", ops.softmax_loss_backward, [up, logits, target, torch.zeros(3, 4), *tail]),
        ("grad_loss", ops.softmax_loss_backward, [up[:2], logits, target, torch.zeros(3, 5), *tail]),
        ("class_scale", ops.softmax_loss, [logits, target, *tail._replace(class_scale=torch.ones(4))]),
        ("class_margin", ops.softmax_loss, [logits, target, *tail._replace(class_margin=torch.ones(5))]),
        ("target_scale", ops.softmax_loss, [logits, target, *tail._replace(target_scale=torch.ones(5))]),
        ("class_mitigation", ops.softmax_loss, [logits, target, *tail._replace(class_mitigation=torch.ones(5))]),
        ("compensation", ops.softmax_loss, [logits, target, *tail._replace(compensation=2.0)]),
        ("focal_gamma", ops.softmax_loss, [logits, target, *tail._replace(focal_gamma=2.0)]),
        ("complement", ops.softmax_loss, [logits, target, *tail._replace(complement_coefficient=-1.0)]),
        ("cross_entropy", ops.softmax_loss, [logits, target, *tail._replace(cross_entropy_coefficient=0.0)]),
    ]
    with longtail.use_backend("triton"):
        for name, operator, arguments in wrong:
            with pytest.raises(RuntimeError, match=f"longtail: {name}"):
                operator(*arguments)


@interpreted
@pytest.mark.parametrize("shape", [(7, 11), (2, 5, 6)])
def test_sigmoid(shape: tuple[int, ...]) -> None:
    n = 7 if len(shape) == 2 else 12
    logits, target, up = torch.zeros(shape), torch.zeros(n, dtype=torch.long), torch.zeros(n)
    c, tail = shape[1], sigmoid_cases.operator_options({})
    wrong: list[tuple[Any, list[Any]]] = [
        (ops.sigmoid_loss, [logits, target[1:], *tail, False]),
        (ops.sigmoid_loss, [logits, target.int(), *tail, False]),
        (ops.sigmoid_loss, [logits, logits.bfloat16(), *tail, False]),
        (ops.sigmoid_loss, [logits, logits[1:], *tail, False]),
        (ops.sigmoid_loss, [logits, torch.zeros(*shape, 2)[..., 0], *tail, False]),
        (ops.sigmoid_loss, [torch.zeros(*shape, 2)[..., 0], target, *tail, False]),
        (ops.sigmoid_loss, [logits[:1].expand(shape), target, *tail, False]),
        *(
            (ops.sigmoid_loss, [logits, target, *sigmoid_cases.operator_options(options), False])
            for options in (
                *({"weight": torch.ones(c - 1)}, {"pos_weight": torch.ones(c).double()}),
                *({"class_bias": torch.ones(2 * c)[::2]}, {"class_alpha": torch.ones(c + 1)}),
                *({"class_gamma": torch.ones(c, 1)}, {"inverse_counts": torch.ones(c).half()}),
                {"class_weight_by_target": True},
            )
        ),
        (ops.sigmoid_loss, [logits, target, None, None, torch.ones(2 * n)[::2], *tail[3:], False]),
        (ops.sigmoid_loss_backward, [up[1:], logits, target, *tail]),
        (ops.sigmoid_loss_backward, [torch.zeros(*shape, 2)[..., 0], logits, target, *tail]),
        (ops.sigmoid_loss_and_grad_, [up.double(), logits, target, *tail, False]),
    ]
    with longtail.use_backend("triton"):
        for operator, arguments in wrong:
            with pytest.raises(RuntimeError, match="longtail"):
                operator(*arguments)
        target[1] = c
        with pytest.raises(IndexError, match=f"target {c} in row 1"):
            ops.sigmoid_loss(logits, target, *tail, False)


@interpreted
def test_an_image_target_out_of_range_is_named() -> None:
    target = torch.tensor([[0, 5, 1]])
    with longtail.use_backend("triton"), pytest.raises(IndexError, match="target 5 in row 1"):
        longtail.cross_entropy(torch.zeros(1, 5, 3), target)
