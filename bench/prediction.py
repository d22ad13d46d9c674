"""On paper: the time of vocabulary-parallel cross-entropy at 8 to 512 ranks.

A prediction, not a measurement: ``passes * N * V / P * itemsize / sweep + collective``. The sweep is the bandwidth of
the local passes as measured (row "local sweeps alone" of bench/results/parallel.csv, a CPU core), or ``--sweep`` GB/s.
The collective is an all-gather as a ring: P - 1 steps, each a latency and one rank's statistics over the link, at the
link's published speed, which no real collective reaches. Beside it: what an all-gather of the logits would take.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from longtail.experiments.command_line import Parser

from . import results
from .parallel import OUTPUT

RANKS = (8, 16, 32, 64, 128, 256, 512)
VOCABULARIES = (1 << 18, 1 << 20, 1 << 22, 1 << 24)
PASSES = 3


class Link(NamedTuple):
    """One rank's link, in one direction, at its published speed."""

    name: str
    GB_per_s: float
    latency_us: float  # of a step of the ring: an assumption
    source: str


LINKS = (
    Link("NVLink 4", 450.0, 2.0, "NVIDIA H100 data sheet: 900 GB/s per GPU, both directions together"),
    Link("InfiniBand NDR", 50.0, 5.0, "NVIDIA DGX H100 user guide: one 400 Gb/s ConnectX-7 port per GPU"),
    Link("Ethernet 25G", 3.125, 20.0, "IEEE 802.3by: 25 Gb/s per port"),
)


class Prediction(NamedTuple):
    """Milliseconds of forward + backward."""

    ranks: int
    classes: int
    sweep_ms: float
    gather_ms: float
    logits_ms: float
    """The all-gather of the logits alone, without any work on them."""

    @property
    def total_ms(self) -> float:
        return self.sweep_ms + self.gather_ms


def predict(
    ranks: int, classes: int, rows: int, itemsize: int, numbers: int, sweep_GB_per_s: float, link: Link
) -> Prediction:
    """``numbers``: float32 statistics of a row."""
    local = rows * classes / ranks * itemsize
    latency = (ranks - 1) * link.latency_us / 1e3

    def ring_ms(nbytes: float) -> float:
        return latency + (ranks - 1) * nbytes / link.GB_per_s / 1e6

    return Prediction(
        ranks, classes, PASSES * local / sweep_GB_per_s / 1e6, ring_ms(4 * numbers * rows), ring_ms(local)
    )


def table(rows: int, itemsize: int, numbers: int, sweep: float, link: Link) -> Iterator[Prediction]:
    for classes in VOCABULARIES:
        for ranks in RANKS:
            yield predict(ranks, classes, rows, itemsize, numbers, sweep, link)


def measured_sweep() -> float | None:
    """GB/s of the widest "local sweeps alone" in parallel.csv, or None."""
    rows = [row for row in results.read(OUTPUT) if row["contender"] == "local sweeps alone"]
    return float(max(rows, key=lambda row: int(row["C"]))["local_GB_per_s"]) if rows else None


def add_options(parser: Parser) -> None:
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--itemsize", type=int, default=2, help="bytes of a logit")
    parser.add_argument("--numbers", type=int, default=3, help="statistics of a row that travel")
    parser.add_argument("--sweep", type=float, help="GB/s of the local passes (default: as measured)")


def run(chosen: argparse.Namespace, parser: Parser) -> None:
    sweep = chosen.sweep or measured_sweep()
    if sweep is None:
        parser.exit(1, f"{parser.prog}: no measured sweep in {OUTPUT}: run python -m bench parallel, or pass --sweep\n")
    origin = "given" if chosen.sweep else "measured, bench/results/parallel.csv"
    print(
        f"PREDICTION, not a measurement. {chosen.rows} rows, {chosen.itemsize} bytes a logit, {chosen.numbers} numbers"
    )
    print(f"a row on the wire, local passes at {sweep:.4g} GB/s ({origin}). Milliseconds, forward + backward.")
    for link in LINKS:
        print(
            f"\n{link.name}: {link.GB_per_s:g} GB/s a direction ({link.source}); "
            f"{link.latency_us:g} us a step (assumed)"
        )
        print(f"{'V':>9}{'ranks':>7}{'sweeps':>12}{'statistics':>12}{'total':>12}{'gather of logits':>18}")
        for p in table(chosen.rows, chosen.itemsize, chosen.numbers, sweep, link):
            cells = f"{p.sweep_ms:12.3f}{p.gather_ms:12.3f}{p.total_ms:12.3f}{p.logits_ms:18.3f}"
            print(f"{p.classes:9}{p.ranks:7}{cells}")
