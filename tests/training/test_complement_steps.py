"""Complement Objective Training: what is refused before a weight moves, and what is not."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import longtail
from allocations import peak_while
from complement_steps import CLASSES, FEATURES, assert_equal_models, batches, complement, network, optimizers, run
from longtail.training import ComplementObjectiveTraining, SingleForwardComplementObjectiveTraining
from tolerances import assert_close, assert_same

VARIANTS: list[Any] = [ComplementObjectiveTraining, SingleForwardComplementObjectiveTraining]


@contextlib.contextmanager
def bfloat16() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("autocast", [bfloat16(), bfloat16, contextlib.nullcontext], ids=["single use", "made", "none"])
def test_every_forward_has_its_context(autocast: Any, variant: Any) -> None:
    model, expected = network(torch.float32), network(torch.float32)
    plain = None if autocast is contextlib.nullcontext else torch.autocast("cpu", torch.bfloat16)
    ours = variant(model, *optimizers(model), autocast=autocast)
    theirs = variant(expected, *optimizers(expected), autocast=plain)
    for input, target in batches(torch.float32):
        ours.step(input, target)
        theirs.step(input, target)
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        assert_same(got, want)


def test_an_infinite_norm_clips_nothing() -> None:
    model, expected = network(), network()
    run(ComplementObjectiveTraining(model, *optimizers(model), max_grad_norm=torch.inf))
    run(ComplementObjectiveTraining(expected, *optimizers(expected)))
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        assert_same(got, want)


IN_PLACE: dict[str, Any] = {
    "module": longtail.CrossEntropyLoss(gradient="inplace"),
    "partial": functools.partial(longtail.cross_entropy, gradient="inplace"),
    "function": lambda logits, target: longtail.cross_entropy(logits, target, gradient="inplace"),
    "own": lambda logits, target: F.cross_entropy(logits.mul_(2.0), target),
}


@pytest.mark.parametrize("optimizers_given", [1, 2])
@pytest.mark.parametrize("loss", IN_PLACE)
def test_a_loss_that_overwrites_the_logits(loss: str, optimizers_given: int) -> None:
    """The complement loss would read what the first has written: refused, where two forwards train as ever."""
    model, before, expected = network(), network(), network()
    with pytest.raises(ValueError, match=r"writ.* over the logits, which the complement loss reads after it: expected"):
        run(SingleForwardComplementObjectiveTraining(model, *optimizers(model)[:optimizers_given], loss=IN_PLACE[loss]))
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert_same(p, q)
    if loss != "own":
        run(ComplementObjectiveTraining(model, *optimizers(model), loss=IN_PLACE[loss]))
        run(ComplementObjectiveTraining(expected, *optimizers(expected)))
        # Parameters alone: the forward of the refused step has moved the running statistics.
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            assert_close(p, q, factor=10)


@pytest.mark.parametrize("output", [lambda logits: (logits, None), lambda logits: {"logits": [logits]}])
def test_logits_among_other_outputs_are_watched_too(output: Any) -> None:
    class Outputs(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return output(super().forward(input))

    def logits_of(outputs: Any) -> Tensor:
        return outputs["logits"][0] if isinstance(outputs, dict) else outputs[0]

    model = Outputs(FEATURES, CLASSES, dtype=torch.float64)
    training = SingleForwardComplementObjectiveTraining(
        *(model, SGD(model.parameters(), lr=0.1)),
        loss=lambda outputs, target: longtail.cross_entropy(logits_of(outputs), target, gradient="inplace"),
        complement_loss=lambda outputs, target: complement(logits_of(outputs), target),
    )
    with pytest.raises(ValueError, match="the loss has written over the logits"):
        training.step(*batches()[0])


def test_a_complement_loss_may_overwrite_what_the_first_loss_has_done_with() -> None:
    model, expected = network(), network()
    for trained, gradient in ((model, "inplace"), (expected, "forward")):
        complement_loss = functools.partial(longtail.complement_cross_entropy, gradient=gradient)
        first = longtail.CrossEntropyLoss(gradient="forward")
        run(
            SingleForwardComplementObjectiveTraining(
                trained, *optimizers(trained), loss=first, complement_loss=complement_loss
            )
        )
    assert_equal_models(model, expected)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("without", ["primary", "complement"])
def test_an_optimizer_without_gradients_is_refused_before_the_other_steps(
    without: str, variant: Any, scaled: bool
) -> None:
    model, before, elsewhere = network(), network(), nn.Linear(2, 2)
    pair = [SGD(model.parameters(), lr=0.1), SGD(elsewhere.parameters(), lr=0.1)]
    if without == "primary":
        pair.reverse()
    training = variant(model, *pair, scaler=torch.amp.GradScaler("cpu", enabled=scaled))
    with pytest.raises(ValueError, match=f"the {without} optimizer has no parameter with a gradient, expected"):
        run(training)
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert_same(p, q)


class Heads(nn.Module):
    """Two heads; perhaps within checkpoints, whose parameters the autograd graph does not show."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.hidden = hidden
        self.first, self.second = (nn.Linear(FEATURES, CLASSES, dtype=torch.float64) for _ in range(2))

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        if not self.hidden:
            return self.first(input), self.second(input)
        input = input.clone().requires_grad_()
        first, second = (checkpoint(head, input, use_reentrant=True) for head in (self.first, self.second))
        return first, second


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_optimizer_of_what_only_its_loss_reaches(variant: Any, hidden: bool) -> None:
    """Two heads, each with its loss and its optimizer, under a gradient scaler."""
    model = Heads(hidden)
    before = copy.deepcopy(model)
    calls = 0

    def complement_loss(logits: Any, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return complement(logits[1], target)

    training = variant(
        *(model, SGD(model.first.parameters(), lr=0.1), SGD(model.second.parameters(), lr=0.1)),
        loss=lambda logits, target: F.cross_entropy(logits[0], target),
        complement_loss=complement_loss,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10),
    )
    for batch in batches():
        training.step(*batch)
    assert calls - len(batches()) == (variant is ComplementObjectiveTraining and not hidden), "the first batch checks"
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, q)


def test_logits_are_gone_when_the_gradients_of_the_parameters_are_made() -> None:
    model = nn.Linear(300, 300, bias=False)
    training = ComplementObjectiveTraining(
        *(model, SGD(model.parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)),
        loss=longtail.CrossEntropyLoss(gradient="forward"),
        complement_loss=longtail.ComplementCrossEntropyLoss(gradient="forward"),
    )
    batch = torch.randn(300, 300), torch.arange(300)
    training.step(*batch)
    peak, _ = peak_while(lambda: training.step(*batch))
    assert peak < 2.5 * model.weight.nbytes, (
        "logits, of the weight's size, and their gradient, then that and the weight's"
    )
