"""TRL: our losses in its SFTTrainer, our row statistics in GRPOTrainer and RLOOTrainer. Of TRL 1.16.

TRL's trainers call ``model(..., labels=labels, fused_lm_head=True)`` and make losses and metrics of what comes back,
a few numbers a token and no logits. That call is answered here instead: the trainers, what wraps the model, and TRL
itself stay as they are. Needs the extra ``trl``; without its trainers, ``transformers``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

try:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError(f"{error}; longtail.integrations.trl needs pip install 'trl>=1.16'") from error

from ..modules import CrossEntropyLoss
from ..reference.row_statistics import RowStatistics
from .forwards import forward_of
from .lm_head import LogitOptions, check_arguments, token_losses, token_statistics
from .transformers import IGNORE_INDEX, check_options, one_number

__all__ = ["SFTLossMixin", "TokenStatistics", "add_fused_lm_head"]

TokenLoss: TypeAlias = CrossEntropyLoss | Callable[[RowStatistics], Tensor]


@dataclass
class TokenStatistics(ModelOutput):
    """What a model answers to ``fused_lm_head=True``. All but ``loss`` are 0 or False where there is no label.

    Shapes are (B, L - 1), for the labels are shifted, or that of ``shift_labels``; float32 (float64 of float64 models).
    """

    loss: Tensor | None = None
    """0-d: sum of the tokens' losses over ``num_items_in_batch``, without it over the labels, at least 1; and
    ``aux_loss``, where there is one, times the configuration's ``router_aux_loss_coef``."""
    log_probs: Tensor | None = None
    """Log-probabilities of the labels; of a model with a loss, minus the tokens' losses. Differentiable."""
    entropy: Tensor | None = None
    """Entropies of the softmax, in nats. Differentiable, but detached where the loss is a CrossEntropyLoss."""
    is_top1: Tensor | None = None
    """bool: the label's logit is above all others."""
    label_mask: Tensor | None = None
    """bool: there is a label."""
    aux_loss: Tensor | None = None
    """0-d: that of a mixture of experts' routers, where the call or the configuration says ``output_router_logits``."""


class Head(NamedTuple):
    """How states and labels become :class:`TokenStatistics`."""

    options: LogitOptions
    temperature: float = 1.0
    float32: bool = False
    loss: TokenLoss | None = None
    evaluation_loss: TokenLoss | None = None

    @torch.compiler.disable  # it would break at the number of labels anyway, and be made anew for others
    def __call__(self, layer: Any, states: Tensor, labels: Tensor, num_items: Tensor | float | None) -> TokenStatistics:
        states, labels = states.to(layer.weight.device), labels.to(layer.weight.device)
        mask = labels != IGNORE_INDEX
        precision = torch.autocast(states.device.type, enabled=False) if self.float32 else nullcontext()
        with precision:
            states = states.float() if self.float32 else states
            losses, stats = self.rows(layer, states[mask], labels[mask])
        # Connected to the model also where no token has a label.
        log_probs, entropy, correct = (
            x.new_zeros(mask.shape).masked_scatter(mask, x) for x in (-losses, stats.entropy, stats.correct)
        )
        divisor = mask.sum().clamp(min=1) if num_items is None else one_number(num_items, mask.device)
        return TokenStatistics(-log_probs.sum() / divisor, log_probs, entropy, correct, mask)

    def rows(self, layer: Any, states: Tensor, labels: Tensor) -> tuple[Tensor, RowStatistics]:
        loss = self.loss if torch.is_grad_enabled() else self.evaluation_loss
        if isinstance(loss, CrossEntropyLoss):
            return token_losses(layer, states, labels, self.options, loss)
        stats = token_statistics(layer, states, labels, self.options, self.temperature)
        losses = -stats.log_prob if loss is None else loss(stats)
        if not isinstance(losses, Tensor):
            raise TypeError(f"the loss returned a {type(losses).__name__}, expected a tensor, {list(labels.shape)}")
        if losses.shape != labels.shape:
            raise ValueError(
                f"the loss returned shape {list(losses.shape)}, expected {list(labels.shape)}, one a token"
            )
        return losses, stats


class _Calls:
    """Whether a model was asked. A flag: of a number compiled code would be made anew as it grows."""

    asked = False


def _answer(model: Any, head: Head, *args: Any, **kwargs: Any) -> TokenStatistics:
    labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    num_items = kwargs.pop("num_items_in_batch", None)
    if labels is None and shift_labels is None:
        raise ValueError("labels are None, expected labels or shift_labels beside fused_lm_head=True")
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    # Looked up in every call: FSDP and PEFT put others in their place.
    found = model.base_model(*args, **{**kwargs, "use_cache": False, "return_dict": True})
    states = found.last_hidden_state
    if shift_labels is None:
        states, shift_labels = states[:, :-1], labels[:, 1:]
    statistics = head(model.get_output_embeddings(), states, shift_labels, num_items)
    if kwargs.get("output_router_logits"):
        aux_loss = _router_loss(text, found.router_logits, kwargs.get("attention_mask"))
        loss: Any = statistics.loss
        statistics.aux_loss = aux_loss
        statistics.loss = loss + getattr(text, "router_aux_loss_coef", 0.0) * aux_loss.to(loss.device)
    return statistics


def _router_loss(text: Any, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # of all its mixtures of experts

    return load_balancing_loss_func(router_logits, text.num_experts, text.num_experts_per_tok, attention_mask)


def add_fused_lm_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    *,
    loss: TokenLoss | None = None,
    evaluation_loss: TokenLoss | None = None,
) -> None:
    """Makes ``model(..., labels=labels, fused_lm_head=True)`` return :class:`TokenStatistics`, for this object alone.

    As the function of that name by which TRL's trainers prepare their model; called on it afterwards, this takes the
    place of theirs, in GRPOTrainer and RLOOTrainer for policy and reference::

        trainer = GRPOTrainer(...)
        add_fused_lm_head(trainer.model, trainer.temperature)

    Any other call of the model is as before, and a ``copy.deepcopy`` of it answers with its own weights. Tokens without
    a label, -100, are not projected. The answer is a TokenStatistics whatever ``return_dict`` says.

    Args:
        model: a causal language model of transformers, not wrapped; of a PEFT model its ``get_base_model()``.
        temperature: divides the logits.
        cast_lm_head_to_fp32: project in float32, outside of autocast; the output layer is float32 then.
        loss: what stands in ``log_probs`` instead, negated, where gradients are wanted. A
            :class:`longtail.CrossEntropyLoss`, by :func:`longtail.linear_cross_entropy`; its options say every member
            of the softmax family (``focal_gamma=2.0``, ``class_bias=...``); ``gradient`` is not read, for there are no
            logits to overwrite. Or a function of the :class:`longtail.RowStatistics` of N tokens that returns their
            losses, [N]. ``entropy`` and ``is_top1`` are of the loss's effective logits.
        evaluation_loss: the same under ``torch.no_grad``.

    Raises:
        TypeError: the model has no output layer; a loss is another module. In a call: a function returns no tensor.
        ValueError: the model's logits are not those of its output layer, scaled and capped as its configuration says;
            a loss has another reduction, normalizer or ignore_index, returns statistics, or has class vectors of
            another length; both model and loss cap or scale the logits; the temperature is not positive, or not 1
            beside a CrossEntropyLoss. In a call: there are no labels; a function returns another shape.
        RuntimeError: in a call of a copy, the model's ``forward`` had been set to a function bound to the original.
    """
    _add(model, Head(LogitOptions(), temperature, cast_lm_head_to_fp32, loss, evaluation_loss))


def _add(model: PreTrainedModel, head: Head) -> _Calls:
    losses = (head.loss, head.evaluation_loss)
    for loss in losses:
        _check_loss(loss, head.temperature)
    options = LogitOptions.of(model)
    check_arguments(model.get_output_embeddings(), options, losses, head.temperature)
    head, before, calls = head._replace(options=options), forward_of(model), _Calls()

    # A function, which torch.compile can read; generate() and trainers look at its signature.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return before(self, *args, **kwargs)
        calls.asked = True
        return _answer(self, head, *args, **kwargs)

    model.forward = MethodType(forward, model)
    return calls


def _check_loss(loss: Any, temperature: float) -> None:
    if loss is not None and not (isinstance(loss, CrossEntropyLoss) if isinstance(loss, nn.Module) else callable(loss)):
        raise TypeError(
            f"the loss is a {type(loss).__name__}, expected a longtail.CrossEntropyLoss, whose options say every "
            "member of the softmax family, or a function of longtail.RowStatistics"
        )
    check_options(loss, normalizer=None)
    if isinstance(loss, CrossEntropyLoss) and temperature != 1:
        raise ValueError(f"temperature is {temperature}, expected 1.0 with a CrossEntropyLoss, which has a scale")


class SFTLossMixin:
    """Our losses in TRL's SFTTrainer::

        class Trainer(SFTLossMixin, SFTTrainer):
            pass


        loss = longtail.CrossEntropyLoss(class_bias=longtail.logit_adjustment(counts), complement_gamma=-1.0)
        Trainer(model, args=SFTConfig(...), train_dataset=data, loss=loss)

    The logits never exist as a whole: the loss is :func:`longtail.linear_cross_entropy`. TRL shifts the labels, divides
    by ``num_items_in_batch``, and logs its metrics, "entropy" and "mean_token_accuracy" of the same rows, as ever. What
    it evaluates is plain cross-entropy.

    Args:
        loss: of a token where gradients are wanted, as in :func:`add_fused_lm_head`.
        evaluation_loss: as ``loss``, under ``torch.no_grad``: plain cross-entropy by default. Pass the loss itself to
            have it there too.
        args, kwargs: those of SFTTrainer.

    Raises:
        TypeError, ValueError: as :func:`add_fused_lm_head`; TRL's own ``loss_type="dft"``, ``label_smoothing_factor``
            or ``compute_loss_func`` is given too.
        RuntimeError: in a step, TRL did not ask the model for the loss: it is of another version.
    """

    def __init__(self, *args: Any, loss: TokenLoss, evaluation_loss: TokenLoss | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model, settings = self.model, self.args  # type: ignore[attr-defined]
        self._refuse_other_losses(settings)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._longtail_calls = _add(base, Head(LogitOptions(), loss=loss, evaluation_loss=evaluation_loss))

    def _refuse_other_losses(self, settings: Any) -> None:
        for name, value, plain in (
            ("loss_type", getattr(settings, "loss_type", "nll"), "nll"),
            ("label_smoothing_factor", settings.label_smoothing_factor, 0),
            ("compute_loss_func", getattr(self, "compute_loss_func", None), None),
        ):
            if value != plain:
                raise ValueError(f"{name} is {value!r}, expected {plain!r}: the loss is that of the argument loss")

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self._longtail_calls.asked = False
        found = super().compute_loss(*args, **kwargs)  # type: ignore[misc]
        if not self._longtail_calls.asked:
            raise RuntimeError(
                f"{type(self).__name__} did not call its model with fused_lm_head=True, as TRL 1.16 does"
            )
        return found
