"""Complement Objective Training equals the procedure written by hand in plain PyTorch, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam

import longtail
from complement_steps import CLASSES, STEPS, assert_equal_models, batches, complement, network, optimizers, run
from longtail.training import ComplementObjectiveTraining, SingleForwardComplementObjectiveTraining
from tolerances import assert_close, assert_same


def by_hand(
    model: nn.Module, steppers: tuple[Any, Any], max_grad_norm: float | None = None, balanced: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Two forwards, two backwards, two steps per batch; the losses of both, and the norms of all gradients."""
    losses, norms = [], []
    for input, target in batches():
        for optimizer, primary in zip(steppers, (True, False), strict=True):
            model.zero_grad()
            logits = model(input)
            loss = F.cross_entropy(logits, target) if primary else complement(logits, target, balanced)
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm or torch.inf))
            optimizer.step()
            losses.append(loss.detach())
    return losses, norms


@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
@pytest.mark.parametrize("balanced", [True, False])
def test_two_steps_equal_the_procedure_by_hand(balanced: bool, max_grad_norm: float | None) -> None:
    model, expected = network(), network()
    ours, theirs = optimizers(model), optimizers(expected)
    training = ComplementObjectiveTraining(model, *ours, balanced=balanced, max_grad_norm=max_grad_norm)
    losses = run(training)
    expected_losses, norms = by_hand(expected, theirs, max_grad_norm, balanced)
    if max_grad_norm is not None:
        assert all(norm > 1.05 * max_grad_norm for norm in norms), "every gradient is long enough to be clipped"
    assert not any(loss.requires_grad for loss in losses)
    assert_close(torch.stack(losses), torch.stack(expected_losses), factor=10)
    assert_equal_models(model, expected)
    for mine, his in zip(ours, theirs, strict=True):
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            assert_close(mine.state[p]["momentum_buffer"], his.state[q]["momentum_buffer"], factor=10)


def test_momenta_are_apart_and_the_second_forward_sees_the_first_step() -> None:
    """What a single state, or a single forward, would give is something else."""
    model, single, shared = network(), network(), network()
    run(ComplementObjectiveTraining(model, *optimizers(model)))
    run(SingleForwardComplementObjectiveTraining(single, *optimizers(single)))
    one = SGD(shared.parameters(), lr=0.05, momentum=0.9)
    by_hand(shared, (one, one))
    for other in (single, shared):
        assert (model[0].weight - other[0].weight).abs().max() > 1e-4


def test_optimizers_over_different_parameters() -> None:
    """The complement step trains the head alone, with Adam; no gradient is left over from one step to the other."""
    model, expected = network(), network()

    def steppers(model: nn.Module) -> tuple[Any, Any]:
        return SGD(model.parameters(), lr=0.05), Adam(model[3].parameters(), lr=0.01)

    run(ComplementObjectiveTraining(model, *steppers(model)))
    by_hand(expected, steppers(expected))
    assert_equal_models(model, expected, factor=100)  # Adam divides by the root of small squares


SCALERS: list[Callable[[], Any]] = [
    lambda: torch.amp.GradScaler("cpu", init_scale=2.0**10),
    lambda: torch.amp.GradScaler("cpu", enabled=False),
]


@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
@pytest.mark.parametrize("variant", [ComplementObjectiveTraining, SingleForwardComplementObjectiveTraining])
@pytest.mark.parametrize("scaler", SCALERS, ids=["enabled", "disabled"])
def test_gradient_scaler_changes_nothing_but_the_scale(
    scaler: Callable[[], Any], variant: Any, max_grad_norm: float | None
) -> None:
    model, expected = network(), network()
    run(variant(model, *optimizers(model), scaler=scaler(), max_grad_norm=max_grad_norm))
    run(variant(expected, *optimizers(expected), max_grad_norm=max_grad_norm))
    assert_equal_models(model, expected)


@pytest.mark.parametrize("variant", [ComplementObjectiveTraining, SingleForwardComplementObjectiveTraining])
def test_overflow_skips_both_steps_and_backs_off_once(variant: Any) -> None:
    model = network(torch.float32)
    before = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    training = variant(
        model,
        *optimizers(model),
        loss=lambda logits, target: 100 * longtail.cross_entropy(logits, target),
        complement_loss=lambda logits, target: -100 * longtail.complement_entropy(logits, target),
        scaler=scaler,
        max_grad_norm=1.0,
    )
    input, target = batches(torch.float32)[0]
    losses = training.step(input, target)
    assert all(loss.isfinite() for loss in losses)
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert_same(p, q)
    assert scaler.get_scale() == 2.0**126
    scaler.update(2.0**8)
    training.step(input, target)
    assert not torch.equal(model[0].weight, before[0].weight)
    assert scaler.get_scale() == 2.0**9, "one growth for both steps"


@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
def test_autocast_equals_the_procedure_by_hand(max_grad_norm: float | None) -> None:
    model, expected = network(torch.float32), network(torch.float32)
    seen = set()

    def loss_function(logits: Tensor, target: Tensor) -> Tensor:
        seen.add(logits.dtype)
        return longtail.cross_entropy(logits, target)

    autocast = torch.autocast("cpu", torch.bfloat16)
    ours, theirs = optimizers(model), optimizers(expected)
    training = ComplementObjectiveTraining(
        model, *ours, loss=loss_function, autocast=autocast, max_grad_norm=max_grad_norm
    )
    for input, target in batches(torch.float32):
        training.step(input, target)
        for optimizer, primary in zip(theirs, (True, False), strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = expected(input)
            loss = longtail.cross_entropy(logits, target) if primary else -longtail.complement_entropy(
                logits, target, balanced=True
            )  # fmt: skip
            loss.backward()
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(expected.parameters(), max_grad_norm)
            optimizer.step()
    assert seen == {torch.bfloat16}
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        assert got.dtype == torch.float32
        assert_same(got, want)


def gradients(model: nn.Module, input: Tensor, target: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    parameters, logits = list(model.parameters()), model(input)
    primary = torch.autograd.grad(F.cross_entropy(logits, target), parameters, retain_graph=True)
    return list(primary), list(torch.autograd.grad(complement(logits, target), parameters))


@pytest.mark.parametrize("optimizers_given", [1, 2])
def test_single_forward_steps_by_the_sum_of_both_gradients(optimizers_given: int) -> None:
    model, expected = network(), network()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    steppers = [SGD(model.parameters(), lr=0.05) for _ in range(optimizers_given)]
    training = SingleForwardComplementObjectiveTraining(model, *steppers)
    for input, target in batches():
        losses = training.step(input, target)
        first, second = gradients(expected, input, target)
        with torch.no_grad():
            for p, a, b in zip(expected.parameters(), first, second, strict=True):
                p -= 0.05 * (a + b)
    assert len(calls) == STEPS
    assert_equal_models(model, expected)
    assert losses.loss > 0 > losses.complement_loss


def test_single_forward_keeps_the_momenta_apart() -> None:
    model, expected = network(), network()
    run(SingleForwardComplementObjectiveTraining(model, *optimizers(model)))
    theirs = optimizers(expected)
    for input, target in batches():
        both = gradients(expected, input, target)
        for optimizer, gradient in zip(theirs, both, strict=True):
            for p, g in zip(expected.parameters(), gradient, strict=True):
                p.grad = g
            optimizer.step()
    assert_equal_models(model, expected)


def test_single_forward_with_one_optimizer_is_complement_cross_entropy() -> None:
    model, expected = network(), network()
    run(SingleForwardComplementObjectiveTraining(model, SGD(model.parameters(), lr=0.05, momentum=0.9)))
    optimizer = SGD(expected.parameters(), lr=0.05, momentum=0.9)
    for input, target in batches():
        optimizer.zero_grad()
        longtail.complement_cross_entropy(expected(input), target).backward()
        optimizer.step()
    assert_equal_models(model, expected)


def test_losses_of_the_callers_own() -> None:
    weight = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    model = network()
    training = ComplementObjectiveTraining(
        model,
        *optimizers(model),
        loss=longtail.CrossEntropyLoss(weight=weight),
        complement_loss=lambda logits, target: 3 * complement(logits, target),
    )
    input, target = batches()[0]
    expected = F.cross_entropy(model(input), target, weight).detach()
    losses = training.step(input, target)
    assert_close(losses.loss, expected)
    assert -3 < losses.complement_loss < 0


def test_images() -> None:
    model = nn.Conv2d(3, CLASSES, 1)
    training = ComplementObjectiveTraining(model, SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1))
    input, target = torch.randn(2, 3, 4, 4), torch.randint(CLASSES, (2, 4, 4))
    first = training.step(input, target)
    for _ in range(20):
        last = training.step(input, target)
    assert last.loss < first.loss


def test_wrong_arguments() -> None:
    model = network()
    one = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="both optimizers are the same object, expected two"):
        ComplementObjectiveTraining(model, one, one)
    with pytest.raises(TypeError, match=r"an optimizer is a Sequential, expected a torch\.optim\.Optimizer"):
        ComplementObjectiveTraining(model, one, model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_grad_norm is -1\.0, expected"):
        SingleForwardComplementObjectiveTraining(model, one, max_grad_norm=-1.0)
    with pytest.raises(TypeError, match="autocast is a str, expected a context manager, or a function that makes one"):
        ComplementObjectiveTraining(model, one, SGD(model.parameters(), lr=0.1), autocast="cpu")  # type: ignore[arg-type]
    for pair in ((one, LBFGS(model.parameters())), (LBFGS(model.parameters()), one)):
        with pytest.raises(ValueError, match="an optimizer is a LBFGS, whose step needs a closure, expected one that"):
            ComplementObjectiveTraining(model, *pair)
