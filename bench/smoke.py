"""All families of losses in every gradient mode on a GPU, compared with plain PyTorch on the CPU.

One shape for each way to take a row, or a pixel; few rows, so that compute-sanitizer, which slows kernels down a
hundredfold, can run it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import longtail
from longtail.experiments.command_line import Parser

from . import trees
from .suite import Shape

SHAPES: tuple[Shape, ...] = (
    (37, 10), (9, 1000), (5, 1001), (6, 5003), (3, 50257), (2, 300001),
    (3, 21, 40), (2, 21, 35), (1, 1203, 64), (1, 5000, 16),
)  # fmt: skip

LARGEST_TREE = 10000  # classes: a tree is made node by node, which takes a second for 100000

Case = tuple[Callable[..., Tensor], Tensor, dict[str, Any]]


def cases(shape: Shape, generator: torch.Generator) -> Iterator[Case]:
    """Losses with targets and options, few and many: softmax, sigmoid, two sides of a row; over rows trees."""
    classes = shape[1]
    target = torch.randint(classes, (shape[0], *shape[2:]), generator=generator)
    target.view(-1)[0] = -100
    vector = torch.rand(classes, generator=generator)
    softmax = {"weight": vector, "class_bias": vector, "label_smoothing": 0.1, "softcap": 20.0}
    sigmoid = {"weight": vector, "pos_weight": vector, "gamma": 1.5}
    yield longtail.cross_entropy, target, {"complement_gamma": -1.0}
    tail = {"class_scale": vector + 0.5, "target_scale": vector + 0.5, "class_mitigation": vector, "compensation": 0.5}
    yield longtail.cross_entropy, target, {"complement_gamma": -1.0, **softmax, **tail}
    yield longtail.cross_entropy, torch.rand(shape, generator=generator).softmax(1), softmax
    yield longtail.sigmoid_focal_loss, target, {"reduction": "mean"}
    yield longtail.sigmoid_focal_loss, target, {"reduction": "none", **sigmoid}
    yield longtail.sigmoid_focal_loss, torch.rand(shape, generator=generator), {"reduction": "none", **sigmoid}
    hot = (torch.rand(shape, generator=generator) < 0.2).float()
    hot[0] = 0.0  # no labels
    yield longtail.asymmetric_loss, hot, {"gamma_positive": vector, "label_smoothing": 0.1}
    yield longtail.asymmetric_loss, target, {"reduction": "none", "detach": False}
    counts = {"samples_per_class": 1 + (500 * vector).long(), "num_samples": 1000}
    yield longtail.distribution_balanced_loss, hot, counts
    yield longtail.distribution_balanced_loss, target, {"gamma": vector, "reduction": "rows", **counts}
    yield longtail.two_way_loss, target, {"class_bias": vector}
    yield longtail.zlpr_loss, torch.rand(shape, generator=generator).round(), {}
    if len(shape) == 2 and classes <= LARGEST_TREE:  # of images the same kernels take a copy
        tree = trees.of_classes(classes, torch.device("cpu"), shuffled=True)
        weights = {"weight": vector, "class_bias": vector}
        yield longtail.hierarchical_cross_entropy, target, {"hierarchy": tree.hierarchy, **weights}


def compare(shape: Shape, device: torch.device) -> None:
    """Raises AssertionError where a gradient on ``device`` is not that of the CPU."""
    generator = torch.Generator().manual_seed(shape[1])
    wide = torch.randn(shape, generator=generator)
    for loss, target, options in cases(shape, generator):
        there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        for dtype in (torch.float32, torch.bfloat16):
            with longtail.use_backend("reference"):  # whichever is forced on the GPU
                expected = _gradient(loss, wide.to(dtype), target, "backward", options)
            soft = loss is longtail.cross_entropy and target.is_floating_point()
            for mode in ("backward",) if soft else ("backward", "forward", "inplace"):
                actual = _gradient(loss, wide.to(device, dtype), target.to(device), mode, there)
                torch.testing.assert_close(actual.cpu().float(), expected.float(), rtol=2e-2, atol=1e-5)


def _gradient(
    loss: Callable[..., Tensor], logits: Tensor, target: Tensor, mode: str, options: dict[str, Any]
) -> Tensor:
    x = logits.clone().requires_grad_()
    (loss(x * 1.0, target, gradient=mode, **options).sum() * 1.7).backward()
    assert x.grad is not None
    return x.grad


def _shape(text: str) -> Shape:
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split(",")]
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,C or N,C,P with sizes of at least 1")
    return tuple(sizes)


def add_options(parser: Parser) -> None:
    parser.add_argument("--shape", type=_shape, nargs="+", default=SHAPES, metavar="N,C[,P]", help="instead of all")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda", help="whose kernels (default: %(default)s)"
    )


def run(arguments: argparse.Namespace, parser: Parser) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, f"{parser.prog}: no CUDA device\n")
    wrong = []
    for shape in arguments.shape:
        try:
            compare(shape, torch.device(arguments.device))
            print(f"{list(shape)}: as on the CPU", flush=True)
        except (AssertionError, RuntimeError) as error:
            wrong.append(shape)
            print(f"{list(shape)}: {error}", flush=True)
    if wrong:
        parser.exit(1, f"{parser.prog}: {len(wrong)} of {len(arguments.shape)} shapes are not as on the CPU\n")
    print(f"{len(arguments.shape)} shapes as on the CPU")
