"""The GPU sections: their problems, and the fused losses of other projects where they are installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import suite
from .contenders import Contender, Problem
from .peers import usable
from .suite import Plan

# name, module, function, gradient mode, passes over the logits (counted from each project's source)
PEERS = (
    ("liger", "liger_kernel.transformers.functional", "liger_cross_entropy", "inplace", 3),
    ("quack", "quack.cross_entropy", "cross_entropy", "backward", 3),
)


def _bound(function: Callable[..., Any], target: Tensor) -> Callable[[Tensor], Tensor]:
    def forward(logits: Tensor) -> Tensor:
        loss: Tensor = function(logits, target, reduction="mean")
        return loss

    return forward


def peers(problem: Problem) -> list[Contender]:
    """Plain cross-entropy by Liger and QuACK; neither has the other losses."""
    found = []
    for name, module, function, gradient, passes in PEERS:
        # A few rows first.
        peer = usable(
            name,
            module,
            function,
            lambda f: _bound(f, problem.target[:8])(problem.logits[:8].clone().requires_grad_()),
        )
        if peer is not None:
            found.append(Contender("plain", name, _bound(peer, problem.target), gradient, passes))
    return found


GPU = Plan(
    section="gpu",
    device="cuda",
    shapes=((32768, 1000), (16384, 8192), (8192, 32768), (8192, 50257), (4096, 128256), (2048, 262144)),
    dtypes=(torch.bfloat16, torch.float32),
    losses=("plain", "focal", "complement", "family"),
    rounds=50,
    peers=peers,
)

STATISTICS = Plan(
    section="gpu-statistics",
    device="cuda",
    shapes=((8192, 151936),),
    dtypes=(torch.bfloat16,),
    losses=("plain", "statistics"),
    rounds=50,
)

TAIL = Plan(
    section="gpu-tail",
    device="cuda",
    shapes=((8192, 32768), (32768, 1000)),
    dtypes=GPU.dtypes,
    losses=suite.TAIL.losses,
    rounds=50,
)

SIGMOID = Plan(
    section="gpu-sigmoid",
    device="cuda",
    shapes=((4096, 8192), (32768, 1000)),
    dtypes=GPU.dtypes,
    losses=("sigmoid", "sigmoid_focal", "dense_focal"),
    rounds=50,
)

MULTI_LABEL = dataclasses.replace(
    suite.MULTI_LABEL, section="gpu-multi-label", device="cuda", dtypes=GPU.dtypes, rounds=50, budget=0.5
)

SOFT = Plan(
    section="gpu-soft",
    device="cuda",
    shapes=((16384, 8192), (32768, 1000), (4096, 128256)),
    dtypes=GPU.dtypes,
    losses=("soft",),
    rounds=50,
)

IMAGES = Plan(
    section="gpu-images",
    device="cuda",
    shapes=((4, 1203, 256, 256), (4, 19, 512, 512)),
    dtypes=GPU.dtypes,
    losses=("plain", "focal", "sigmoid_focal"),
    rounds=50,
)

PLANS = (GPU, STATISTICS, TAIL, SIGMOID, MULTI_LABEL, SOFT, IMAGES)
"""What ``python -m bench gpu`` runs."""
