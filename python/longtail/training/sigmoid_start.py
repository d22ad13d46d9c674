"""The start of a sigmoid classifier: a bias that says "rare", and no weight decay on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..arguments import check_number


@torch.no_grad()
def init_sigmoid_bias_(layer: nn.Module, prior: float | Tensor | None = None) -> Tensor:
    r"""Sets the bias of the last layer to :math:`-\log((1 - \pi) / \pi)`, so that every sigmoid starts near pi.

    Lin et al. 2017, section 4.1 (pi = 0.01); Cui et al. 2019, section 5 (pi = 1 / C, the default). Without it the C - 1
    negatives of each row rule the first steps. Take weight decay off this bias too:
    :func:`parameter_groups_without_bias_decay`.

    Args:
        layer: a module with a ``bias``: ``nn.Linear``, a convolution, ...; changed in place. A parametrized bias is set
            through the ``right_inverse`` of its parametrizations.
        prior: pi in (0, 1): a number, or one for each element of the bias, in its shape. None: 1 / (its length).

    Returns:
        The bias.

    Raises:
        TypeError: ``layer`` is no module, or ``prior`` no number.
        ValueError: the layer has no bias, or one that is empty or computed and cannot be set, which stays as it is; a
            prior is not in (0, 1).
    """
    bias = _settable_bias(layer)
    if isinstance(prior, Tensor):
        if prior.shape != bias.shape:
            raise ValueError(f"prior has shape {list(prior.shape)}, expected {list(bias.shape)} as the bias")
        pi = prior.detach().to("cpu", torch.float64)
        wrong = ~((pi > 0) & (pi < 1))
        if wrong.any():
            raise ValueError(f"prior holds {pi[wrong][0].item():g}, expected numbers in (0, 1)")
        return _set_bias(layer, bias, torch.logit(pi))
    if prior is None:
        if bias.numel() < 2:
            raise ValueError("the layer has one output, for which there is no default: expected prior in (0, 1)")
        prior = 1 / bias.numel()
    number = check_number("prior", prior)
    if not 0 < number < 1:
        raise ValueError(f"prior is {number:g}, expected a number in (0, 1)")
    return _set_bias(layer, bias, math.log(number) - math.log1p(-number))


def parameter_groups_without_bias_decay(
    model: nn.Module, layer: nn.Module | Sequence[nn.Module], weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: ``weight_decay`` on everything but the bias of the given layer or layers.

    Cui et al. 2019, section 5, for sigmoid losses: decay would pull the bias of :func:`init_sigmoid_bias_` back to 0.
    Every parameter of the model stands in exactly one group, once, tied and frozen ones too. Of a parametrized bias
    everything that its parametrizations hold is spared.

    Args:
        model: whose parameters are grouped.
        layer: the last layer, a part of ``model``, or several of them.
        weight_decay: >= 0, of the others.

    Returns:
        Two groups, the decayed parameters first; one where nothing is left to decay.

    Raises:
        TypeError: ``layer`` is no module.
        ValueError: a layer has no bias, or is no part of the model.
    """
    decay = check_number("weight_decay", weight_decay, 0.0)
    layers = [layer] if isinstance(layer, nn.Module) else list(layer)
    parameters = list(model.parameters())
    known = {id(parameter) for parameter in parameters}
    chosen = {id(parameter) for one in layers for parameter in _bias_parameters(one)}
    if not chosen <= known:
        raise ValueError("the bias of a layer is no parameter of the model, expected a layer of this model")
    groups = [
        {"params": [p for p in parameters if id(p) not in chosen], "weight_decay": decay},
        {"params": [p for p in parameters if id(p) in chosen], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _bias(layer: nn.Module) -> Tensor:
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer is a {type(layer).__name__}, expected a torch.nn.Module")
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, Tensor):
        raise ValueError(f"the layer ({type(layer).__name__}) has no bias, expected one with bias=True")
    return bias


def _bias_parameters(layer: nn.Module) -> list[Tensor]:
    """What an optimizer changes of the bias."""
    bias, held = _bias(layer), _parametrizations(layer)
    return [bias] if held is None else list(held.parameters())


def _parametrizations(layer: nn.Module) -> ParametrizationList | None:
    """Those of the bias."""
    every = getattr(layer, "parametrizations", None)
    held = every["bias"] if isinstance(every, nn.ModuleDict) and "bias" in every else None
    return held if isinstance(held, ParametrizationList) else None


def _settable_bias(layer: nn.Module) -> Tensor:
    """The bias, which is not empty, and which the next forward takes as it was left."""
    bias, kind = _bias(layer), type(layer).__name__
    if bias.numel() == 0:
        raise ValueError(
            f"the bias of the layer ({kind}) is empty, as parameters that ZeRO-3 or FSDP share out are outside the "
            "forward of their module: expected a call before they are shared out, or while they are gathered"
        )
    if isinstance(bias, nn.Parameter) or _parametrizations(layer) is not None:
        return bias
    # weight_norm, spectral_norm and pruning by hooks make the attribute anew from a parameter of such a name
    sources = {"bias_orig", "bias_g"} & dict(layer.named_parameters(recurse=False)).keys()
    if sources or _bias(layer).data_ptr() != bias.data_ptr():
        raise ValueError(
            f"the bias of the layer ({kind}) is computed{''.join(f' from {name}' for name in sources)}, expected a "
            "parameter or a parametrization: set the bias before it is replaced"
        )
    return bias


def _set_bias(layer: nn.Module, bias: Tensor, value: Tensor | float) -> Tensor:
    held = _parametrizations(layer)
    if held is None:
        return bias.copy_(value) if isinstance(value, Tensor) else bias.fill_(value)
    wanted = torch.empty_like(bias)
    wanted = wanted.copy_(value) if isinstance(value, Tensor) else wanted.fill_(value)
    before = [(tensor, tensor.clone()) for tensor in (*held.parameters(), *held.buffers())]
    fault: Exception | None = None
    try:
        held.right_inverse(wanted.clone())
        digits = math.sqrt(torch.finfo(bias.dtype).eps)  # half of them
        reached = torch.allclose(held(), wanted, rtol=digits, atol=digits)
    except Exception as error:  # right_inverse is anybody's code
        reached, fault = False, error
    if not reached:
        for tensor, old in before:
            tensor.copy_(old)
        names = ", ".join(type(one).__name__ for one in held)
        raise ValueError(
            f"the bias of the layer ({type(layer).__name__}) is parametrized by {names}, which cannot make it "
            f"{wanted.flatten()[0].item():g}: expected a right_inverse that leads there"
        ) from fault
    return _bias(layer)
