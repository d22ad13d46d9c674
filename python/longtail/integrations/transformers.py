"""Hugging Face transformers: our losses in the Trainer, or on one model. Needs the extra ``transformers``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

try:
    from transformers import PreTrainedModel, TrainerCallback
    from transformers.loss import loss_utils
except ImportError as error:
    raise ImportError(
        f"{error}; longtail.integrations.transformers needs pip install accelerate 'transformers>=5'"
    ) from error

from ..functional import cross_entropy
from ..linear.shapes import next_position
from ..modules.base import differ
from .reweighting import WeightSchedule, set_weight
from .trainer_steps import check_that_it_was_used, label_smoothing_factor, mark_used, trainer_at_work

__all__ = ["ComputeLoss", "DeferredReweightingCallback", "LossFunctionHandle", "set_loss_function"]

IGNORE_INDEX = -100  # as everywhere in transformers: the Trainer counts the labels that differ from it

# Losses that ours can stand in for, and whether the label of a token is the next token.
_SHIFTS_LABELS = {
    loss_utils.ForCausalLMLoss: True,
    loss_utils.ForMaskedLMLoss: False,
    loss_utils.ForTokenClassification: False,
    loss_utils.ForSequenceClassificationLoss: False,
}


class ComputeLoss:
    """A ``compute_loss_func`` for the Trainer::

        loss = longtail.ComplementCrossEntropyLoss(class_bias=longtail.logit_adjustment(counts))
        Trainer(model, arguments, compute_loss_func=ComputeLoss(loss, shift_labels=True), ...)

    The Trainer's ``num_items_in_batch``, the labels that count in all micro-batches of a step, becomes the loss's
    ``normalizer``: gradient accumulation gives what one large batch gives. Class weights then do not enter the
    denominator (nor do they with ``normalizer="count"``). Without it the mean is the loss's own.

    Under ``torch.no_grad``, as in the Trainer's ``evaluate`` and ``predict``, ``evaluation_loss`` is computed instead:
    the adjusted losses of long-tailed training are no measure of a model, and do not compare with those of other runs.

    Args:
        loss: a loss module of longtail, with ``reduction="mean"`` and ``ignore_index=-100``; its buffers follow the
            logits' device. Or any ``loss(logits, labels, normalizer=...)``, such as a ``functools.partial`` of
            :func:`longtail.cross_entropy`.
        shift_labels: True for causal language models (the logits of a token predict the next one), False for masked
            language models, for encoder-decoder models (whose batches need "decoder_input_ids", as
            ``DataCollatorForSeq2Seq(tokenizer, model=model)`` makes them: the model does not get the labels), and for
            the classification of sequences, tokens and images.
        evaluation_loss: what is computed where no gradient is wanted, as ``loss``; plain cross-entropy by default. Pass
            the loss itself to have it there too.

    Called with outputs (a ``ModelOutput``, or a tuple that begins with the logits) of logits (B, C) or (B, L, C) and
    labels (B,) or (B, L), it returns a 0-d tensor.

    Raises:
        ValueError: there are no labels; shapes do not match; a loss has another reduction or ignore_index, or
            returns statistics; the Trainer has a ``label_smoothing_factor``, which it does not apply to a
            ``compute_loss_func``: ``label_smoothing`` is an option of the loss.
    """

    def __init__(
        self, loss: Callable[..., Tensor], *, shift_labels: bool, evaluation_loss: Callable[..., Tensor] = cross_entropy
    ) -> None:
        for one in (loss, evaluation_loss):
            check_options(one)
        self.loss = loss
        self.evaluation_loss = evaluation_loss
        self.shift_labels = shift_labels

    def current_loss(self) -> Callable[..., Tensor]:
        """``loss`` where gradients are wanted, else ``evaluation_loss``."""
        return self.loss if torch.is_grad_enabled() else self.evaluation_loss

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        factor = label_smoothing_factor(trainer_at_work())
        if factor:
            raise ValueError(
                f"the Trainer's label_smoothing_factor is {factor}, expected 0: it is not applied to a "
                f"compute_loss_func. Give label_smoothing={factor} to the loss"
            )
        if labels is None:
            raise ValueError('labels are None, expected inputs with "labels"')
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if self.shift_labels:
            labels = shifted(labels)
        return flat_loss(self.current_loss(), logits, labels, num_items_in_batch)


def check_options(loss: Any, **more: Any) -> None:
    """Raises ValueError where a loss module has options that its place does not allow."""
    options = getattr(loss, "options", {})
    for name, needed in {"reduction": "mean", "ignore_index": IGNORE_INDEX, "return_stats": False, **more}.items():
        if differ(options.get(name, needed), needed):
            raise ValueError(f"the loss has {name}={options[name]!r}, expected {name}={needed!r}")


def shifted(labels: Tensor) -> Tensor:
    """Labels of the next token, (B, L); the last has none. The labels move, so that the logits need no copy."""
    return next_position(labels, IGNORE_INDEX)


def flat_loss(
    loss: Callable[..., Tensor], logits: Tensor, labels: Tensor, num_items: Tensor | float | None, **overrides: Any
) -> Tensor:
    """The loss of logits (..., C) and labels (...), divided by the number of items where it is given."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels have shape {list(labels.shape)}, expected {list(logits.shape[:-1])} as the logits")
    if isinstance(loss, nn.Module):
        loss.to(logits.device)
    if num_items is not None:
        overrides["normalizer"] = one_number(num_items, logits.device)
    return loss(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).to(logits.device), **overrides)


def one_number(num_items: Tensor | float, device: torch.device) -> Tensor | float:
    """The number of items, 0-d where it is a tensor: DataParallel brings it once for each replica."""
    return num_items.reshape(-1)[0].to(device) if isinstance(num_items, Tensor) else num_items


class LossFunctionHandle:
    """Returned by :func:`set_loss_function`: ``remove()`` takes the loss back. Also a context manager."""

    def __init__(self, model: PreTrainedModel, ours: _ModelLoss, hook: RemovableHandle) -> None:
        self._model: PreTrainedModel | None = model
        self._ours = ours
        self._hook = hook

    def remove(self) -> None:
        """Takes the loss back, in any order with others; a second call does nothing.

        The model then has the one that was set last and is not removed, or its own.
        """
        if self._model is None:
            return
        self._hook.remove()
        self._ours.removed = True
        current = _without_removed(self._model.__dict__.get("_loss_function"))
        if current is not None:
            self._model.loss_function = current
        else:
            self._model.__dict__.pop("_loss_function", None)
        self._model = None

    def __enter__(self) -> LossFunctionHandle:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.remove()


def set_loss_function(
    model: PreTrainedModel, loss: Callable[..., Tensor], *, evaluation_loss: Callable[..., Tensor] = cross_entropy
) -> LossFunctionHandle:
    """Makes ``model(..., labels=labels).loss`` the given loss, for this model object alone.

    Labels are shifted where the model's own loss shifts them, ``num_items_in_batch`` becomes the ``normalizer``, and
    logits in half precision are read as they are. Nothing of transformers is patched, and no other model changes::

        with set_loss_function(model, longtail.FocalLoss(gamma=2.0)):
            Trainer(model, ...).train()

    A trainer may compute a loss of its own from the model's outputs: with ``label_smoothing_factor``, with a
    ``compute_loss_func``, or as TRL's ``SFTTrainer`` does. That is an error in its first step, or in its second where
    the labels stay out of the model: there use :class:`ComputeLoss`, in TRL
    :class:`longtail.integrations.trl.SFTLossMixin`. It is not seen where the model is compiled, or called by
    ``model.forward`` (PEFT).

    Args:
        model: whose own loss is that of a causal or masked language model, or of the classification of sequences,
            images (of one class each) or tokens.
        loss: as in :class:`ComputeLoss`. Not a part of the model afterwards: neither in its ``state_dict`` nor among
            its modules.
        evaluation_loss: as in :class:`ComputeLoss`: under ``torch.no_grad`` plain cross-entropy by default.

    Raises:
        TypeError: the model has no ``loss_function``.
        ValueError: its forward does not use it, or the model's own loss is of another kind; in training, the trainer
            does not use it.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}, expected a transformers.PreTrainedModel")
    if "loss_function" not in inspect.unwrap(type(model).forward).__code__.co_names:
        raise ValueError(f"the forward of {type(model).__name__} has its loss written into it; {_remedy(model)}")
    before = model.__dict__.get("_loss_function")
    own = before.own if isinstance(before, _ModelLoss) else model.loss_function
    if own not in _SHIFTS_LABELS:
        names = ", ".join(known.__name__ for known in _SHIFTS_LABELS)
        raise ValueError(f"the model's loss is {getattr(own, '__name__', own)}, expected one of {names}")
    compute = ComputeLoss(loss, shift_labels=_SHIFTS_LABELS[own], evaluation_loss=evaluation_loss)
    ours = _ModelLoss(own, compute, before)
    model.loss_function = ours
    return LossFunctionHandle(model, ours, model.register_forward_hook(check_that_it_was_used, with_kwargs=True))


def _remedy(model: PreTrainedModel) -> str:
    """For a model whose own loss cannot be replaced; encoder-decoder models make their inputs of the labels."""
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return "use ComputeLoss"
    return (
        'use ComputeLoss(loss, shift_labels=False), and batches with "decoder_input_ids", as '
        "DataCollatorForSeq2Seq(tokenizer, model=model) makes them: the Trainer keeps the labels from the model"
    )


class _ModelLoss:
    """Stands in for a loss of transformers, and reads its arguments by its signature. Not a module, on purpose."""

    def __init__(self, own: Callable[..., Any], compute: ComputeLoss, before: Callable[..., Any] | None) -> None:
        self.own = own
        self.compute = compute
        self.before = before  # what the model had been given; None: nothing
        self.removed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        given = inspect.signature(self.own).bind(*args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        logits = given["pooled_logits"] if "pooled_logits" in given else given["logits"]
        labels = given["labels"]
        if self.own is loss_utils.ForSequenceClassificationLoss and (
            labels.is_floating_point() or logits.shape[-1] < 2
        ):
            raise ValueError("the model is asked for regression or for several labels, expected one class index each")
        if given.get("shift_labels") is not None:
            labels = given["shift_labels"]
        elif self.compute.shift_labels:
            labels = shifted(labels)
        overrides = {"ignore_index": given["ignore_index"]} if "ignore_index" in given else {}
        mark_used()
        return flat_loss(self.compute.current_loss(), logits, labels, given.get("num_items_in_batch"), **overrides)


def _without_removed(loss: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """The loss, or the one before it that is not removed; nor does it then hold removed ones."""
    while isinstance(loss, _ModelLoss) and loss.removed:
        loss = loss.before
    if isinstance(loss, _ModelLoss):
        loss.before = _without_removed(loss.before)
    return loss


_PASSES = "longtail.integrations.transformers.DeferredReweightingCallback"


class DeferredReweightingCallback(TrainerCallback):
    """Sets the class weights of a loss at the start of every epoch of the Trainer.

    An epoch is one pass over the data, of a length or not. Where training resumes it goes on with the pass that was
    begun, whose number the checkpoints hold (in ``TrainerState.stateful_callbacks``).

    Args:
        schedule: epoch to weights [C], such as :class:`longtail.training.DeferredReweighting`.
        loss: the module whose ``weight`` buffer is overwritten; make it with ``weight=schedule(0)``.

    Raises:
        ValueError: the loss has no ``weight``, or of another shape.
    """

    def __init__(self, schedule: WeightSchedule, loss: nn.Module) -> None:
        set_weight(loss, schedule(0))
        self.schedule = schedule
        self.loss = loss
        self.epoch = 0  # of the pass that comes next

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # state.epoch knows of a pass that ended, but counts from 0 again where data without a length resume.
        self.epoch = max(int(state.epoch or 0), state.stateful_callbacks.get(_PASSES, {}).get("epoch", 0))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Counted, because a pass that ends early, or whose length is not known, ends between two integers.
        set_weight(self.loss, self.schedule(self.epoch))
        state.stateful_callbacks[_PASSES] = {"epoch": self.epoch}
        self.epoch += 1
