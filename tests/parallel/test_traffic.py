"""Promise: one all-gather of a few numbers per row in forward, of a header too, and nothing in backward."""

from __future__ import annotations

import pytest
import torch

import cases
import rank_cases_traffic
from longtail.parallel.handshake import CALLS, HEADER
from rank_cases_traffic import CHUNKS, FEATURES, ROWS
from ranks import Ranks

WORLD = 4
# Numbers per row beside m, d and the reference logit.
MORE = {"plain": 0, "weight": 0, "focal": 0, "complement": 1, "smoothing": 1, "mixed": 2, "z_loss": 0}


def message(payload: int) -> int:
    """Bytes of an all-gather with a header."""
    return HEADER + -(-payload // 16) * 16


@pytest.mark.parametrize("local_vectors", [False, True], ids=["full", "local"])
@pytest.mark.parametrize("option_set", MORE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=cases.name)
def test_traffic_of_cross_entropy(ranks: Ranks, dtype: torch.dtype, option_set: str, local_vectors: bool) -> None:
    numbers = 3 + MORE[option_set] + (local_vectors and option_set in ("weight", "mixed"))
    payload = (ROWS * numbers + 1) * (8 if dtype == torch.float64 else 4)
    first = [("allgather_base", HEADER), ("allgather_base", payload)]
    for seen in ranks.run(WORLD, rank_cases_traffic.of_cross_entropy, option_set, dtype, local_vectors):
        assert seen == [(first, []), ([("allgather_base", message(payload))], [])]


# Whether a target's terms travel ahead, and how many scales with the statistics; of vectors of all classes, and own.
TAIL = {
    "vector_scaling": ((False, 0), (False, 1)),
    "target_scale": ((False, 0), (True, 1)),
    "mitigation": ((False, 0), (True, 0)),
    "seesaw": ((True, 0), (True, 0)),
}


@pytest.mark.parametrize("local_vectors", [False, True], ids=["full", "local"])
@pytest.mark.parametrize("option_set", TAIL)
def test_traffic_of_what_the_target_brings(ranks: Ranks, option_set: str, local_vectors: bool) -> None:
    ahead, scales = TAIL[option_set][local_vectors]
    terms, statistics = ROWS * 3 * 4, (ROWS * 3 + scales + 1) * 4
    compared, *rest = [terms, statistics] if ahead else [statistics]
    rest = [("allgather_base", payload) for payload in rest]
    first = [("allgather_base", HEADER), ("allgather_base", compared), *rest]
    for seen in ranks.run(WORLD, rank_cases_traffic.of_cross_entropy, option_set, torch.float32, local_vectors):
        assert seen == [(first, []), ([("allgather_base", message(compared)), *rest], [])]


@pytest.mark.parametrize("local_weight", [False, True], ids=["full", "local"])
@pytest.mark.parametrize("depth", [1, 4, 9])
def test_traffic_of_hierarchical_cross_entropy(ranks: Ranks, depth: int, local_weight: bool) -> None:
    """The maximum and the sum of each ring, the target's logit, and its weight where it is a rank's own."""
    for dtype, size in ((torch.float64, 8), (torch.bfloat16, 4)):
        payload = ROWS * (2 * depth + 1 + local_weight) * size
        first = [("allgather_base", HEADER), ("allgather_base", payload)]
        for seen in ranks.run(WORLD, rank_cases_traffic.of_hierarchical_cross_entropy, depth, dtype, local_weight):
            assert seen == [(first, []), ([("allgather_base", message(payload))], [])]


def test_traffic_of_row_statistics(ranks: Ranks) -> None:
    payload = (ROWS * 4 + 1) * 4
    first = [("allgather_base", HEADER), ("allgather_base", payload)]
    for seen in ranks.run(WORLD, rank_cases_traffic.of_row_statistics):
        assert seen == [(first, []), ([("allgather_base", message(payload))], [])]


def test_a_message_has_room_for_those_of_the_last_calls(ranks: Ranks) -> None:
    """So that losses of several lengths that take turns make one all-gather each; a long one is forgotten in time."""
    rows = [5, 50, 5, 40, 60, *[5] * (CALLS + 1)]
    lengths = [(3 * n + 1) * 4 for n in rows]
    room, expected = [HEADER], []
    for length in lengths:
        sizes = [max(room[-CALLS:])]
        if HEADER + length > sizes[0]:
            sizes.append(length)
        expected.append([("allgather_base", size) for size in sizes])
        room.append(message(length))
    assert len(expected[2]) == len(expected[3]) == 1 < len(expected[4])
    assert expected[-1] == [("allgather_base", message(lengths[-1]))] != expected[-2]
    for seen in ranks.run(WORLD, rank_cases_traffic.of_several_lengths, rows):
        assert seen == expected


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence"])
@pytest.mark.parametrize("gradient", ["auto", "backward"])
@pytest.mark.parametrize("depth", [None, 4], ids=["softmax", "hierarchical"])
def test_traffic_of_the_linear_loss(ranks: Ranks, depth: int | None, gradient: str, sequence_parallel: bool) -> None:
    """Per chunk one gather of statistics, and once over all chunks every row's gradient."""
    row, mine = 4 * FEATURES, ROWS // WORLD if sequence_parallel else ROWS  # bytes, rows
    numbers = 3 * ROWS // CHUNKS + 1 if depth is None else (2 * depth + 2) * ROWS // CHUNKS
    statistics = ("allgather_base", numbers * 4)
    inputs = [("allgather_base", mine // CHUNKS * row)] if sequence_parallel else []
    reduced = ("reduce_scatter_base" if sequence_parallel else "allreduce", ROWS // CHUNKS * row)
    for seen in ranks.run(WORLD, rank_cases_traffic.of_the_linear_loss, gradient, sequence_parallel, depth):
        forward, backward = seen[1]
        compared = ("allgather_base", message([*inputs, statistics][0][1]))
        if gradient == "auto":
            assert forward == [
                compared,
                *[*inputs, statistics, reduced][1:],
                *[*inputs, statistics, reduced] * (CHUNKS - 1),
            ]
            assert backward == []
        else:
            assert forward == [compared, *[*inputs, statistics][1:], *[*inputs, statistics] * (CHUNKS - 1)]
            assert backward == [("allgather_base", 8), *[*inputs, reduced] * CHUNKS]  # first, whose backward it is
