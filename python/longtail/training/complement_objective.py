"""Complement Objective Training: cross-entropy and complement entropy in turn (Chen et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ContextDecorator, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ..arguments import check_number
from ..functional import complement_entropy, cross_entropy
from .optimizers import check_optimizer, depends_on, has_gradients, parameters_of, second_backward

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Autocast: TypeAlias = AbstractContextManager[Any] | Callable[[], AbstractContextManager[Any]]

_NO_GRADIENT = "the {} optimizer has no parameter with a gradient, expected parameters that its loss depends on"
_LEAVE_THE_LOGITS = 'which the complement loss reads after it: expected a loss that leaves them (gradient="forward")'


class ComplementObjectiveLosses(NamedTuple):
    """What the two steps of a batch descended on; 0-d, detached."""

    loss: Tensor
    complement_loss: Tensor  # minus the complement entropy


class _Trainer:
    """What both variants share: options, and one backward or optimizer step under scaler and clipping."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        *,
        loss: Loss | None,
        complement_loss: Loss | None,
        balanced: bool,
        ignore_index: int,
        scaler: torch.amp.GradScaler | None,
        max_grad_norm: float | None,
        autocast: Autocast | None,
    ) -> None:
        self.model = model
        self.optimizers = list(optimizers)
        for optimizer in self.optimizers:
            check_optimizer(optimizer)
        if len({id(optimizer) for optimizer in self.optimizers}) < len(self.optimizers):
            raise ValueError("both optimizers are the same object, expected two, each with its own state")
        self.balanced = balanced
        self.ignore_index = ignore_index
        self.loss = self._cross_entropy if loss is None else loss
        self.complement_loss = self._complement_entropy if complement_loss is None else complement_loss
        self.scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
        norm = math.inf if max_grad_norm is None else check_number("max_grad_norm", max_grad_norm, 0.0, infinite=True)
        self.max_grad_norm = None if norm == math.inf else norm
        self.autocast: Any = nullcontext() if autocast is None else autocast
        if not (_is_context(self.autocast) or callable(self.autocast)):
            raise TypeError(
                f"autocast is a {type(autocast).__name__}, expected a context manager, or a function that makes one"
            )

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target, ignore_index=self.ignore_index)

    def _complement_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        return -complement_entropy(logits, target, self.balanced, self.ignore_index)

    def _forward(self, input: Any) -> Tensor:
        if isinstance(self.autocast, ContextDecorator):
            # What contextlib.contextmanager makes serves one "with", but as a decorator every call.
            return self.autocast(self.model.__call__)(input)
        with self.autocast if _is_context(self.autocast) else self.autocast():
            return self.model(input)

    def _zero_grad(self) -> None:
        """Drops the gradients of both: the optimizers may hold different parts of the model."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _check_gradients(self, optimizer: Optimizer) -> None:
        """That there are some to step by; a gradient scaler would say so when others have stepped."""
        if not has_gradients(optimizer):
            raise ValueError(_NO_GRADIENT.format("primary" if optimizer is self.optimizers[0] else "complement"))

    def _optimizer_step(self, optimizer: Optimizer) -> None:
        """Unscales and clips the gradients that lie in ``.grad``, and steps; not if the scaler found inf or NaN."""
        if self.max_grad_norm is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters_of(optimizer), self.max_grad_norm)
        self.scaler.step(optimizer)


class ComplementObjectiveTraining(_Trainer):
    """Complement Objective Training, COT (Chen et al. 2019, algorithm 1).

    For each batch two steps: the primary optimizer descends on the cross-entropy; then, after a second forward with the
    updated weights, the complement optimizer descends on minus the complement entropy, which flattens the
    probabilities of the wrong classes. Each optimizer keeps its own state (momentum)::

        training = ComplementObjectiveTraining(model, SGD(model.parameters(), ...), SGD(model.parameters(), ...))
        for input, target in loader:
            loss, complement_loss = training.step(input, target)

    The authors' code gives both the same learning rate, momentum, weight decay and schedule. The second forward counts:
    batch normalisation updates its running statistics twice per batch, dropout draws a new mask.

    Args:
        model: called as ``model(input)``; returns logits (N, C) or (N, C, d1, ...). Its mode is left as it is. Over
            ranks: the ``DistributedDataParallel`` itself, not a part of it, whose gradients nobody averages.
        primary_optimizer, complement_optimizer: two optimizers, usually over the same parameters.
        loss: ``loss(logits, target)`` of the first step, a scalar; default :func:`longtail.cross_entropy`.
        complement_loss: likewise of the second step; default minus the mean of :func:`longtail.complement_entropy`.
        balanced: the default complement loss divides by C - 1, so that both steps have gradients of a size (the
            authors' code divides by C).
        ignore_index: target value that the default losses leave out.
        scaler: a ``torch.amp.GradScaler``; a step with inf or NaN in its gradients is skipped, and the scale is
            updated once per batch. With float16 only.
        max_grad_norm: clips the norm of each step's (unscaled) gradients to this; None and infinity leave them.
        autocast: a context for the forward passes, such as ``torch.autocast("cuda", torch.bfloat16)``, a function that
            makes one for each, or None.

    Raises:
        TypeError, ValueError: the optimizers are no two optimizers, or one needs a closure (LBFGS); max_grad_norm is
            negative; autocast is no context and no function. An optimizer's loss depends on none of its
            parameters: in the first step, before a weight moves, unless the first loss depends on some of the
            complement optimizer's, or the autograd graph does not show it (FSDP, reentrant checkpoints).
    """

    def __init__(
        self,
        model: nn.Module,
        primary_optimizer: Optimizer,
        complement_optimizer: Optimizer,
        *,
        loss: Loss | None = None,
        complement_loss: Loss | None = None,
        balanced: bool = True,
        ignore_index: int = -100,
        scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float | None = None,
        autocast: Autocast | None = None,
    ) -> None:
        super().__init__(
            model,
            (primary_optimizer, complement_optimizer),
            loss=loss,
            complement_loss=complement_loss,
            balanced=balanced,
            ignore_index=ignore_index,
            scaler=scaler,
            max_grad_norm=max_grad_norm,
            autocast=autocast,
        )
        self._second_step_checked = False

    def step(self, input: Any, target: Tensor) -> ComplementObjectiveLosses:
        """Both steps on one batch; returns the two losses, detached."""
        losses: list[Tensor] = []
        for loss_function, optimizer in zip((self.loss, self.complement_loss), self.optimizers, strict=True):
            self._zero_grad()
            logits = self._forward(input)
            loss = loss_function(logits, target)
            if not self._second_step_checked:
                self._check_second_step(loss, logits, target)
            del logits  # a loss that has made its gradient in forward keeps none: room for those of the parameters
            self.scaler.scale(loss).backward()
            self._check_gradients(optimizer)
            self._optimizer_step(optimizer)
            losses.append(loss.detach())
        self.scaler.update()
        return ComplementObjectiveLosses(*losses)

    def _check_second_step(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        """Before the first of all steps: that the second has gradients, as it has where the first loss makes some.

        A graph in which nothing leads from that loss to the primary optimizer's parameters (those of FSDP, or within a
        reentrant checkpoint) says nothing of the complement optimizer's either.
        """
        primary, complement = (parameters_of(optimizer) for optimizer in self.optimizers)
        if not depends_on(loss, complement) and depends_on(loss, primary):
            other = self.complement_loss(logits, target)
            if not depends_on(other, complement):
                raise ValueError(_NO_GRADIENT.format("complement"))
        self._second_step_checked = True


class SingleForwardComplementObjectiveTraining(_Trainer):
    """Complement Objective Training with one forward per batch: both gradients are taken at the same weights.

    Cheaper than :class:`ComplementObjectiveTraining`, and not the published procedure, where the complement step sees
    what the first step did. Two optimizers each get their own gradient (two backward passes through one
    graph; ``DistributedDataParallel`` averages the gradients of the first, and this class those of the second, once it
    is over); one optimizer gets the sum, in one backward pass. The latter, with the default losses and ``balanced``, is
    complement cross-entropy with gamma = -1, which :func:`longtail.complement_cross_entropy` computes in a single pass
    over the logits.

    Args:
        model, primary_optimizer: as in :class:`ComplementObjectiveTraining`.
        complement_optimizer: None steps the primary optimizer with the sum of both gradients.
        loss, complement_loss, balanced, ignore_index, scaler, max_grad_norm, autocast: as there. ``max_grad_norm``
            clips each optimizer's gradient. ``loss`` leaves the logits to the complement loss: ``gradient="inplace"``
            is not for it.

    Raises:
        TypeError, ValueError: as there; ``loss`` writes over the logits (in the first step, before a weight moves,
            where it is not seen before).
    """

    def __init__(
        self,
        model: nn.Module,
        primary_optimizer: Optimizer,
        complement_optimizer: Optimizer | None = None,
        *,
        loss: Loss | None = None,
        complement_loss: Loss | None = None,
        balanced: bool = True,
        ignore_index: int = -100,
        scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float | None = None,
        autocast: Autocast | None = None,
    ) -> None:
        super().__init__(
            model,
            (primary_optimizer,) if complement_optimizer is None else (primary_optimizer, complement_optimizer),
            loss=loss,
            complement_loss=complement_loss,
            balanced=balanced,
            ignore_index=ignore_index,
            scaler=scaler,
            max_grad_norm=max_grad_norm,
            autocast=autocast,
        )
        if _option(loss, "gradient") == "inplace":
            raise ValueError(f'the loss has gradient="inplace" and writes over the logits, {_LEAVE_THE_LOGITS}')

    def step(self, input: Any, target: Tensor) -> ComplementObjectiveLosses:
        """One forward, both gradients, and the steps; returns the two losses, detached."""
        self._zero_grad()
        logits = self._forward(input)
        before = _versions(logits)
        loss = self.loss(logits, target)
        if _versions(logits) != before:
            raise ValueError(f"the loss has written over the logits, {_LEAVE_THE_LOGITS}")
        losses = ComplementObjectiveLosses(loss, self.complement_loss(logits, target))
        if len(self.optimizers) == 1:
            self.scaler.scale(losses.loss + losses.complement_loss).backward()
            self._check_gradients(self.optimizers[0])
            self._optimizer_step(self.optimizers[0])
        else:
            self._step_apart(losses)
        self.scaler.update()
        return ComplementObjectiveLosses(*(loss.detach() for loss in losses))

    def _step_apart(self, losses: ComplementObjectiveLosses) -> None:
        """Both backward passes before the first step, which changes the weights that the second still needs."""
        primary, complement = self.optimizers
        self.scaler.scale(losses.loss).backward(retain_graph=True)
        kept = [self._gradients(primary)]
        self._zero_grad()
        second_backward(self.scaler.scale(losses.complement_loss), self.model, complement)
        kept.append(self._gradients(complement))
        for optimizer, gradients in zip(self.optimizers, kept, strict=True):
            self._zero_grad()
            for parameter, gradient in gradients:
                parameter.grad = gradient
            self._optimizer_step(optimizer)

    def _gradients(self, optimizer: Optimizer) -> list[tuple[Tensor, Tensor | None]]:
        self._check_gradients(optimizer)
        return [(parameter, parameter.grad) for parameter in parameters_of(optimizer)]


def _option(loss: object, name: str) -> object:
    """An option of a loss, where it is a module or a functools.partial."""
    return loss.keywords.get(name) if isinstance(loss, partial) else getattr(loss, name, None)


def _versions(logits: Any) -> list[int | None]:
    """How often each tensor of what a model returned has been written over."""
    return [getattr(leaf, "_version", None) for leaf in tree_leaves(logits)]


def _is_context(value: object) -> bool:
    return hasattr(type(value), "__enter__")
