"""Promise: a module takes what its function takes; every option is an attribute that is checked and takes effect."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cases
import longtail
from tolerances import assert_same

ROWS, CLASSES = 6, 5
LOGITS, TARGET = cases.random_case(ROWS, CLASSES, ignore=False)
FEATURES = torch.randn(ROWS, 4, generator=cases.generator(1))
PARAMETER = nn.Parameter(torch.randn(CLASSES, 4, generator=cases.generator(2)))
VECTOR = torch.rand(CLASSES, generator=cases.generator(3))
SAMPLES = [50, 20, 10, 5, 1]


class Case(NamedTuple):
    """A module, and its function, both given options; the data of a call."""

    module: Callable[..., nn.Module]
    function: Callable[..., Any]
    input: Tensor = LOGITS
    target: Tensor = TARGET

    def pass_on(self, **options: Any) -> Any:
        return self.function(self.input, self.target, **options)


def linear(x: Tensor, t: Tensor, **options: Any) -> Any:
    return longtail.linear_cross_entropy(x, PARAMETER, t, **options)


def class_balanced(x: Tensor, t: Tensor, **options: Any) -> Any:
    if "volume" not in options:
        options.setdefault("beta", 0.9)
    return longtail.class_balanced_loss(x, t, options.pop("samples_per_class", SAMPLES), **options)


def class_balanced_module(**options: Any) -> nn.Module:
    if "volume" not in options:
        options.setdefault("beta", 0.9)
    return longtail.ClassBalancedLoss(options.pop("samples_per_class", SAMPLES), **options)


def sigmoid_focal(x: Tensor, t: Tensor, **options: Any) -> Any:
    return longtail.sigmoid_focal_loss(x, t, **{"reduction": "mean", **options})


BINARY = (LOGITS[:, 0], torch.tensor([0.0, 1.0, 1.0, 0.0, 0.3, 1.0]))
CASES = {
    "CrossEntropyLoss": Case(longtail.CrossEntropyLoss, longtail.cross_entropy),
    "FocalLoss": Case(longtail.FocalLoss, longtail.focal_loss),
    "ComplementEntropyLoss": Case(longtail.ComplementEntropyLoss, longtail.complement_entropy),
    "ComplementCrossEntropyLoss": Case(longtail.ComplementCrossEntropyLoss, longtail.complement_cross_entropy),
    "PolyCrossEntropyLoss": Case(longtail.PolyCrossEntropyLoss, longtail.poly_cross_entropy),
    "GeneralizedCrossEntropyLoss": Case(longtail.GeneralizedCrossEntropyLoss, longtail.generalized_cross_entropy),
    "SigmoidFocalLoss": Case(longtail.SigmoidFocalLoss, sigmoid_focal),
    "SigmoidCrossEntropyLoss": Case(longtail.SigmoidCrossEntropyLoss, longtail.sigmoid_cross_entropy),
    "BinaryFocalLoss": Case(longtail.BinaryFocalLoss, longtail.binary_focal_loss, *BINARY),
    "AsymmetricLoss": Case(longtail.AsymmetricLoss, longtail.asymmetric_loss),
    "ZLPRLoss": Case(longtail.ZLPRLoss, longtail.zlpr_loss),
    "TwoWayLoss": Case(longtail.TwoWayLoss, longtail.two_way_loss),
    "LinearCrossEntropyLoss": Case(
        partial(longtail.LinearCrossEntropyLoss, 4, CLASSES, linear_weight=PARAMETER), linear, FEATURES
    ),
    **{
        f"ClassBalancedLoss, {loss}": Case(
            partial(class_balanced_module, loss=loss), lambda x, t, loss=loss, **o: class_balanced(x, t, loss=loss, **o)
        )
        for loss in ("softmax", "softmax_focal", "sigmoid", "focal")
    },
}
NUMBER = (TypeError, ValueError)
# A value that is no default, and a wrong one (None: there is none).
VALUES: dict[str, tuple[Any, Any]] = {
    "weight": (VECTOR, [1.0]),
    "class_bias": (VECTOR, torch.arange(CLASSES)),
    "class_margin": (VECTOR, "large"),
    "class_scale": (VECTOR, [1.0] * CLASSES),
    "target_scale": (VECTOR, 2.0),
    "class_mitigation": (VECTOR, torch.arange(CLASSES)),
    "compensation": (0.7, -1.0),
    "pos_weight": (VECTOR, 2.0),
    "sample_weight": (torch.rand(ROWS, generator=cases.generator(4)), [1.0] * ROWS),
    "ignore_index": (int(TARGET[0]), "none"),
    "reduction": ("sum", "average"),
    "label_smoothing": (0.2, 1.5),
    "focal_gamma": (1.5, -1.0),
    "complement_gamma": (-2.0, "large"),
    "gamma": (0.7, float("nan")),
    "alpha": (0.3, 1.5),
    "gamma_positive": (0.5, -1.0),
    "gamma_negative": (3.0, -1.0),
    "clip": (0.1, 1.0),
    "detach": (True, "yes"),
    "negative_scale": (1.5, 0.0),
    "rebalance_mu": (0.4, "half"),
    "epsilon": (-0.5, "much"),
    "q": (0.4, 1.5),
    "temperature": (0.7, 0.0),
    "balanced": (True, None),
    "scale": (1.5, "2"),
    "softcap": (20.0, -1.0),
    "z_loss": (1e-3, torch.tensor(1e-3)),
    "normalizer": (3.0, "everything"),
    "gradient": ("inplace", "sideways"),
    "return_stats": (True, None),
    "class_weight_by_target": (True, None),
    "chunk_size": (2, 0),
    "accumulate_dtype": (torch.float64, torch.int32),
    "samples_per_class": ([9, 3, 1, 1, 1], [[1, 2]]),
    "beta": (0.5, 1.5),
    "volume": (7.0, 0.5),
    "empty": ("clamp", "ignore"),
    "loss": ("focal", "hinge"),
    "multi_label": ("row_max", "rows"),
    "element_weight": (VECTOR, None),
    "focus": (1.0, None),
}
TOGETHER = {"normalizer": {"reduction": "mean"}, "class_weight_by_target": {"weight": VECTOR}}


def takes(case: Case, name: str) -> bool:
    """Whether the function has an option of that name, by its own word."""
    value = VALUES[name][0]
    value = value[:1] if case.input.dim() == 1 and name in ("weight", "pos_weight", "class_bias") else value
    try:
        case.pass_on(**{name: value})
    except TypeError as error:
        return name not in str(error)
    except ValueError:  # it has, and wants others with it
        return True
    return True


def outcome(call: Callable[..., Any], case: Case) -> list[Tensor]:
    """Losses, statistics and the gradient."""
    x = case.input.clone().requires_grad_()
    found = call(x * 1.0, case.target)
    loss, *stats = found if isinstance(found, tuple) else (found,)
    up = torch.rand(loss.shape, generator=cases.generator(5))
    return [loss.detach(), *(s for one in stats for s in one), *torch.autograd.grad(loss, x, up)]


def assert_alike(module: nn.Module, case: Case, **options: Any) -> None:
    function = partial(case.function, **options)
    for actual, expected in zip(outcome(module, case), outcome(function, case), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("which", CASES)
def test_every_option(which: str, name: str) -> None:
    case = CASES[which]
    value, wrong = VALUES[name]
    if not takes(case, name):
        with pytest.raises(TypeError, match=name):
            case.module(**{name: value})
        return
    if case.input.dim() == 1 and name in ("weight", "pos_weight", "class_bias"):
        value = value[:1]
    others = TOGETHER.get(name, {})
    if name == "loss":
        case = CASES["ClassBalancedLoss, softmax"]._replace(function=class_balanced)
    built = case.module(**{**others, name: value}) if name != "loss" else class_balanced_module(loss=value)
    written = case.module(**others)
    setattr(written, name, value)
    for module in (built, written):
        assert getattr(module, name) is value
        assert_alike(module, case, **{**others, name: value})
        assert_alike(pickle.loads(pickle.dumps(module)), case, **{**others, name: value})
        assert_alike(copy.deepcopy(module), case, **{**others, name: value})
    if wrong is not None:
        with pytest.raises(NUMBER, match=name):
            case.module(**{**others, name: wrong}) if name != "loss" else class_balanced_module(loss=wrong)
        with pytest.raises(NUMBER, match=name):
            setattr(written, name, wrong)
        assert getattr(written, name) is value
        assert_alike(written, case, **{**others, name: value})


@pytest.mark.parametrize("which", CASES)
def test_defaults_are_the_functions(which: str) -> None:
    module = CASES[which].module()
    assert_alike(module, CASES[which])
    own = inspect.signature(type(module)).parameters
    for name, parameter in inspect.signature(type(module)._function).parameters.items():
        if name in VALUES and name not in ("weight", "loss"):
            default = "mean" if name == "reduction" else parameter.default
            assert getattr(module, name) == default
            assert name not in own or own[name].default == default
    assert set(dict(module.named_buffers())) == ({"weight"} if "ClassBalanced" in which else set())


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [(longtail.CrossEntropyLoss, nn.CrossEntropyLoss), (longtail.SigmoidCrossEntropyLoss, nn.BCEWithLogitsLoss)],
)
def test_attributes_of_torch(ours: Any, torchs: Any) -> None:
    old = torchs()
    names = [name for name in (*vars(old), *old._buffers) if not name.startswith("_") and name != "training"]
    assert {"reduction", "weight"} <= set(names)
    for name in names:
        assert getattr(ours(), name) == getattr(old, name)
    assert not hasattr(ours(), "size_average")
    vector = torch.rand(CLASSES)
    for module in (ours(), torchs()):
        module.weight = vector
        assert module.state_dict()["weight"] is not None
        module.reduction = "none"
        target = TARGET if torchs is nn.CrossEntropyLoss else torch.ones_like(LOGITS)
        assert module(LOGITS, target).shape == target.shape


@pytest.mark.parametrize("which", ["CrossEntropyLoss", "FocalLoss", "SigmoidCrossEntropyLoss"])
def test_deprecated_options_say_the_reduction(which: str) -> None:
    with pytest.warns(UserWarning, match='pass reduction="sum"'):
        assert CASES[which].module(size_average=False).reduction == "sum"


@pytest.mark.parametrize("which", CASES)
def test_compiled(which: str) -> None:
    torch._dynamo.reset()  # all modules share one forward, which is recompiled a few times at most
    case, module = CASES[which], CASES[which].module()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for reduction in ("mean", "sum"):
        module.reduction = reduction
        assert_same(compiled(case.input, case.target), module(case.input, case.target))
        assert_same(module(case.input, case.target), case.pass_on(reduction=reduction))


def test_repr_shows_what_was_written() -> None:
    module = longtail.FocalLoss()
    module.gamma, module.scale, module.weight, module.sample_weight = 0.5, 2.0, VECTOR, torch.ones(3)
    assert repr(module) == (
        "FocalLoss(weight=[5], gamma=0.5, ignore_index=-100, reduction='mean', label_smoothing=0.0, scale=2.0, "
        "sample_weight=[3])"
    )
    assert repr(longtail.ClassBalancedLoss([3, 2], volume=[9, 8], gamma=1.0, loss="focal", alpha=0.5)) == (
        "ClassBalancedLoss(volume=[C], weight=[2], loss='focal', gamma=1.0, alpha=0.5)"
    )
    for beta in (0.9, np.float64(0.9), np.array(0.9), torch.tensor(0.9, dtype=torch.float64)):
        assert repr(longtail.ClassBalancedLoss([3, 2], beta)).startswith("ClassBalancedLoss(beta=0.9, weight=[2], ")


def test_per_call_overrides() -> None:
    module = longtail.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)
    expected = longtail.cross_entropy(LOGITS, TARGET, reduction="none", label_smoothing=0.1)
    assert_same(module(LOGITS, TARGET, reduction="none"), expected)
    assert module.reduction == "sum"
    balanced = longtail.ClassBalancedLoss(SAMPLES, 0.9)
    expected = longtail.class_balanced_loss(LOGITS, TARGET, SAMPLES, 0.9, "focal", alpha=0.5)
    assert_same(balanced(LOGITS, TARGET, loss="focal", alpha=0.5), expected)
    balanced.z_loss = 0.1
    with pytest.raises(TypeError, match="z_loss"):
        balanced(LOGITS, TARGET, loss="focal")


def test_class_balanced_weights_stay_where_they_are() -> None:
    module = longtail.ClassBalancedLoss(SAMPLES, 0.9).double()
    module.beta = 0.99
    assert_same(module.weight, longtail.effective_number_weight(SAMPLES, 0.99, dtype=torch.float64))
    module.samples_per_class = torch.tensor([5, 4, 1])
    module.to("meta")
    module.beta = 0.5
    assert (module.weight.device.type, module.weight.dtype) == ("meta", torch.float64)
    half = longtail.ClassBalancedLoss([1, 1], 1.0).half()
    with pytest.raises(ValueError, match=r"class 1 is 2e-09, expected .* which torch\.float16 holds"):
        half.samples_per_class = [1, 10**9]
    assert half.samples_per_class == [1, 1]


def test_class_balanced_one_of_beta_and_volume() -> None:
    module = longtail.ClassBalancedLoss(SAMPLES, 0.9)
    module.volume = 100
    assert (module.beta, module.volume) == (None, 100)
    assert_same(module.weight, longtail.effective_number_weight(SAMPLES, volume=100))
    module.beta = 0.9
    assert (module.beta, module.volume) == (0.9, None)
    with pytest.raises(TypeError, match="exactly one of beta and volume, got neither"):
        module.beta = None
    with pytest.raises(TypeError, match="exactly one of beta and volume, got neither"):
        longtail.ClassBalancedLoss(SAMPLES)
    with pytest.raises(TypeError, match="exactly one of beta and volume, got both"):
        longtail.ClassBalancedLoss(SAMPLES, 0.9, volume=3)


def test_class_balanced_loss_changes() -> None:
    module = longtail.ClassBalancedLoss(SAMPLES, 0.9, gamma=1.0, normalizer=4.0)
    module.loss = "focal"
    expected = longtail.class_balanced_loss(LOGITS, TARGET, SAMPLES, 0.9, "focal", 1.0, normalizer=4.0)
    assert_same(module(LOGITS, TARGET), expected)
    assert (module.alpha, module.ignore_index, hasattr(module, "z_loss")) == (None, None, False)
    module.alpha = 0.5
    with pytest.raises(TypeError, match="alpha"):
        module.loss = "softmax"
    assert (module.loss, module.alpha) == ("focal", 0.5)
    assert_same(module(LOGITS, TARGET, alpha=None), expected)


@pytest.mark.parametrize("which", [which for which in CASES if "ComplementEntropy" not in which])
def test_tensors_as_normalizers_are_checked_at_the_write(which: str) -> None:
    module = CASES[which].module(reduction="mean")
    for wrong in (nn.Parameter(torch.tensor(2.0)), torch.ones(2), torch.tensor(1j)):
        with pytest.raises(NUMBER, match="normalizer"):
            module.normalizer = wrong
    module.normalizer = torch.tensor(2.0)
    assert "normalizer" not in dict(module.named_parameters())
    assert_alike(module, CASES[which], reduction="mean", normalizer=torch.tensor(2.0))


@pytest.mark.parametrize("which", CASES)
def test_class_vectors_that_checkpoints_do_not_hold(which: str) -> None:
    """Whatever is written later, in every copy, and whichever loss the checkpoint is of."""
    case = CASES[which]
    of_classes = ("class_bias", "class_margin", "class_scale", "target_scale", "class_mitigation", "pos_weight")
    names = [name for name in of_classes if takes(case, name)]
    given = {name: VECTOR[: CLASSES if case.input.dim() > 1 else 1].clone() for name in names}
    module = case.module(**given, persistent=False)
    vectors = {**given, **({"weight": torch.ones_like(given[names[0]])} if hasattr(module, "weight") else {})}
    assert module.extra_repr().endswith("persistent=False")
    for again in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        own = set(again.state_dict())
        assert not own & {*vectors}
        assert {*given} <= {*dict(again.named_buffers())}
        again.load_state_dict({**again.state_dict(), **{name: 2 * vector for name, vector in vectors.items()}})
        assert all(torch.equal(getattr(again, name), vector) for name, vector in given.items())
        for name, vector in vectors.items():
            setattr(again, name, vector + 1)
        assert set(again.state_dict()) == own
        again.persistent = True
        assert set(again.state_dict()) == own | {*vectors}
        with pytest.raises(RuntimeError, match="Missing key"):
            again.load_state_dict({name: x for name, x in again.state_dict().items() if name not in vectors})
        with pytest.raises(TypeError, match="persistent is a str, expected a bool"):
            again.persistent = "no"


@pytest.mark.parametrize("weight", [None, VECTOR])
def test_a_checkpoint_with_torchs_loss_loads(weight: Tensor | None) -> None:
    head = nn.Linear(4, CLASSES)
    saved = nn.ModuleDict({"head": head, "loss": nn.CrossEntropyLoss(weight)}).state_dict()
    loss = longtail.CrossEntropyLoss(class_bias=VECTOR, persistent=False)
    model = nn.ModuleDict({"head": nn.Linear(4, CLASSES), "loss": loss})
    model.load_state_dict(saved)
    assert_same(model["head"].weight, head.weight)
    assert_same(loss.class_bias, VECTOR)
    assert loss.weight is None
    with pytest.raises(RuntimeError, match=r"Unexpected key.*loss\.other"):
        model.load_state_dict({**saved, "loss.other": VECTOR})


def test_class_balanced_loss_that_changes_stays_out_of_checkpoints() -> None:
    module = longtail.ClassBalancedLoss(SAMPLES, 0.9, persistent=False)
    module.loss = "focal"
    module.beta = 0.5
    assert (module.persistent, dict(module.state_dict())) == (False, {})
