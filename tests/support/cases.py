"""Standing cases shared by tests: logits, targets, options, layouts, upstream gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from longtail.options import softmax_options

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MODES = ("backward", "forward", "inplace")
MARGINS = (0.0, 17.0, 20.0, 50.0, 100.0, 1e4)
GAMMAS = (0.0, 0.5, 1.0, 1.5, 2.0, 5.0)
# C -> N: the awkward sizes (1, 2, 3, one short of a SIMD multiple, real vocabularies), N small for large C.
SIZES = {1: 7, 2: 9, 3: 8, 127: 6, 1000: 5, 32000: 3, 50257: 2, 128256: 2}
IGNORE = -100

Options = dict[str, Any]


def name(dtype: torch.dtype) -> str:
    """'float32' of torch.float32: readable test ids."""
    return str(dtype).removeprefix("torch.")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype losses, statistics and class vectors have for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_case(
    rows: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    ignore: bool = True,
    spread: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """Normal logits [rows, classes], targets [rows]; with `ignore` about one row in five is ignored."""
    g = generator(seed)
    logits = (torch.randn(rows, classes, generator=g, dtype=torch.float64) * spread).to(dtype)
    target = torch.randint(classes, (rows,), generator=g)
    if ignore and rows > 1:
        target[1 + 5 * torch.arange((rows + 3) // 5)] = IGNORE
    return logits, target


def margin_case(
    margin: float, classes: int, dtype: torch.dtype = torch.float32, rows: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Rows whose target leads (even rows) or trails (odd rows) the best other class by `margin` nats."""
    logits, target = random_case(rows, classes, torch.float64, seed, ignore=False, spread=0.5)
    sign = 1.0 - 2.0 * (torch.arange(rows) % 2)
    row = torch.arange(rows)
    others = logits.clone()
    others[row, target] = -torch.inf
    best = others.amax(1) if classes > 1 else torch.zeros(rows, dtype=torch.float64)
    logits[row, target] = best + sign * margin
    # In half of the rows it is the other classes that are far from zero, and so may be the row's maximum.
    shift = torch.where(row % 4 >= 2, -sign * margin, torch.zeros(rows))
    return (logits + shift[:, None]).to(dtype), target


def poison_ignored(logits: Tensor, target: Tensor) -> Tensor:
    """Ignored rows of [N, C] logits filled with NaN, +inf and -inf in turn: nothing may read them."""
    logits = logits.clone()
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=logits.dtype)
    rows = (target == IGNORE).nonzero().flatten()
    logits[rows] = bad[torch.arange(len(rows)) % 3][:, None]
    return logits


def _uniform(low: float, high: float) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, g: low + (high - low) * torch.rand(n, generator=g, dtype=torch.float64)


def _normal(scale: float) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, g: scale * torch.randn(n, generator=g, dtype=torch.float64)


_CLASS_VECTORS = {
    "weight": _uniform(0.2, 2.0),
    "class_bias": _normal(1.0),
    "class_margin": _uniform(0.0, 1.0),
    "class_scale": _uniform(0.4, 1.2),
    "target_scale": _uniform(0.3, 1.5),
    "class_mitigation": _normal(1.0),
}

OPTION_SETS: dict[str, tuple[str | tuple[str, float], ...]] = {
    "plain": (),
    "weight": ("weight",),
    "smoothing": (("label_smoothing", 0.1),),
    "smoothing_weight": (("label_smoothing", 0.3), "weight"),
    "focal_half": (("focal_gamma", 0.5),),
    "focal": (("focal_gamma", 2.0),),
    "complement": (("complement_gamma", -1.0),),
    "complement_up": (("complement_gamma", 2.5), "weight"),
    "class_bias": ("class_bias",),
    "class_margin": ("class_margin",),
    "scale": (("scale", 1.7),),
    "softcap": (("softcap", 5.0),),
    "z_loss": (("z_loss", 0.01),),
    "sample_weight": ("sample_weight",),
    "vector_scaling": ("class_scale", "class_bias"),
    "target_scale": ("target_scale",),
    "mitigation": ("class_mitigation",),
    "seesaw": ("class_mitigation", ("compensation", 2.0)),
    "mixed": (
        "weight", "class_bias", "class_margin", "sample_weight", ("label_smoothing", 0.1),
        ("focal_gamma", 1.5), ("complement_gamma", -1.0), ("scale", 1.3), ("softcap", 8.0), ("z_loss", 0.02),
    ),
    "mixed_tail": (
        "weight", "class_bias", "class_margin", "sample_weight", "class_scale", "target_scale", "class_mitigation",
        ("compensation", 0.6), ("label_smoothing", 0.1), ("focal_gamma", 1.5), ("complement_gamma", -1.0),
        ("scale", 1.3), ("softcap", 8.0), ("z_loss", 0.02),
    ),
    "tail_linear": (
        "class_bias", "class_margin", "class_scale", "target_scale", "class_mitigation", ("compensation", 1.2),
        ("complement_gamma", 1.5), ("scale", 0.7),
    ),
    "mixed_linear": (
        "weight", "class_bias", "class_margin", "sample_weight", ("label_smoothing", 0.2),
        ("focal_gamma", 0.5), ("complement_gamma", 1.5), ("scale", 0.7),
    ),
}  # fmt: skip

# Those whose gradient is the derivative of their value: compensation counts as a constant.
DERIVED_SETS = [
    name
    for name, entries in OPTION_SETS.items()
    if "compensation" not in dict(e for e in entries if not isinstance(e, str))
]

# Of class probabilities: what needs no target class.
PROBABILITY_SETS: dict[str, tuple[Any, ...]] = {
    **{name: OPTION_SETS[name] for name in ("plain", "weight", "smoothing", "smoothing_weight", "class_bias", "scale",
                                            "softcap", "z_loss", "sample_weight", "vector_scaling")},
    "all_of_probabilities": ("weight", "class_bias", "class_scale", "sample_weight", ("label_smoothing", 0.1),
                             ("scale", 1.3), ("softcap", 8.0), ("z_loss", 0.02)),
    "linear_of_probabilities": ("weight", "class_bias", "sample_weight", ("label_smoothing", 0.2), ("scale", 0.7)),
}  # fmt: skip


def probabilities(rows: int, classes: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[N, C]: spread, one-hot with exact zeros, none at all, and one row that does not sum to 1."""
    y = (torch.randn(rows, classes, generator=generator(2000 + seed), dtype=torch.float64) * 2).softmax(1)
    y[1::4] = 0.0
    y[torch.arange(1, rows, 4), torch.arange(1, rows, 4) * 7 % max(classes, 1)] = 1.0
    y[2::8] *= 1.7
    y[6::8] = 0.0
    return y.to(dtype)


def options(name: str, classes: int, target: Tensor, dtype: torch.dtype = torch.float32, seed: int = 0) -> Options:
    """Keyword arguments of `longtail.cross_entropy`; class vectors and weights in `vector_dtype(dtype)`."""
    g = generator(1000 + seed)
    result: Options = {}
    for entry in OPTION_SETS.get(name) or PROBABILITY_SETS[name]:
        if not isinstance(entry, str):
            result[entry[0]] = entry[1]
        elif entry == "sample_weight":
            values = torch.rand(target.numel(), generator=g, dtype=torch.float64) * 2
            result[entry] = values.reshape(target.shape).to(vector_dtype(dtype))
        else:
            result[entry] = _CLASS_VECTORS[entry](classes, g).to(vector_dtype(dtype))
    return result


def to_float64(opts: Options) -> Options:
    """The same options with every tensor in float64: the truth's arguments."""
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in opts.items()}


def operator_options(
    classes: int, opts: Options, ignore_index: int = IGNORE, cross_entropy_coefficient: float = 1.0
) -> tuple[Any, ...]:
    """The operators' trailing arguments, in schema order, for the same options; "entropy" may be one of them."""
    fixed = {"ignore_index": ignore_index, "cross_entropy_coefficient": cross_entropy_coefficient}
    return tuple(
        softmax_options(**{"entropy": True, **opts, **fixed, "softcap": opts.get("softcap") or 0.0}).for_classes(
            classes
        )
    )


def scalings(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """(name, gradient [N, C] or [N, C, P], factor, target, product): ignored rows meet whatever is not finite."""
    rows = shape[0] * (shape[2] if len(shape) == 3 else 1)
    at = torch.arange(rows)
    target = torch.where(at % 2 == 0, IGNORE, 0)
    factors = {str(x): torch.tensor(x, dtype=vector_dtype(dtype)).expand(rows) for x in (torch.inf, torch.nan, -2.0)}
    factors["each"] = torch.tensor([torch.inf, 1.0, torch.nan, torch.nan, 1.0, -torch.inf, -0.5, 3.0],
                                   dtype=vector_dtype(dtype))[at * 5 % 8]  # fmt: skip
    for name, factor in factors.items():
        grad = torch.randn(shape, generator=generator(5)).to(dtype)
        of_row = (rows, 1) if len(shape) == 2 else (shape[0], 1, shape[2])
        product = (grad.to(factor.dtype) * factor.reshape(of_row)).to(dtype)
        expected = torch.where((target == IGNORE).reshape(of_row), grad, product)
        for stride in (1, 2):
            yield f"{name} {stride}", grad.clone(), factor, target.repeat_interleave(stride)[::stride], expected


def _row_stride(x: Tensor) -> Tensor:
    wide = torch.full((x.shape[0], x.shape[1] + 5), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def _offset(x: Tensor) -> Tensor:
    """Starts one element into its storage, so no row is aligned."""
    flat = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype, device=x.device)
    flat[1:] = x.reshape(-1)
    return flat[1:].view(x.shape)


# name -> the same [N, C] values laid out otherwise
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "row_stride": _row_stride,
    "offset": _offset,
    "transposed": lambda x: x.t().contiguous().t(),
    "every_other": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}

# name -> shape of the logits with 5 classes in dimension 1 (0 for a single row)
SHAPES = {"c": (5,), "nc": (6, 5), "ncd": (3, 5, 4), "ncdd": (2, 5, 3, 2), "ncddd": (2, 5, 2, 1, 3)}


def upstreams(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Upstream gradients: random per row, one scalar expanded (stride 0), non-contiguous; never ones."""
    g = generator(7000 + seed)
    values = torch.randn(tuple(shape), generator=g, dtype=torch.float64)
    scalar = torch.tensor(-0.37, dtype=dtype)
    doubled = torch.stack([values, torch.full_like(values, torch.nan)], -1).to(dtype)
    return {"random": values.to(dtype), "stride0": scalar.expand(tuple(shape)), "strided": doubled[..., 0]}
