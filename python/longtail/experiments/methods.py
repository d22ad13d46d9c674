"""The methods that the classification experiments compare, with published hyperparameters, and one step of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..class_balance import (
    effective_number_weight,
    immax_scale,
    ldam_margin,
    seesaw_mitigation,
    vector_scaling,
)
from ..functional import (
    cross_entropy,
    generalized_cross_entropy,
    hierarchical_cross_entropy,
    poly_cross_entropy,
)
from ..functional.class_balanced import balanced
from ..hierarchical import Hierarchy
from ..training import (
    ComplementObjectiveTraining,
    DeferredReweighting,
    NormalizedLinear,
    init_sigmoid_bias_,
    parameter_groups_without_bias_decay,
)

BETAS = (0.9, 0.99, 0.999, 0.9999)  # Cui et al. 2019, section 5.2
GAMMAS = (0.5, 1.0, 2.0)  # as before, and Lin et al. 2017
LDAM_MAX_MARGIN, LDAM_SCALE = 0.5, 30.0  # Cao et al. 2019, as their code has them
DRW_BETA, DRW_START = 0.9999, 0.8  # Cao et al. 2019: from epoch 160 of 200 on
VS_GAMMA, VS_TAU = 0.2, 1.2  # Kini et al. 2021: the example of their code, for CIFAR-10-LT
CDT_GAMMA = 0.2  # Ye et al. 2020 search 0 to 0.4 on CIFAR-10
SEESAW_P, SEESAW_Q = 0.8, 2.0  # Wang et al. 2021
POLY_EPSILON = 1.0  # Leng et al. 2022: Poly-1 on ImageNet-21K and for others, untuned
GCE_Q = 0.7  # Zhang and Sabuncu 2018, section 4
HIERARCHICAL_ALPHA = 0.1  # Bertinetto et al. 2020 try 0.1 to 0.9; this is the nearest to cross-entropy
LOS_SMOOTHING, LOS_START = 0.98, 0.9  # Sun et al. 2025: for CIFAR-100-LT; 20 epochs after 200, here within them
MOMENTUM = 0.9


class Method(NamedTuple):
    """A way to train a classifier."""

    family: str
    beta: float | None = None  # of the class-balanced weights
    gamma: float | None = None  # focal
    sigmoid: bool = False  # C binary problems instead of a softmax
    complement_gamma: float = 0.0
    complement_step: bool = False  # complement objective training: a second step per batch
    tau: float = 0.0  # logit adjustment, vector scaling
    scale_gamma: float = 0.0  # of the temperatures of the classes: CDT, vector scaling
    immax: bool = False  # a temperature of the target's class
    seesaw: bool = False
    retraining: bool = False  # label over-smoothing: at last the head alone, under large label smoothing
    poly_epsilon: float = 0.0  # Poly-1
    q: float = 0.0  # generalized cross-entropy
    alpha: float = 0.0  # hierarchical cross-entropy, of classes in a tree
    post_hoc_tau: float = 0.0  # logit adjustment of a model trained with cross-entropy, at the decision
    margin: bool = False  # LDAM with deferred re-weighting, and a normalized last layer

    @property
    def name(self) -> str:
        """Family and hyperparameters, such as ``class-balanced sigmoid focal, beta 0.99, gamma 1``."""
        numbers = {"beta": self.beta, "gamma": self.gamma}
        return ", ".join([self.family, *(f"{k} {v:g}" for k, v in numbers.items() if v is not None)])


CROSS_ENTROPY = Method("cross-entropy")
COMPLEMENT_OBJECTIVE = Method("complement objective training", complement_step=True)
COMPLEMENT_CROSS_ENTROPY = Method("complement cross-entropy", complement_gamma=-1.0)
LOGIT_ADJUSTMENT = Method("logit adjustment", tau=1.0)
VECTOR_SCALING = Method("vector scaling", tau=VS_TAU, scale_gamma=VS_GAMMA)
CDT = Method("CDT", scale_gamma=CDT_GAMMA)
IMMAX = Method("IMMAX", immax=True)
SEESAW = Method("Seesaw", seesaw=True)
LABEL_OVER_SMOOTHING = Method("label over-smoothing", retraining=True)
LDAM_DRW = Method("LDAM-DRW", margin=True)
POLY = Method("Poly-1", poly_epsilon=POLY_EPSILON)
GENERALIZED = Method("generalized cross-entropy", q=GCE_Q)
HIERARCHICAL = Method("hierarchical cross-entropy", alpha=HIERARCHICAL_ALPHA)
POST_HOC = Method("post-hoc logit adjustment", post_hoc_tau=1.0)
SIGMOID = Method("sigmoid", sigmoid=True)


def softmax_focal(gamma: float) -> Method:
    return Method("softmax focal", gamma=gamma)


def sigmoid_focal(gamma: float) -> Method:
    return Method("sigmoid focal", gamma=gamma, sigmoid=True)


def class_balanced_softmax(beta: float) -> Method:
    return Method("class-balanced softmax", beta=beta)


def class_balanced_sigmoid(beta: float) -> Method:
    return Method("class-balanced sigmoid", beta=beta, sigmoid=True)


def class_balanced_sigmoid_focal(beta: float, gamma: float) -> Method:
    return Method("class-balanced sigmoid focal", beta=beta, gamma=gamma, sigmoid=True)


def grid() -> list[Method]:
    """Every method, and beta and gamma over the values that the papers try; cross-entropy first."""
    return [
        *(CROSS_ENTROPY, COMPLEMENT_OBJECTIVE, COMPLEMENT_CROSS_ENTROPY, LOGIT_ADJUSTMENT, LDAM_DRW),
        *(VECTOR_SCALING, CDT, IMMAX, SEESAW, LABEL_OVER_SMOOTHING),
        *map(softmax_focal, GAMMAS),
        *map(class_balanced_softmax, BETAS),
        SIGMOID,
        *map(class_balanced_sigmoid, BETAS),
        *map(sigmoid_focal, GAMMAS),
        *(class_balanced_sigmoid_focal(beta, gamma) for beta in BETAS for gamma in GAMMAS),
    ]


def selection() -> list[Method]:
    """Every method once, at one published setting or in the middle of the range tried; beta over its range."""
    return [
        *(CROSS_ENTROPY, COMPLEMENT_OBJECTIVE, COMPLEMENT_CROSS_ENTROPY, LOGIT_ADJUSTMENT, POST_HOC, LDAM_DRW),
        *(VECTOR_SCALING, CDT, IMMAX, SEESAW, LABEL_OVER_SMOOTHING, POLY, GENERALIZED, softmax_focal(1.0)),
        *map(class_balanced_softmax, BETAS),
        *(SIGMOID, sigmoid_focal(1.0), class_balanced_sigmoid(0.999), class_balanced_sigmoid_focal(0.999, 1.0)),
    ]


def drw_start(epochs: int) -> int:
    """The epoch from which LDAM is re-weighted; of one or two there is none."""
    return round(DRW_START * epochs)


class Classifier(nn.Module):
    """Features, then a linear layer that gives the logits.

    Args:
        features: inputs, such as images, to features [N, D].
        head: [N, D] to logits [N, C].
    """

    def __init__(self, features: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.features = features
        self.head: nn.Module = head

    def forward(self, input: Any) -> Tensor:
        logits: Tensor = self.head(self.features(input))
        return logits


def sgd(groups: list[dict[str, Any]]) -> Optimizer:
    """SGD with momentum, of learning rate 1: a schedule multiplies it."""
    return torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM)


class MethodTraining:
    """A method at work on one classifier.

    Args:
        method: what to do.
        model: prepared in place: LDAM gets its normalized last layer, a sigmoid method the bias that starts at
            probability 1 / C and has no weight decay. Otherwise its initialisation is left alone.
        counts: training samples of each class, [C].
        epochs: to be trained.
        learning_rate: after so many calls of ``next_learning_rate``.
        weight_decay: of every optimizer.
        make_optimizer: of parameter groups, with a learning rate of 1.
        tree: of the classes, for the hierarchical loss.
    """

    def __init__(
        self,
        method: Method,
        model: Classifier,
        counts: Tensor,
        epochs: int,
        learning_rate: Callable[[int], float],
        weight_decay: float,
        make_optimizer: Callable[[list[dict[str, Any]]], Optimizer] = sgd,
        tree: Hierarchy | None = None,
    ) -> None:
        self.method, self.model, self.learning_rate = method, model, learning_rate
        groups: list[dict[str, Any]] = [{"params": [*model.parameters()], "weight_decay": weight_decay}]
        if method.sigmoid:
            init_sigmoid_bias_(model.head)
            groups = parameter_groups_without_bias_decay(model, model.head, weight_decay)
        elif method.margin:
            assert isinstance(model.head, nn.Linear)
            model.head = NormalizedLinear.of(model.head)
            groups[0]["params"] = [*model.parameters()]
        # Copies: an optimizer keeps its groups' dictionaries, learning rate and all.
        self.optimizers = [
            make_optimizer([{**group} for group in groups]) for _ in range(2 if method.complement_step else 1)
        ]
        self.complement = ComplementObjectiveTraining(model, *self.optimizers) if method.complement_step else None
        self.schedule = DeferredReweighting(counts, DRW_BETA, drw_start(epochs)) if method.margin else None
        self.loss = loss_function(method, counts, tree)
        self.retraining_start = max(1, min(round(LOS_START * epochs), epochs - 1)) if method.retraining else epochs
        self.go_on_from(0)

    def go_on_from(self, epoch: int) -> None:
        """The next epoch is this one; the optimizers are new or have been loaded."""
        self.learning_rates = [LambdaLR(optimizer, self.learning_rate, epoch - 1) for optimizer in self.optimizers]

    def start_epoch(self, epoch: int) -> None:
        """Sets the weights of a schedule; in the last epochs of label over-smoothing the features stay as they are."""
        if self.schedule is not None:
            self.loss = functools.partial(self.loss, weight=self.schedule(epoch))
        if epoch >= self.retraining_start:
            self.model.features.requires_grad_(False).eval()
            self.loss = functools.partial(self.loss, label_smoothing=LOS_SMOOTHING)

    def next_learning_rate(self) -> None:
        """Sets the learning rate of the next epoch or step, whichever the schedule counts."""
        for learning_rate in self.learning_rates:
            learning_rate.step()

    def step(self, input: Any, labels: Tensor) -> Tensor:
        """Trains on a batch; returns the loss, 0-d and detached."""
        if self.complement is not None:
            return self.complement.step(input, labels).loss
        (optimizer,) = self.optimizers
        optimizer.zero_grad()
        loss: Tensor = self.loss(self.model(input), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()


def loss_function(method: Method, counts: Tensor, tree: Hierarchy | None) -> Callable[..., Tensor]:
    """The loss of logits [N, C] and classes [N]; arguments as :class:`MethodTraining`'s."""
    if method.alpha:
        if tree is None:
            raise ValueError(f"{method.name} needs a tree of the classes, got None")
        return functools.partial(hierarchical_cross_entropy, hierarchy=tree, alpha=method.alpha)
    if method.poly_epsilon:
        return functools.partial(poly_cross_entropy, epsilon=method.poly_epsilon)
    if method.q:
        return functools.partial(generalized_cross_entropy, q=method.q)
    weight = effective_number_weight(counts, method.beta or 0.0)
    if method.sigmoid:
        loss = "sigmoid" if method.gamma is None else "focal"
        return functools.partial(balanced, weight=weight, loss=loss, gamma=method.gamma or 0.0)
    options: dict[str, Any] = {"focal_gamma": method.gamma or 0.0, "complement_gamma": method.complement_gamma}
    if method.beta is not None:
        options |= {"weight": weight, "normalizer": "count"}
    if method.tau or method.scale_gamma:
        options |= vector_scaling(counts, method.scale_gamma, method.tau)
    if method.immax:
        options["target_scale"] = immax_scale(counts)
    if method.seesaw:
        options |= {"class_mitigation": seesaw_mitigation(counts, SEESAW_P), "compensation": SEESAW_Q}
    if method.margin:
        # The published loss scales logit and margin together; here the margin is taken off the scaled logit.
        options |= {"class_margin": LDAM_SCALE * ldam_margin(counts, LDAM_MAX_MARGIN), "scale": LDAM_SCALE}
    return functools.partial(cross_entropy, **options)
