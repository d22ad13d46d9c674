"""One batch through all operators of a family - loss, backward, both, both in place - against float64.

Kernels, those of a backend or of the emulation, fill a batch with results; the batch checks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

import cases
import sigmoid_cases
from layouts import assert_padding_untouched, laid
from longtail.ops import fallback
from longtail.ops.layout import row_count, to_images, to_rows
from longtail.options import SigmoidOptions, SoftmaxOptions
from tolerances import assert_close, assert_same

# The order of the sum of a row's U, and the hardware's exp, cost more digits than eager PyTorch's sums do.
STATS_FACTOR = 4


def as_rows(x: Tensor) -> Tensor:
    return to_rows(x) if x.dim() == 3 else x


def random_case(shape: Sequence[int], dtype: torch.dtype = torch.float32, ignore: bool = True) -> tuple[Tensor, Tensor]:
    """Logits [N, C] or [N, C, P] whose ignored rows or pixels hold what nothing may read, and targets, one a row."""
    n, classes, *pixels = shape
    logits, target = cases.random_case(n * pixels[0] if pixels else n, classes, dtype, ignore=ignore)
    logits = cases.poison_ignored(logits, target)
    return (to_images(logits, torch.Size(shape)) if pixels else logits), target


def probability_case(
    shape: tuple[int, int], dtype: torch.dtype = torch.float32, target_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Logits and class probabilities [N, C]."""
    logits, _ = cases.random_case(*shape, dtype, ignore=False)
    return logits, cases.probabilities(*shape, target_dtype or dtype)


class Kernels(Protocol):
    """What computes a batch."""

    device: str
    again: bool  # whether another order of the same work can be had

    def gradient_factor(self, dtype: torch.dtype) -> float:
        """How many times the bound a gradient may be off."""

    def softmax(self, batch: SoftmaxBatch, otherwise: bool = False) -> None:
        """Fills z, losses, stats and grads; otherwise: in that other order."""

    def sigmoid(self, batch: SigmoidBatch, otherwise: bool = False) -> None:
        """Fills z, losses and grads."""

    def scale(self, grad: Tensor, factor: Tensor, target: Tensor | None = None) -> None:
        """grad times factor in place, but for what target says is ignored."""


class ProbabilityKernels(Kernels, Protocol):
    """Those that take class probabilities, too."""

    def probabilities(self, batch: ProbabilityBatch, otherwise: bool = False) -> None:
        """Fills z, losses, stats and grads."""


class Batch:
    """Logits and what belongs to them; results of the operators in order, of which the last works in place."""

    z: Tensor  # the logits as they are read
    losses: list[Tensor]
    grads: list[Tensor]
    stats: Sequence[Tensor] = ()

    def __init__(
        self,
        kernels: Kernels,
        case: tuple[Tensor, Tensor],
        tail: Sequence[Any],
        up: Tensor,
        layout: str = "contiguous",
        grad_layout: str | None = None,
    ) -> None:
        self.kernels, self.layout, self.grad_layout = kernels, layout, grad_layout or layout
        self.logits, self.target, self.up = (x.to(kernels.device) for x in (*case, up))
        self.tail = [x.to(kernels.device) if isinstance(x, Tensor) else x for x in tail]

    def laid(self, x: Tensor) -> Tensor:
        return laid(x, self.layout)

    def run(self, otherwise: bool = False) -> None:
        raise NotImplementedError

    def check(self, factor: float = 1.0) -> None:
        raise NotImplementedError

    def outputs(self) -> list[Tensor]:
        return [x.clone() for x in (*self.losses, *self.stats, *self.grads)]

    def wide(self) -> list[Any]:
        return [x.double() if isinstance(x, Tensor) else x for x in self.tail]

    def check_gradients(self, truth: Tensor, eager: Tensor, factor: float) -> None:
        factor *= self.kernels.gradient_factor(self.logits.dtype)
        for grad in self.grads:
            assert grad.dtype == self.logits.dtype
            assert_close(as_rows(grad), truth, eager, what="gradient", factor=factor)
            if "far_apart" not in (self.layout, self.grad_layout):
                assert_padding_untouched(grad, "gradient")
        assert_same(self.z, self.logits, "logits")


class SoftmaxBatch(Batch):
    def __init__(
        self,
        kernels: Kernels,
        case: tuple[Tensor, Tensor],
        options: cases.Options,
        up: Tensor | None = None,
        **how: str,
    ) -> None:
        logits, target = case
        if up is None:
            up = cases.upstreams(target.shape, cases.vector_dtype(logits.dtype))["random"]
        super().__init__(kernels, case, cases.operator_options(logits.shape[1], options), up, **how)

    def run(self, otherwise: bool = False) -> None:
        self.kernels.softmax(self, otherwise)

    def check(self, factor: float = 1.0) -> None:
        """Every output against float64, and the ignored rows."""
        rows = as_rows(self.logits)
        truth = fallback.softmax_loss_and_grad(self.up.double(), rows.double(), self.target, *self.wide())
        eager = fallback.softmax_loss_and_grad(self.up, rows, self.target, *self.tail)
        for loss in self.losses:
            assert_close(loss, truth[0], eager[0], what="loss", factor=factor)
        defined = ~truth[0].isnan()
        known = [0, 1, 2, 3, 4] if SoftmaxOptions(*self.tail).entropy else [0, 1, 3, 4]  # t is for those who ask for it
        for stats in self.stats:
            parts = (stats[defined][:, known], truth[1][defined][:, known], eager[1][defined][:, known])
            assert_close(*parts, what="stats", factor=STATS_FACTOR * factor)
            assert not stats[~defined].isfinite().all(1).any(), "stats of a row without a loss say so"
            by_column = self.logits.dim() == 3
            assert len(stats) < 2 or stats.stride() == ((1, len(stats)) if by_column else (5, 1))
        self.check_gradients(truth[2], eager[2], factor)
        ignored = self.target == cases.IGNORE
        for value in (*self.losses, *self.stats, *self.grads):
            assert (as_rows(value)[ignored] == 0).all(), "ignored rows are exactly 0"


class ProbabilityBatch(Batch):
    """Class probabilities, by softmax_loss and its backward alone."""

    kernels: ProbabilityKernels

    def __init__(
        self,
        kernels: ProbabilityKernels,
        case: tuple[Tensor, Tensor],
        options: cases.Options,
        up: Tensor | None = None,
        target_layout: str = "contiguous",
        **how: str,
    ) -> None:
        logits, target = case
        if up is None:
            up = cases.upstreams(target.shape[:1], cases.vector_dtype(logits.dtype))["random"]
        super().__init__(kernels, case, cases.operator_options(logits.shape[1], options), up, **how)
        self.y = laid(self.target, target_layout)

    def run(self, otherwise: bool = False) -> None:
        self.kernels.probabilities(self, otherwise)

    def check(self, factor: float = 1.0) -> None:
        """Every output against float64."""
        found = []
        for up, z, y, tail in (
            (self.up.double(), self.logits.double(), self.target.double(), self.wide()),
            (self.up, self.logits, self.target, self.tail),
        ):
            loss, stats = fallback.softmax_loss(z, y, *tail)
            found.append((loss, stats, fallback.softmax_loss_backward(up, z, y, stats, *tail)))
        truth, eager = found
        for loss, stats in zip(self.losses, self.stats, strict=True):
            assert_close(loss, truth[0], eager[0], what="loss", factor=factor)
            defined = ~truth[0].isnan()
            parts = (stats[defined], truth[1][defined], eager[1][defined])
            assert_close(*parts, what="stats", factor=STATS_FACTOR * factor)
            assert stats.is_contiguous()
        self.check_gradients(truth[2], eager[2], factor)


class SigmoidBatch(Batch):
    def __init__(
        self,
        kernels: Kernels,
        case: tuple[Tensor, Tensor],
        options: dict[str, Any],
        elementwise: bool,
        up: Tensor | None = None,
        **how: str,
    ) -> None:
        logits, _ = case
        self.elementwise = elementwise
        if up is None:
            shape = logits.shape if elementwise else (row_count(logits),)
            up = torch.randn(shape, generator=cases.generator(3), dtype=cases.vector_dtype(logits.dtype))
        super().__init__(kernels, case, sigmoid_cases.operator_options(options), up, **how)

    @property
    def y(self) -> Tensor:
        """The target as the operators take it."""
        return self.laid(self.target) if self.target.is_floating_point() else self.target.view(-1)

    def run(self, otherwise: bool = False) -> None:
        self.kernels.sigmoid(self, otherwise)

    def check(self, factor: float = 1.0) -> None:
        """Every output against float64, and whatever is ignored."""
        up, z = as_rows(self.up), as_rows(self.logits)
        dense = self.target.is_floating_point()
        y = as_rows(self.target) if dense else self.target.flatten()
        truth = fallback.sigmoid_loss_and_grad(
            up.double(), z.double(), y.double() if dense else y, *self.wide(), self.elementwise
        )
        eager = fallback.sigmoid_loss_and_grad(up, z, y, *self.tail, self.elementwise)
        for loss in self.losses:
            assert_close(as_rows(loss), truth[0], eager[0], what="loss", factor=factor)
        self.check_gradients(truth[1], eager[1], factor)
        ignore_index = SigmoidOptions(*self.tail).ignore_index
        ignored = torch.zeros_like(y, dtype=torch.bool) if ignore_index is None else y == ignore_index
        ignored = ignored if dense else ignored[:, None].expand_as(z)
        for grad in self.grads:
            assert (as_rows(grad)[ignored] == 0).all(), "what is ignored is exactly 0"


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's threads cost more than they give on tensors of this size, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(batch: Batch, factor: float = 1.0) -> None:
    """Right, and where the order of the work can be another, to the same bits."""
    batch.run()
    batch.check(factor)
    if batch.kernels.again:
        first = batch.outputs()
        batch.run(otherwise=True)
        for one, other in zip(first, batch.outputs(), strict=True):
            assert_same(one, other, "in another order")
