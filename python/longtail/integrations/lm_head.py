"""The output layer of a causal language model of transformers: losses and statistics from the states before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import cross_entropy, linear_cross_entropy, linear_row_statistics, row_statistics
from ..modules import CrossEntropyLoss
from ..reference.row_statistics import RowStatistics

# Where configurations of transformers' models say what becomes of the logits.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTOR_INSTEAD = {"hyperclovax": "logits_scaling"}  # a divisor everywhere else


class LogitOptions(NamedTuple):
    """``softcap(scale * layer(states))`` are a model's logits."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> LogitOptions:
        """As the model's configuration says, and checked on two tokens.

        Raises:
            TypeError: the model has no output layer.
            ValueError: its logits are others.
        """
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise TypeError(f"{type(model).__name__} has no output layer, expected a causal language model")
        config = model.config.get_text_config()
        multiplied = _FACTOR_INSTEAD.get(config.model_type)
        scale, softcap = 1.0, None
        for name in (*_FACTORS, *_DIVISORS, *_SOFTCAPS):
            value = getattr(config, name, None)
            if value is None:
                continue
            if name in _SOFTCAPS:
                softcap = value
            else:
                scale = scale / value if name in _DIVISORS and name != multiplied else scale * value
        found = cls(scale, softcap)
        found._check(model)
        return found

    def apply(self, logits: Tensor) -> Tensor:
        logits = self.scale * logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def _check(self, model: Any) -> None:
        layer = model.get_output_embeddings()
        if any(p.is_meta or p.numel() == 0 for p in model.parameters()):
            return  # nothing to compute with yet, or shared out among ranks
        modes = {module: module.training for module in model.modules()}
        ids = torch.tensor([[0, 1]], device=model.device)
        try:
            for module in modes:
                module.training = False
            want = model(input_ids=ids, use_cache=False, return_dict=True).logits.float()
            states = model.base_model(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state
            got = self.apply(layer(states).float())
        finally:
            for module, training in modes.items():
                module.training = training
        # Two percent of the largest: bfloat16 rounds to 0.4.
        if not torch.allclose(got, want, rtol=0.0, atol=0.02 * want.abs().max().item(), equal_nan=True):
            raise ValueError(
                f"the logits of {type(model).__name__} are not those of its output layer with scale {self.scale} and "
                f"softcap {self.softcap}, as its configuration says: use its logits, by ComputeLoss"
            )


_HOOKS_TO_IGNORE = "trl.models.activation_offloading"  # they keep the layer's logits where they are: there are none


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer is its weight and bias alone: no adapter, no quantised weight, no hook."""
    hooks = (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values())
    return type(layer) is nn.Linear and all(getattr(x, "__module__", None) == _HOOKS_TO_IGNORE for x in hooks)


def check_arguments(layer: Any, options: LogitOptions, losses: tuple[Any, ...], temperature: float) -> None:
    """Raises of no tokens what every call would raise of losses, class vectors and temperature."""
    num_classes = getattr(layer, "out_features", layer.weight.shape[0])
    device = torch.device("cpu") if layer.weight.is_meta else layer.weight.device  # class vectors move there
    dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    # Not initialised: random numbers would be drawn.
    stand_in = nn.utils.skip_init(nn.Linear, 1, num_classes, bias=False, device=device, dtype=dtype)
    states, labels = stand_in.weight.new_empty(0, 1), stand_in.weight.new_empty(0, dtype=torch.long)
    token_statistics(stand_in, states, labels, options, temperature)
    for loss in losses:
        if isinstance(loss, CrossEntropyLoss):
            token_losses(stand_in, states, labels, options, loss)


def token_statistics(
    layer: Any, states: Tensor, labels: Tensor, options: LogitOptions, temperature: float
) -> RowStatistics:
    """Row statistics, differentiable, of the tokens' states (N, D) and labels (N,)."""
    given = {"temperature": temperature, **options._asdict()}
    if is_plain(layer):
        return linear_row_statistics(states, layer.weight, labels, linear_bias=layer.bias, **given)
    return row_statistics(layer(states), labels, **given)


def token_losses(
    layer: Any, states: Tensor, labels: Tensor, options: LogitOptions, loss: CrossEntropyLoss
) -> tuple[Tensor, RowStatistics]:
    """The loss of every token, [N], and its statistics, which are not differentiable.

    Raises:
        ValueError: model and loss both cap or scale the logits.
    """
    loss.to(states.device)
    given = {**loss.options, **dict(loss.named_buffers()), "reduction": "none", "return_stats": True}
    given["gradient"] = "backward"  # of losses that are not reduced no other can be had
    if options.softcap is not None and (loss.softcap is not None or loss.scale != 1):
        raise ValueError(
            f"the model caps its logits at {options.softcap}, and the loss has scale={loss.scale} and "
            f"softcap={loss.softcap}, expected 1 and None"
        )
    given |= {"scale": loss.scale * options.scale, "softcap": options.softcap or loss.softcap}
    if is_plain(layer):
        return linear_cross_entropy(states, layer.weight, labels, linear_bias=layer.bias, **given)
    return cross_entropy(layer(states), labels, **given)
