"""What is compared: the losses, the data they are given, and who computes them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import longtail
from longtail.functional import multi_label
from longtail.ops import dispatch

from . import eager, trees
from .labels import Labels, num_samples, of_long_tail

LOSSES = {
    "plain": "cross-entropy",
    "focal": "softmax focal",
    "complement": "complement cross-entropy",
    "family": "class weights + focal + complement",
    "everything": "every option at once",
    "statistics": "log-probability and entropy, with the gradients of both",
    "soft": "cross-entropy, class probabilities",
    "vector_scaling": "vector scaling: a temperature and a bias for each class",
    "immax": "IMMAX: a temperature of the target's class",
    "seesaw": "Seesaw",
    "hierarchical": "hierarchical cross-entropy, classes numbered along the tree",
    "hierarchical_shuffled": "hierarchical cross-entropy, classes of the same tree shuffled",
    "sigmoid": "sigmoid cross-entropy, class targets",
    "sigmoid_focal": "sigmoid focal, class targets",
    "dense_focal": "sigmoid focal, a target for each element",
    "multi_label_focal": "sigmoid focal, several labels a row",
    "asymmetric": "asymmetric loss, several labels a row",
    "distribution_balanced": "distribution-balanced loss, several labels a row, class vectors made beforehand",
    "zlpr": "ZLPR, several labels a row",
    "two_way": "two-way loss over the classes of each row, several labels a row",
    "balanced": "class-balanced cross-entropy, of calls.py",
    "dense_sigmoid": "sigmoid cross-entropy, a target for each element, of calls.py",
}
"""The losses by their name in the CSV."""

TORCHS = ("plain", "soft")
"""Of these eager PyTorch is ``F.cross_entropy``."""

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
"""How logits lie, by its name in the CSV; channels last are images."""

SIGMOID: dict[str, dict[str, Any]] = {
    "sigmoid": {"alpha": None, "gamma": 0.0},
    "sigmoid_focal": {"alpha": 0.25, "gamma": 2.0},
    "dense_focal": {"alpha": 0.25, "gamma": 2.0},
    "multi_label_focal": {"alpha": 0.25, "gamma": 2.0},
}
"""Of these sigmoid focal loss, with its options; the mean is over all elements."""

HIERARCHICAL = ("hierarchical", "hierarchical_shuffled")
"""Of these the classes are in a tree of ``trees.py``."""

GRADIENTS = {"backward": 3, "forward": 2, "inplace": 2}
"""longtail's gradient modes, and how often each passes over the logits (peers are counted the same way)."""


def long_tail(classes: int, device: torch.device) -> Tensor:
    """Training samples of each class, from 1000 down to 10."""
    return (1000 * 0.01 ** torch.linspace(0, 1, classes, device=device)).long()


@dataclass(frozen=True)
class Problem:
    """Data of one (N, C[, H, W]), dtype and device; every contender sees the same."""

    logits: Tensor  # [N, C] or [N, C, H, W]
    target: Tensor  # [N] or [N, H, W] int64
    counts: Tensor  # [C] int64, training samples per class, an exponential long tail
    layout: str = "contiguous"  # of LAYOUTS
    labels: Labels | None = None  # several of each row

    @property
    def index(self) -> Tensor:
        """[N, K] or [N, 1, H, W] int64: the classes of each row whose gradients are compared apart from the others."""
        return self.target.unsqueeze(1) if self.labels is None else self.labels.classes

    @classmethod
    def of_labels(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
        """Several labels a row, and logits [N, C] as an untrained classifier has them.

        Of those 0.2 % have a probability below the asymmetric loss's clip of 0.05, and hardly a register of negatives
        is free of gradient. After some training most are, and the CPU kernel, which skips those, is faster than here.
        """
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.randn(shape, generator=generator, device=device).to(dtype)
        counts = long_tail(shape[1], device)
        labels = of_long_tail(logits, counts, generator)
        return cls(logits, labels.classes[:, 0], counts, labels=labels)

    @classmethod
    def make(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str = "contiguous"
    ) -> Problem:
        """Logits whose target probability spreads over (0, 1), so that an error in any term of a loss shows."""
        rows, classes = (shape[0], *shape[2:]), shape[1]
        generator = torch.Generator(device).manual_seed(0)
        target = torch.randint(classes, rows, generator=generator, device=device)
        logits = torch.randn(shape, generator=generator, device=device)
        margin = 8 * torch.rand(rows, generator=generator, device=device) - 4
        logits.scatter_(1, target.unsqueeze(1), (logits.logsumexp(1) + margin).unsqueeze(1))
        return cls(
            logits.to(dtype).contiguous(memory_format=LAYOUTS[layout]), target, long_tail(classes, device), layout
        )

    def case(self, loss: str) -> tuple[Tensor, dict[str, Any]]:
        """Targets, and the options of the loss, for one of ``LOSSES``."""
        if self.labels is not None:
            return self.labels.hot, self._multi_label(loss)
        if loss in SIGMOID:
            dense = loss == "dense_focal"
            return eager.one_hot(self.target, self.logits) if dense else self.target, SIGMOID[loss]
        if loss in HIERARCHICAL:
            shuffled = loss == "hierarchical_shuffled"
            tree = trees.of_classes(self.logits.shape[1], self.logits.device, shuffled)
            return self.target, {"tree": tree, "alpha": 0.1}
        if loss == "soft":
            hot, other = (eager.one_hot(x, self.logits) for x in (self.target, self.target.flip(0)))
            return 0.7 * hot + 0.3 * other, {}  # as mixup makes them
        options: dict[str, Any] = {}
        if loss in ("focal", "family", "everything"):
            options["focal_gamma"] = 2.0
        if loss in ("complement", "family", "everything"):
            # The paper's -1 moves the result by 1/C, which no check could tell from rounding; the work is the same.
            options["complement_gamma"] = -(self.logits.shape[1] - 1) / 100
        if loss in ("family", "everything"):
            options["weight"] = longtail.effective_number_weight(self.counts, 0.999).float()
        options |= self._tail(loss)
        if loss != "everything":
            return self.target, options
        row = torch.arange(len(self.target), device=self.target.device)
        options |= {
            "label_smoothing": 0.1,
            "class_bias": longtail.logit_adjustment(self.counts).float(),
            "class_margin": longtail.ldam_margin(self.counts).float(),
            "scale": 1.5,
            "softcap": 30.0,
            "z_loss": 1e-4,
            "sample_weight": 0.5 + (row % 8) / 8,
        }
        return self.target.masked_fill(row % 16 == 1, -100), options

    def _multi_label(self, loss: str) -> dict[str, Any]:
        """Options of the losses of several labels a row; those of all others are their defaults."""
        if loss == "distribution_balanced":
            made = longtail.DistributionBalancedLoss(self.counts, num_samples(self.counts))
            vectors = {"class_bias": made.class_bias, "inverse_counts": made.inverse_counts}
            return vectors | {"rebalance_alpha": 0.1, "rebalance_beta": 10.0, "rebalance_mu": 0.2}
        return SIGMOID.get(loss, {})

    def _tail(self, loss: str) -> dict[str, Any]:
        """Options of the losses for long tails, with their published numbers."""
        if loss == "vector_scaling":
            return dict(longtail.vector_scaling(self.counts))
        if loss == "immax":
            return {"target_scale": longtail.immax_scale(self.counts)}
        if loss == "seesaw":
            return {"class_mitigation": longtail.seesaw_mitigation(self.counts), "compensation": 2.0}
        return {}


@dataclass(frozen=True)
class Contender:
    """One way to compute one loss. ``forward`` takes the logits and returns the loss, or None if there is none."""

    loss: str  # of LOSSES; empty for the copy
    name: str
    forward: Callable[[Tensor], Tensor | None]
    gradient: str = ""
    passes: int | None = None  # over the logits, forward + backward; None where it is not known
    backend: str = ""
    timed: bool = True  # else the others are only compared with it


def copy(problem: Problem) -> Contender:
    """``out.copy_(logits)``, both of one layout: the bandwidth that every share refers to."""
    out = torch.zeros_like(problem.logits)

    def forward(logits: Tensor) -> None:
        out.copy_(logits.detach())

    return Contender("", "copy", forward, passes=2)


def _fused(logits: Tensor, target: Tensor, gradient: str, options: dict[str, Any]) -> Tensor:
    # Looked up at the call, so that a test can plant a wrong one.
    loss: Tensor = longtail.cross_entropy(logits, target, gradient=gradient, **options)
    return loss


def _fused_sigmoid(logits: Tensor, target: Tensor, gradient: str, options: dict[str, Any]) -> Tensor:
    return longtail.sigmoid_focal_loss(logits, target, gradient=gradient, reduction="mean", **options)


def _fused_asymmetric(logits: Tensor, target: Tensor, gradient: str, options: dict[str, Any]) -> Tensor:
    return longtail.asymmetric_loss(logits, target, gradient=gradient, **options)


def _fused_distribution_balanced(logits: Tensor, target: Tensor, gradient: str, options: dict[str, Any]) -> Tensor:
    return multi_label.rebalanced(logits, target, gradient=gradient, **options)


def _fused_zlpr(logits: Tensor, target: Tensor, gradient: str, options: dict[str, Any]) -> Tensor:
    return longtail.zlpr_loss(logits, target, gradient=gradient, **options)


def _fused_two_way(logits: Tensor, target: Tensor, gradient: str, options: dict[str, Any]) -> Tensor:
    return longtail.two_way_loss(logits, target, gradient=gradient, **options)


def _fused_hierarchical(logits: Tensor, target: Tensor, gradient: str, options: dict[str, Any]) -> Tensor:
    tree, alpha = options["tree"], options["alpha"]
    return longtail.hierarchical_cross_entropy(logits, target, tree.hierarchy, alpha, gradient=gradient)


def _eager_hierarchical(logits: Tensor, target: Tensor, *, tree: trees.Tree, alpha: float) -> Tensor:
    return eager.hierarchical_loss(logits, target, levels=tree.levels, alpha=alpha)


def _fused_statistics(logits: Tensor, target: Tensor, gradient: str, options: dict[str, Any]) -> Tensor:
    found = longtail.row_statistics(logits, target, gradient=gradient, **options)
    return eager.policy_loss(found.log_prob, found.entropy)


_MULTI_LABEL: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "asymmetric": (eager.asymmetric_loss, _fused_asymmetric),
    "distribution_balanced": (eager.distribution_balanced_loss, _fused_distribution_balanced),
    "zlpr": (eager.zlpr_loss, _fused_zlpr),
    "two_way": (eager.two_way_loss, _fused_two_way),
}


def _own(loss: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """A loss in plain PyTorch and by longtail."""
    if loss == "statistics":
        return eager.statistics_loss, _fused_statistics
    if loss in SIGMOID:
        return eager.sigmoid_loss, _fused_sigmoid
    if loss in _MULTI_LABEL:
        return _MULTI_LABEL[loss]
    if loss in HIERARCHICAL:
        return _eager_hierarchical, _fused_hierarchical
    return F.cross_entropy if loss in TORCHS else eager.softmax_loss, _fused


def of_loss(loss: str, problem: Problem, compiled: bool = True) -> list[Contender]:
    """Eager PyTorch (first: the others are compared with it), torch.compile of it, longtail in each gradient mode.

    ``F.cross_entropy`` on half logits sums rounded losses: there it is compared as the others are, with float32.
    """
    target, options = problem.case(loss)
    plain, fused = _own(loss)
    dense = {"backward": 2, "forward": 1, "inplace": 1} if target.is_floating_point() else {}  # reads of the target
    # log_softmax and its backward: a read and a write, two reads and a write; the one-hot upstream: a write.
    found = []
    if loss in TORCHS and problem.logits.dtype != torch.float32:
        wide = target.float() if dense else target
        found.append(Contender(loss, "eager in float32", lambda x: F.cross_entropy(x.float(), wide), timed=False))
    found += [
        Contender(loss, "eager", lambda x: plain(x, target, **options), passes=6 if loss == "plain" else None),
    ]
    if compiled:
        fast = torch.compile(plain, fullgraph=True, dynamic=False)
        found.append(Contender(loss, "compiled", lambda x: fast(x, target, **options)))
    backend = dispatch.selected(problem.logits.device)
    # The gradient of statistics is made when the loss is known that is written of them.
    modes = {"statistics": {"backward": 3, "inplace": 3}, "soft": {"backward": 3}}.get(loss, GRADIENTS)
    # One takes some classes twice, one a row's targets.
    known = backend != "reference" and loss not in ("hierarchical_shuffled", "distribution_balanced")
    for gradient, passes in modes.items():
        passes += dense.get(gradient, 0)
        forward = functools.partial(fused, target=target, gradient=gradient, options=options)
        found.append(Contender(loss, "longtail", forward, gradient, passes if known else None, backend))
    return found
