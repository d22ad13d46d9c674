"""What a function of ``**options`` takes, spelled out where ``help``, editors and our modules look: its signature."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_WEIGHTS = "weight=longtail.effective_number_weight(samples_per_class, beta)"
_ADJUSTMENT = "class_bias=longtail.logit_adjustment(samples_per_class, tau)"
# By option: what other libraries, papers and configurations call it; and a value, where the name does not say how.
_ELSEWHERE: dict[str, tuple[tuple[str, ...], str]] = {
    "focal_gamma": (("gamma", "focusing_parameter"), ""),
    "gamma": (("focal_gamma", "complement_gamma", "focusing_parameter", "db_focal_gamma"), ""),
    "gamma_positive": (("gamma_pos", "asl_gamma_pos", "gamma"), ""),
    "gamma_negative": (("gamma_neg", "asl_gamma_neg"), ""),
    "clip": (("asl_clip", "prob_margin", "probability_margin"), ""),
    "detach": (("disable_torch_grad_focal_loss", "disable_torch_grad"), "detach=True"),
    "negative_scale": (("neg_scale", "db_neg_scale"), ""),
    "kappa": (("init_bias", "db_init_bias", "neg_bias"), ""),
    "rebalance_alpha": (("map_alpha",), ""),
    "rebalance_beta": (("map_beta",), ""),
    "rebalance_mu": (("map_mu", "map_gamma"), ""),
    "num_samples": (("train_num", "num_data"), ""),
    "alpha": (("focal_alpha",), ""),
    "weight": (("alpha", "class_weight", "class_weights", "cls_weight", "ce_weight"), "weight, a Tensor [C]"),
    "samples_per_class": (
        ("samples_per_cls", "cls_num_list", "class_counts", "num_samples_per_class", "cum_samples", "class_freq"),
        "",
    ),
    "ignore_index": (("ignore_label", "ignored_index", "ignore_id", "pad_token_id", "padding_idx"), ""),
    "label_smoothing": (("smoothing", "smooth_factor", "eps", "epsilon"), ""),
    "epsilon": (("eps", "epsilon1", "epsilon_1", "poly_epsilon"), ""),
    "q": (("gce_q", "lq_q"), ""),
    "positive_temperature": (("Tp", "tp", "T_p"), ""),
    "negative_temperature": (("Tn", "tn", "T_n"), ""),
    "scale": (("temperature", "logit_scale"), "scale=1 / temperature"),
    "softcap": (("logit_softcapping", "final_logit_softcapping"), ""),
    "z_loss": (("lse_square_scale",), ""),
    "normalizer": (("num_items_in_batch", "avg_factor"), ""),
    "gradient": (("inplace_backward",), 'gradient="inplace"'),
    "linear_bias": (("bias",), ""),
    "class_bias": (("tau", "prior", "priors", "log_prior", "bias"), _ADJUSTMENT),
    "class_margin": (("max_m", "m_list"), "class_margin=longtail.ldam_margin(samples_per_class)"),
    "class_scale": (
        ("delta", "delta_list", "temperatures"),
        "class_scale=longtail.cdt_scale(samples_per_class, gamma)",
    ),
    "target_scale": (("rho", "rhos", "margins"), "target_scale=longtail.immax_scale(samples_per_class)"),
    "class_mitigation": (
        ("mitigation", "cum_samples"),
        "class_mitigation=longtail.seesaw_mitigation(samples_per_class)",
    ),
}
_COUNTS = ("beta", "samples_per_class", *_ELSEWHERE["samples_per_class"][0])
_NAMES_OF_WEIGHT = ("weight", "weights", "class_weight", "class_weights")
_FACTORS = ("balance_param", "focal_balance", "loss_weight")
_NUMBER_OF_CLASSES = ("num_classes", "n_classes", "classes_num")


def with_options_of(*sources: Callable[..., Any], without: Iterable[str] = ()) -> Callable[[F], F]:
    """Writes into a function's signature that its ``**options`` are arguments of ``sources``, but for ``without``."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        *own, last = signature.parameters.values()
        assert last.kind is inspect.Parameter.VAR_KEYWORD
        found = {parameter.name: parameter for parameter in own}
        for source in sources:
            for name, parameter in inspect.signature(source).parameters.items():
                if name not in (*found, *without):
                    kind = inspect.Parameter.KEYWORD_ONLY
                    found[name] = parameter.replace(kind=kind, annotation=annotation_text(parameter.annotation))
        function.__signature__ = signature.replace(parameters=[*found.values()])  # type: ignore[attr-defined]
        function.__annotations__.pop(last.name, None)  # the Unpack that type checkers read, unknown at run time
        return function

    return decorate


def annotation_text(annotation: Any) -> str:
    """An annotation that is a text, or, of a NamedTuple, a reference that holds one."""
    return str(getattr(annotation, "__forward_arg__", annotation))


def refuse_unknown(function: Callable[..., Any], named: Collection[str]) -> None:
    """Raises what Python raises of keyword arguments that a function's signature does not have.

    Raises:
        TypeError: one of ``named`` is none of them; with what may have been meant.
    """
    for name in named:
        accepted = function.__signature__.parameters  # type: ignore[attr-defined]
        if name not in accepted:
            hint = meant(name, [option for option in accepted if option not in named])
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}{hint}")


def meant(name: str, accepted: Collection[str]) -> str:
    """The end of a message about an unknown option: the ``accepted`` one that may have been meant, or nothing."""
    if name in _NUMBER_OF_CLASSES:
        return f". The number of classes is that of the {'hierarchy' if 'hierarchy' in accepted else 'logits'}"
    if name in _FACTORS:
        return f". Multiply the loss by {name}"
    if name == "eps" and "clip" in accepted:  # of the authors' asymmetric loss
        return ". No logarithm is cut off"
    if name in _COUNTS and not set(_COUNTS) & set(accepted) and "weight" in accepted:
        return f". Did you mean {_WEIGHTS}?"
    if name in _NAMES_OF_WEIGHT and "weight" not in accepted and "volume" in accepted:
        return ". The weights are those of samples_per_class and beta or volume"
    for option, (others, value) in _ELSEWHERE.items():
        if name in others and option in accepted:
            return f". Did you mean {value or repr(option)}?"
    close = difflib.get_close_matches(name, accepted, n=1, cutoff=0.75)
    return f". Did you mean {close[0]!r}?" if close else ""
