"""Promise: the benchmark of vocabulary parallelism compares before it times; the prediction says that it is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from longtail.parallel.handshake import HEADER

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _bench_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_a_tiny_run_writes_rows(tmp_path: Path) -> None:
    parallel = pytest.importorskip("bench.parallel")
    from bench import results

    output = tmp_path / "parallel.csv"
    parallel.measure((32, 256), 2, torch.float32, 1, output)
    rows = {(row["loss"], row["contender"], row["gradient"]): row for row in results.read(output)}
    ours = rows["plain", "longtail", "backward"]
    assert len(rows) == 7
    assert list(ours) == results.columns_of(parallel.Row)
    assert ours["passes"] == "3"
    assert ours["collectives"] == "1"
    payload = 12 * 32 + 4  # m, d and a logit; one sum of all rows
    assert float(ours["wire_bytes_per_row"]) == pytest.approx((HEADER + payload + 12) / 32)  # in whole 16 bytes
    assert rows["plain", "loss_parallel", ""]["collectives"] == "3"
    assert float(rows["plain", "all-gather of the logits", ""]["wire_bytes_per_row"]) == 4 * 128
    assert rows["", "local sweeps alone", ""]["wire_bytes_per_row"] == "0"
    assert float(ours["speedup_over_loss_parallel"]) > 0
    assert ours["commit"]


def test_a_prediction_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    prediction = pytest.importorskip("bench.prediction")
    from bench import __main__ as bench

    bench.main(["prediction", "--sweep", "1000"])
    text = capsys.readouterr().out
    assert text.startswith("PREDICTION, not a measurement")
    assert all(link.source in text for link in prediction.LINKS)
    one = prediction.predict(8, 1 << 20, 1000, 2, 3, 1000.0, prediction.Link("x", 10.0, 0.0, ""))
    assert one.sweep_ms == pytest.approx(3 * 1000 * 2**20 / 8 * 2 / 1e12 * 1e3)
    assert one.gather_ms == pytest.approx(7 * 12 * 1000 / 10e9 * 1e3)
    assert one.logits_ms == pytest.approx(7 * 1000 * 2**20 / 8 * 2 / 10e9 * 1e3)
    assert "bench" in sys.modules
