"""Promise: one all-gather of a few numbers per row in forward, nothing in backward; agreement once a configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import longtail

WORLD, ROWS, LOCAL = 8, 64, 100


class Traffic(TorchDispatchMode):
    """Records (collective, bytes that this rank sends to each other) of everything that happens inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace == "c10d":
            sent = args[0] if name.startswith("allreduce") else args[1]
            tensors = sent if isinstance(sent, list) else [sent]
            self.seen.append((name.strip("_"), sum(x.nbytes for x in tensors)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def agreements(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A fake group of 8 ranks that send nothing and agree to everything; what they were asked to agree on."""
    asked: list[Any] = []

    def agree(found: list[Any], proposal: Any, group: Any = None) -> None:
        assert group is not None
        asked.append(proposal)
        found[:] = [proposal] * len(found)

    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=WORLD)
    monkeypatch.setattr(dist, "all_gather_object", agree)
    yield asked
    dist.destroy_process_group()


# Numbers per row beside m, d and the reference logit.
MORE = {"plain": 0, "weight": 0, "focal": 0, "complement": 1, "smoothing": 1, "mixed": 2, "z_loss": 0}


@pytest.mark.parametrize("local_vectors", [False, True], ids=["full", "local"])
@pytest.mark.parametrize("option_set", MORE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=cases.name)
def test_traffic_of_cross_entropy(
    agreements: list[Any], dtype: torch.dtype, option_set: str, local_vectors: bool
) -> None:
    logits, target = cases.random_case(ROWS, LOCAL, dtype)
    target = torch.where(target == cases.IGNORE, target, target + LOCAL * (torch.arange(ROWS) % WORLD))
    classes = LOCAL if local_vectors else LOCAL * WORLD
    options = cases.options(option_set, classes, target, dtype)
    logits.requires_grad_()
    with Traffic() as traffic:
        loss = longtail.vocab_parallel_cross_entropy(logits, target, num_classes=LOCAL * WORLD, **options)
    numbers = 3 + MORE[option_set] + (local_vectors and "weight" in options)
    itemsize = 8 if dtype == torch.float64 else 4
    assert traffic.seen == [("allgather_base", (ROWS * numbers + 1) * itemsize)]
    with Traffic() as traffic:
        loss.backward()
    assert traffic.seen == []
    assert len(agreements) == 1


def test_agreement_once_a_configuration(agreements: list[Any]) -> None:
    logits = torch.randn(ROWS, LOCAL)
    target = torch.arange(ROWS)
    for gamma in (0.0, 2.0, 0.0, 2.0):
        longtail.vocab_parallel_cross_entropy(logits, target, num_classes=LOCAL * WORLD, focal_gamma=gamma)
    assert [dict(p.options)["focal_gamma"] for p in agreements] == [0.0, 2.0]
    longtail.vocab_parallel_cross_entropy(logits[:5], target[:5], num_classes=LOCAL * WORLD)
    assert len(agreements) == 3


def test_a_normalizer_may_change_with_every_step(agreements: list[Any]) -> None:
    logits, x, weight = torch.randn(ROWS, LOCAL), torch.randn(ROWS, 3), torch.randn(LOCAL, 3)
    target = torch.arange(ROWS)
    classes = LOCAL * WORLD
    for normalizer in (5, 6.0, torch.tensor(7)):
        longtail.vocab_parallel_cross_entropy(logits, target, num_classes=classes, normalizer=normalizer)
        longtail.vocab_parallel_linear_cross_entropy(x, weight, target, num_classes=classes, normalizer=normalizer)
    assert len(agreements) == 2
    longtail.vocab_parallel_cross_entropy(logits, target, num_classes=classes, normalizer="count")
    assert len(agreements) == 3


def test_the_bytes_do_not_depend_on_the_vocabulary(agreements: list[Any]) -> None:
    sent = []
    for local in (10, 5000):
        with Traffic() as traffic:
            logits = torch.randn(ROWS, local)
            longtail.vocab_parallel_cross_entropy(logits, torch.arange(ROWS), num_classes=local * WORLD)
        sent.append(traffic.seen)
    assert sent[0] == sent[1]
    assert math.isclose(sent[0][0][1], 12 * ROWS, abs_tol=4)
    assert len(agreements) == 2


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence"])
@pytest.mark.parametrize("gradient", ["auto", "backward"])
def test_traffic_of_the_linear_loss(agreements: list[Any], gradient: str, sequence_parallel: bool) -> None:
    """Per chunk one gather of statistics, and once over all chunks every row's gradient."""
    features, chunks = 20, 4
    mine = ROWS // WORLD if sequence_parallel else ROWS
    x = torch.randn(mine, features, requires_grad=True)
    weight = torch.randn(LOCAL, features, requires_grad=True)
    with Traffic() as forward:
        loss = longtail.vocab_parallel_linear_cross_entropy(
            x, weight, torch.arange(ROWS), gradient=gradient, chunk_size=ROWS // chunks,
            sequence_parallel=sequence_parallel, num_classes=LOCAL * WORLD,
        )  # fmt: skip
    with Traffic() as backward:
        loss.backward()
    row = 4 * features  # bytes
    statistics = ("allgather_base", (3 * ROWS // chunks + 1) * 4)
    inputs = [("allgather_base", mine // chunks * row)] if sequence_parallel else []
    reduced = ("reduce_scatter_base" if sequence_parallel else "allreduce", ROWS // chunks * row)
    if gradient == "auto":
        assert forward.seen == [*inputs, statistics, reduced] * chunks
        assert backward.seen == []
    else:
        assert forward.seen == [*inputs, statistics] * chunks
        assert backward.seen == [*inputs, reduced] * chunks
    assert len(agreements) == 1
