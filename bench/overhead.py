"""Time of a call, by pytest-benchmark: ``python -m bench overhead --pytest-benchmark``.

``python -m bench overhead`` times the same calls interleaved and writes them to the CSV.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import contenders, measure, suite

PROBLEM = contenders.Problem.make(suite.SMALL, torch.float32, torch.device("cpu"))
CONTENDERS = contenders.of_loss("plain", PROBLEM, compiled=False)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: f"{c.name}-{c.gradient}".rstrip("-"))
def test_forward_and_backward(benchmark: Any, contender: contenders.Contender) -> None:
    ring = measure.Ring(PROBLEM.logits)
    measure.compare(PROBLEM, [CONTENDERS[0], contender], ring, tell=lambda _: None)
    logits = ring.take()

    def step() -> None:
        loss = contender.forward(logits)
        assert loss is not None
        torch.autograd.grad(loss, logits)

    rounds = suite.OVERHEAD.rounds
    benchmark.pedantic(step, setup=lambda: ring.restore(logits), rounds=rounds, warmup_rounds=rounds // 10)
