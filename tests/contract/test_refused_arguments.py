"""Promise: what no loss can compute with is refused by name, alike by every function, and not taken for something else.

Numbers that the arithmetic's dtype does not hold, integers that int64 does not hold, and tensors without strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import cases
import longtail
from longtail.options import SOFTMAX_VECTORS
from tolerances import assert_close, assert_same

N, C, D = 6, 5, 4
SOFTMAX = {"label_smoothing", "focal_gamma", "complement_gamma", "scale", "softcap", "z_loss", "normalizer"}
SOFTMAX |= {"ignore_index", "compensation", *SOFTMAX_VECTORS}
SIGMOID = {"gamma", "normalizer", "ignore_index", "weight", "pos_weight", "sample_weight", "class_bias"}
SIGMOID |= {"gamma_negative", "clip", "negative_scale", "label_smoothing"}
REBALANCING = {"rebalance_alpha", "rebalance_beta", "rebalance_mu"}
OF_LINEAR = {"chunk_size", "linear_weight", "linear_bias"}
LINEAR = SOFTMAX | OF_LINEAR
HIERARCHICAL = {"alpha", "normalizer", "ignore_index", "weight", "class_bias", "sample_weight"}
TWO_WAY = {"normalizer", "ignore_index", "class_bias", "sample_weight"}
PARALLEL = {"class_start", "num_classes"}
OF_CLASSES = (*SOFTMAX_VECTORS[:-1], "pos_weight")
NOT_FOR_PROBABILITIES = {"focal_gamma", "complement_gamma", "class_margin", "ignore_index"}
NOT_FOR_PROBABILITIES |= {"target_scale", "class_mitigation", "compensation"}


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = cases.generator(0)
    x, w, z = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((N, D), (C, D), (N, C)))
    y = torch.rand(N, C, generator=g).to(dtype)
    return {"x": x, "w": w, "z": z, "y": y, "p": y.softmax(1), "t": torch.arange(N) % C, "b": torch.zeros(C).to(dtype)}


def linear(function: Callable[..., Any], k: bool = False, more: tuple[Any, ...] = ()) -> Callable[..., Any]:
    def call(t: dict[str, Tensor], **given: Any) -> Any:
        x, target = given.pop("input", t["x"]), given.pop("target", t["t"][:, None] if k else t["t"])
        w, b = given.pop("linear_weight", t["w"]), given.pop("linear_bias", t["b"])
        if k and isinstance(w, Tensor) and w.layout == torch.strided and not w.is_nested:
            w, b = w[:, None], b if b is not t["b"] else b[:, None]
        return function(x, w, target, *more, linear_bias=b, **given)

    return call


def plain(function: Callable[..., Any], target: str, *more: Any, **fixed: Any) -> Callable[..., Any]:
    return lambda t, **given: function(
        given.pop("input", t["z"]), given.pop("target", t[target]), *more, **fixed, **given
    )


COUNTS = [9, 5, 3, 2, 1]
TREE = longtail.Hierarchy.from_paths(["a/0", "b/1", "a/2", "b/3", "4"])
SHARDED = {"class_start": 0, "num_classes": C}
FUNCTIONS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "cross_entropy": (plain(longtail.cross_entropy, "t"), SOFTMAX),
    "probabilities": (plain(longtail.cross_entropy, "p"), SOFTMAX - NOT_FOR_PROBABILITIES),
    "focal": (plain(longtail.focal_loss, "t"), SOFTMAX - {"focal_gamma"} | {"gamma"}),
    "complement": (plain(longtail.complement_cross_entropy, "t"), SOFTMAX - {"complement_gamma"} | {"gamma"}),
    "entropy": (plain(longtail.complement_entropy, "t"), {"scale", "softcap", "normalizer", "ignore_index"}),
    "linear": (linear(longtail.linear_cross_entropy), LINEAR),
    "linear_k": (linear(longtail.linear_cross_entropy, k=True), LINEAR - {"sample_weight"}),
    "parallel": (
        lambda t, **given: plain(longtail.vocab_parallel_cross_entropy, "t")(t, **(SHARDED | given)),
        SOFTMAX | PARALLEL,
    ),
    "parallel_linear": (
        lambda t, **given: linear(longtail.vocab_parallel_linear_cross_entropy)(t, **(SHARDED | given)),
        LINEAR | PARALLEL,
    ),
    "hierarchical": (plain(longtail.hierarchical_cross_entropy, "t", TREE), HIERARCHICAL),
    "hierarchical_linear": (
        linear(longtail.linear_hierarchical_cross_entropy, more=(TREE,)),
        HIERARCHICAL | OF_LINEAR,
    ),
    "hierarchical_parallel": (
        lambda t, **given: longtail.vocab_parallel_hierarchical_cross_entropy(
            given.pop("input", t["z"]), given.pop("target", t["t"]), TREE, **({"class_start": 0} | given)
        ),
        HIERARCHICAL | {"class_start"},
    ),
    "hierarchical_parallel_linear": (
        linear(longtail.vocab_parallel_linear_hierarchical_cross_entropy, more=(TREE,)),
        HIERARCHICAL | OF_LINEAR | {"class_start"},
    ),
    "sigmoid": (plain(longtail.sigmoid_focal_loss, "t", reduction="mean"), SIGMOID),
    "sigmoid_elements": (plain(longtail.sigmoid_focal_loss, "y", reduction="mean"), SIGMOID),
    "zlpr": (plain(longtail.zlpr_loss, "t"), TWO_WAY),
    "two_way": (plain(longtail.two_way_loss, "y"), TWO_WAY | {"positive_temperature", "negative_temperature"}),
    "binary": (plain(longtail.binary_focal_loss, "y"), SIGMOID),
    "asymmetric": (plain(longtail.asymmetric_loss, "y"), SIGMOID - {"gamma"} | {"gamma_positive"}),
    "distribution_balanced": (
        plain(longtail.distribution_balanced_loss, "y", COUNTS, 20),
        SIGMOID - {"class_bias"} | REBALANCING | {"kappa"},
    ),
    "sigmoid_cross_entropy": (plain(longtail.sigmoid_cross_entropy, "y"), SIGMOID),
    **{
        f"balanced_{loss}": (plain(longtail.class_balanced_loss, "t", COUNTS, 0.9, loss), of)
        for loss, of in (
            ("softmax", SOFTMAX - {"focal_gamma", "weight"}),
            ("softmax_focal", SOFTMAX - {"focal_gamma", "weight"} | {"gamma"}),
            ("sigmoid", SIGMOID - {"gamma", "weight"}),
            ("focal", SIGMOID - {"weight"}),
        )
    },
}


def sharded(t: dict[str, Tensor], **given: Any) -> Any:
    """The loss of DTensors: of logits, or with ``chunk_size`` of the projection."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    if "chunk_size" in given:
        x, w = DTensor.from_local(t["x"], mesh, [Replicate()]), DTensor.from_local(t["w"], mesh, [Shard(0)])
        return longtail.linear_cross_entropy(x, w, t["t"], **given).full_tensor()
    return longtail.cross_entropy(DTensor.from_local(t["z"], mesh, [Shard(1)]), t["t"], **given).full_tensor()


OF_NUMBERS = FUNCTIONS | {"dtensor": (sharded, SOFTMAX | {"chunk_size"})}

# option -> values that float32 does not hold, though float64 does
BEYOND_FLOAT32: dict[str, tuple[float, ...]] = {
    "softcap": (1e300, 3.5e38, 1e-39, 1e-50),
    "scale": (1e300, -1e300, 1e-50, -1e-39),
    "z_loss": (2e38, -1e300),
    "complement_gamma": (1e300, -1e39),
    "focal_gamma": (1e300,),
    "compensation": (1e300, 1e39),
    **dict.fromkeys(("gamma", "gamma_positive", "gamma_negative", *sorted(REBALANCING)), (1e300,)),
    "negative_scale": (1e300, 1e-50),
    "rebalance_beta": (1e300, 1e-50),
    "clip": (1e-40, 1e-50),
    "alpha": (50.0,),  # of a tree of depth 2: exp(-100)
    "normalizer": (1e300, 1e-50, 10**39),
    "positive_temperature": (1e300, 1e-50),
    "negative_temperature": (1e300, 1e-50),
}
NO_NUMBERS = (np.array([0.1, 0.2]), "high", 10**400)
REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(SOFTMAX & BEYOND_FLOAT32.keys() | {"gamma", "label_smoothing"}, NO_NUMBERS),
    "alpha": (*NO_NUMBERS, -0.1, 400.0, float("nan"), torch.tensor(0.1)),
    **dict.fromkeys(("gamma_positive", "gamma_negative", "kappa", *REBALANCING), (*NO_NUMBERS, float("nan"))),
    "clip": (*NO_NUMBERS, -0.1, 1.0, torch.tensor([0.1])),
    "negative_scale": (*NO_NUMBERS, -1.0, 0.0),
    "softcap": (1e400, np.array(["high"])),
    **{f"{side}_temperature": (*NO_NUMBERS, 0.0, -1.0, None, torch.tensor(1.0)) for side in ("positive", "negative")},
    "normalizer": (10**400, 1j, torch.tensor(1j), -1.0, True, np.array([1.0, 2.0])),
    "ignore_index": (10**5000, 2**70, -(2**63) - 1, True, 1.5),
    "chunk_size": (10**5000, 2**70, 0, True),
    "class_start": (10**5000, 2**70, -1, True),
    "num_classes": (10**5000, 2**70, -1, True),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_numbers_that_do_not_fit(name: str) -> None:
    function, options = OF_NUMBERS[name]
    for table, dtypes in ((BEYOND_FLOAT32, cases.DTYPES[1:]), (REFUSED, cases.DTYPES)):
        for dtype in dtypes:
            data = tensors(dtype)
            for option in sorted(options & table.keys()):
                for value in table[option]:
                    with pytest.raises((ValueError, TypeError), match=rf"\b{option} (is|has)\b"):
                        function(data, **{option: value})


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_numbers_that_fit(name: str) -> None:
    """float64 holds them; what float32 takes for 0 where 0 is as good; the ends of its range."""
    function, options = OF_NUMBERS[name]
    wide, single = tensors(torch.float64), tensors()
    for option in sorted(options & BEYOND_FLOAT32.keys() - {"gamma", "gamma_positive", "gamma_negative"}):
        for value in BEYOND_FLOAT32[option]:
            assert not function(wide, **{option: value}).isnan(), (option, value)
    for option in options & {"label_smoothing", "z_loss", "focal_gamma", "complement_gamma", "compensation"}:
        found, wanted = (function(single, **{option: value}) for value in (1e-50, 0.0))
        if option == "label_smoothing" and "clip" in options:  # another way to the same loss
            assert_close(found, wanted.double())
        else:
            assert torch.equal(found, wanted)
    for option, value in (("softcap", 3.4e38), ("softcap", 1.2e-38), ("scale", 1.2e-38), ("scale", 0.0)):
        if option in options:
            wanted = function(
                {k: v.double() if v.is_floating_point() else v for k, v in single.items()}, **{option: value}
            )
            assert_close(function(single, **{option: value}), wanted, factor=4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vectors_that_float32_does_not_hold(name: str) -> None:
    function, options = FUNCTIONS[name]
    lengths = {**dict.fromkeys(OF_CLASSES, C), "sample_weight": N}
    if "probabilities" in name:
        lengths.pop("weight")  # which is no constant there: torch's own conversion
    for option in sorted(options & lengths.keys()):
        vector = torch.ones(lengths[option], dtype=torch.float64)
        vector[1] = 1e300
        with pytest.raises(ValueError, match=rf"{option} is 1e\+300 at index \[1\]"):
            function(tensors(), **{option: vector})
        vector[1] = torch.inf
        function(tensors(), **{option: vector})


INTEGERS = {"ignore_index": -1, "chunk_size": 2, "class_start": 0, "num_classes": C}


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_integers_of_numpy(name: str) -> None:
    function, options = OF_NUMBERS[name]
    for option in options & INTEGERS.keys():
        wanted = function(tensors(), **{option: INTEGERS[option]})
        for kind in (np.int64, np.int8):
            assert torch.equal(function(tensors(), **{option: kind(INTEGERS[option])}), wanted)
        with pytest.raises(TypeError, match=f"{option} is a"):
            function(tensors(), **{option: np.bool_(True)})


def odd(kind: str, like: Tensor) -> Tensor:
    """A tensor that kernels cannot read."""
    if kind == "sparse":
        return like.to_sparse()
    if kind == "mkldnn":
        return like.float().to_mkldnn()
    return torch.nested.nested_tensor([like, like], layout=torch.jagged if kind == "jagged" else torch.strided)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["sparse", "mkldnn", "nested", "jagged"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_tensors_without_strides(name: str, kind: str) -> None:
    function, options = FUNCTIONS[name]
    data = tensors()
    vectors = {k: torch.ones(C) for k in OF_CLASSES}
    vectors |= {"sample_weight": torch.ones(N), "linear_weight": data["w"], "linear_bias": data["b"]}
    given = {k: v for k, v in vectors.items() if k in options} | {"input": data["z"], "target": data["t"]}
    for argument, value in given.items():
        with pytest.raises(TypeError, match=rf"{argument} (is a nested tensor|has layout torch\.[a-z_]+), expected"):
            function(data, **{argument: odd(kind, value)})


def batched(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda a: torch.func.vmap(function)(a.expand(3, *a.shape))


NO_VMAP = (RuntimeError, r"no rule for vmap, which torch.func.jacrev.*torch.func.grad.*reference")
FORWARD_MODE = (NotImplementedError, "jvp")  # torch's own words
TRANSFORMS: dict[str, tuple[Callable[..., Any], tuple[type[Exception], str]]] = {
    "vmap": (batched, NO_VMAP),
    "vmap_of_grad": (lambda f: batched(torch.func.grad(f)), NO_VMAP),
    "grad_of_vmap": (lambda f: torch.func.grad(lambda a: batched(f)(a).sum()), NO_VMAP),
    "jacrev": (torch.func.jacrev, NO_VMAP),
    "jacfwd": (torch.func.jacfwd, FORWARD_MODE),
    "hessian": (torch.func.hessian, FORWARD_MODE),
    "jvp": (lambda f: lambda a: torch.func.jvp(f, (a,), (a,)), FORWARD_MODE),
}


@pytest.mark.parametrize("gradient", cases.MODES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "name",
    [
        *("cross_entropy", "entropy", "linear", "sigmoid", "sigmoid_elements", "sigmoid_cross_entropy"),
        *("hierarchical", "hierarchical_linear", "zlpr", "two_way"),
    ],
)
def test_transforms_are_refused_with_advice(name: str, transform: str, gradient: str) -> None:
    data, (transformed, (error, text)) = tensors(), TRANSFORMS[transform]
    argument = data["x" if name.endswith("linear") else "z"]
    with pytest.raises(error, match=text):
        transformed(lambda z: FUNCTIONS[name][0](data, input=z * 1.0, gradient=gradient))(argument)


def test_parameters_that_are_shared_out() -> None:
    """Outside the forward of their module, ZeRO-3 and FSDP leave an empty tensor of them."""
    data, empty = tensors(), nn.Parameter(torch.empty(0))
    for name in ("linear", "linear_k", "parallel_linear", "hierarchical_linear", "hierarchical_parallel_linear"):
        for argument in ("linear_weight", "linear_bias"):
            if (name, argument) != ("linear_k", "linear_weight"):
                with pytest.raises(ValueError, match=rf"{argument} is empty .*gather it.*GatheredParameters"):
                    FUNCTIONS[name][0](data, **{argument: empty})


@pytest.mark.parametrize("name", ["hierarchical", "hierarchical_linear"])
def test_dtensors_of_a_hierarchy(name: str) -> None:
    """A tree's classes are shared out by the vocabulary-parallel functions alone."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, data = dist.device_mesh.init_device_mesh("cpu", (1,)), tensors()
    given = {"input": data["x" if name.endswith("linear") else "z"], "target": data["t"]}
    given |= {"linear_weight": data["w"], "linear_bias": data["b"]} if name.endswith("linear") else {}
    for argument, value in given.items():
        expected = "a whole tensor: gather it" if argument.startswith("linear") else "this rank's part of it"
        with pytest.raises(TypeError, match=f"{argument} is a DTensor, expected {expected}"):
            FUNCTIONS[name][0](data, **{argument: DTensor.from_local(value, mesh, [Replicate()])})
    for argument, count in (("weight", C), ("class_bias", C), ("sample_weight", N)):
        with pytest.raises(TypeError, match=rf"{argument} is a DTensor, expected a plain tensor"):
            FUNCTIONS[name][0](data, **{argument: DTensor.from_local(torch.ones(count), mesh, [Replicate()])})


def test_dtensors_of_two_sides() -> None:
    """What a rank has of the classes has another loss: its part is not what is asked for."""
    from torch.distributed.tensor import DTensor, Shard

    mesh, data = dist.device_mesh.init_device_mesh("cpu", (1,)), tensors()
    for argument, value in (("input", data["z"]), ("target", data["y"])):
        with pytest.raises(TypeError, match=rf"{argument} is a DTensor, expected whole rows .* {argument}.full_tensor"):
            FUNCTIONS["two_way"][0](data, **{argument: DTensor.from_local(value, mesh, [Shard(1)])})


def test_class_balanced_loss_names_its_own_arguments() -> None:
    data = tensors()
    for call in (longtail.class_balanced_loss, lambda z, y, n, *rest: longtail.ClassBalancedLoss(n, *rest)(z, y)):
        with pytest.raises(ValueError, match=r"target has the input's shape.*class indices") as error:
            call(data["z"], data["y"], COUNTS, 0.9, "softmax_focal")
        assert "class_weight_by_target" not in str(error.value)
        assert "focal_gamma" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        *("cross_entropy", "linear", "linear_k", "parallel", "sigmoid", "balanced_focal", "zlpr"),
        *("hierarchical_linear", "hierarchical_parallel", "hierarchical_parallel_linear"),
    ],
)
def test_targets_of_other_integers(name: str) -> None:
    data = tensors()
    target = data["t"][:, None] if name == "linear_k" else data["t"]
    expected = FUNCTIONS[name][0](data, target=target)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert_same(FUNCTIONS[name][0](data, target=target.to(dtype)), expected)
    with pytest.raises(TypeError, match=r"target has dtype torch\.bool, expected an integer dtype"):
        FUNCTIONS[name][0](data, target=target.bool())
