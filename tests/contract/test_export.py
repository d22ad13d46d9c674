"""Promise: an exported graph differentiates, and so does a call of the operators themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
import longtail
from longtail.options import SigmoidOptions
from tolerances import assert_close

ROWS, FEATURES, CLASSES = 6, 8, 13
TARGET = torch.tensor([0, cases.IGNORE, 2, 6, 12, 3])
WEIGHT = torch.rand(CLASSES, generator=cases.generator(1)) + 0.5


class Classifier(nn.Module):
    """A linear layer and one of the losses."""

    def __init__(self, loss: str, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(FEATURES, CLASSES)
        self.loss, self.mode = loss, mode

    def forward(self, x: Tensor, target: Tensor) -> Any:
        weight, bias, mode = self.linear.weight, self.linear.bias, self.mode
        if self.loss == "linear":
            return longtail.linear_cross_entropy(x, weight, target, linear_bias=bias, gradient=mode)
        z = self.linear(x) * 1.0
        if self.loss == "softmax":
            options = {"weight": WEIGHT, "complement_gamma": -1.0, "focal_gamma": 2.0}
            return longtail.cross_entropy(z, target, gradient=mode, **options)
        if self.loss == "rows":
            return longtail.cross_entropy(z, target, gradient=mode, reduction="none").square().sum()
        if self.loss == "images":
            z = z.t().reshape(1, CLASSES, 2, 3)
            return longtail.cross_entropy(z, target.reshape(1, 2, 3), gradient=mode, return_stats=True)[0]
        if self.loss == "sigmoid":
            return longtail.sigmoid_focal_loss(z, target, gradient=mode, reduction="mean", weight=WEIGHT)
        hot = nn.functional.one_hot(target.clamp(min=0), CLASSES).float()
        if self.loss == "soft":
            return longtail.cross_entropy(z, hot, WEIGHT, label_smoothing=0.1)
        return longtail.sigmoid_cross_entropy(z, hot, gradient=mode, reduction="none").square().sum()


LOSSES = ("softmax", "rows", "images", "sigmoid", "elements", "linear", "soft")


def outcome(module: nn.Module, *data: Tensor) -> list[Tensor]:
    loss = module(*data)
    return [loss.detach(), *torch.autograd.grad(loss * 2.5, list(module.parameters()))]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("loss", "mode"), [(loss, mode) for loss in LOSSES for mode in (cases.MODES if loss != "soft" else cases.MODES[:1])]
)
def test_exported_module_trains(loss: str, mode: str, strict: bool) -> None:
    """As it is exported, and decomposed; class probabilities ("soft") have one mode."""
    x = torch.randn(ROWS, FEATURES, generator=cases.generator(0))
    module = Classifier(loss, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (x, TARGET), strict=strict)
        exported = [program.module(), program.run_decompositions().module()]
    other = torch.randn(ROWS, FEATURES, generator=cases.generator(5))
    wanted = outcome(module, other, TARGET)
    for got, want in [pair for one in exported for pair in zip(outcome(one, other, TARGET), wanted, strict=True)]:
        assert want.abs().max() > 0
        assert_close(got, want.double(), factor=4)


def _hot(target: Tensor) -> Tensor:
    return nn.functional.one_hot(target, CLASSES).float()


# Calls whose denominator depends on the number of rows.
OF_THE_BATCH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows": lambda z, t: longtail.cross_entropy(z, t, normalizer=z.shape[0]),
    "half_the_rows": lambda z, t: longtail.cross_entropy(z, t, normalizer=z.shape[0] / 2),
    "probabilities": lambda z, t: longtail.cross_entropy(z, _hot(t), normalizer=z.shape[0] * 1.5),
    "probabilities_mean": lambda z, t: longtail.cross_entropy(z, _hot(t)),
    "linear": lambda z, t: longtail.linear_cross_entropy(z, z.new_ones(4, CLASSES), t % 4, normalizer=z.shape[0]),
    "sigmoid": lambda z, t: longtail.sigmoid_focal_loss(z, t, reduction="mean", normalizer=z.shape[0]),
    "sigmoid_mean": lambda z, t: longtail.sigmoid_focal_loss(z, t, reduction="mean"),
    "elements": lambda z, t: longtail.sigmoid_focal_loss(z, _hot(t), reduction="mean", normalizer=z.shape[0] / 2),
    "elements_mean": lambda z, t: longtail.sigmoid_focal_loss(z, _hot(t), reduction="mean"),
    "elements_rows": lambda z, t: longtail.sigmoid_focal_loss(z, _hot(t), reduction="mean", normalizer="rows"),
}


class Loss(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = OF_THE_BATCH[name]

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        return self.function(z, target)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_exported_batch_of_any_size(name: str, strict: bool) -> None:
    def batch(rows: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, CLASSES, generator=cases.generator(rows)), torch.arange(rows) % CLASSES

    rows = torch.export.Dim("rows")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = {"z": {0: rows}, "target": {0: rows}}
        program = torch.export.export(Loss(name), batch(6), dynamic_shapes=shapes, strict=strict)
    for size in (2, 9):
        assert_close(program.module()(*batch(size)), Loss(name)(*batch(size)).double())


def _arguments(operator: str, seed: int = 0) -> tuple[list[Any], int]:
    """Arguments of an operator in float64, and which of them is differentiated in."""
    x, target = torch.randn(ROWS, FEATURES, dtype=torch.float64, generator=cases.generator(seed)), TARGET
    z = torch.randn(ROWS, CLASSES, dtype=torch.float64, generator=cases.generator(seed + 1))
    options = cases.operator_options(CLASSES, cases.options("mixed", CLASSES, target, torch.float64))
    binary = SigmoidOptions(ignore_index=cases.IGNORE, alpha=0.25, gamma=2.0, gamma_negative=3.0, clip=0.05)
    up, wide = [torch.ones(ROWS, dtype=torch.float64)], torch.float64
    weight = torch.randn(CLASSES, FEATURES, dtype=torch.float64, generator=cases.generator(7))
    linear = [x, weight, None, target, 4, wide, wide]
    soft = cases.options("all_of_probabilities", CLASSES, target, torch.float64)
    y = cases.probabilities(ROWS, CLASSES, torch.float64)
    return {
        "softmax_loss": ([z, target, *options], 0),
        "softmax_loss, probabilities": ([z, y, *cases.operator_options(CLASSES, soft)], 0),
        "softmax_loss_and_grad": ([*up, z, target, *options], 1),
        "sigmoid_loss": ([z, target, *binary, False], 0),
        "sigmoid_loss_and_grad": ([*up, z, target, *binary, True], 1),
        "linear_softmax_loss": ([*linear, *options], 0),
    }[operator]


OPERATORS = (
    "softmax_loss",
    "softmax_loss, probabilities",
    "softmax_loss_and_grad",
    "sigmoid_loss",
    "sigmoid_loss_and_grad",
    "linear_softmax_loss",
)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_differentiate(operator: str) -> None:
    arguments, place = _arguments(operator)

    def losses(value: Tensor) -> Tensor:
        given = [value if i == place else x for i, x in enumerate(arguments)]
        result = getattr(torch.ops.longtail, operator.split(",")[0])(*given)
        return result if isinstance(result, Tensor) else result[0]

    value = arguments[place].requires_grad_()
    assert torch.autograd.gradcheck(losses, value)
    (grad,) = torch.autograd.grad(losses(value).square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(grad.square().sum(), value)


def test_operators_refuse_constants_that_require_grad() -> None:
    arguments, _ = _arguments("softmax_loss")
    arguments[2].requires_grad_()
    loss = torch.ops.longtail.softmax_loss(*arguments)[0].sum()
    with pytest.raises(RuntimeError, match=r"softmax_loss is not differentiable in its argument 2"):
        loss.backward()
