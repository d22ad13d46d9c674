"""The sections that time losses over logits and images.

Loss and gradient of every contender are compared with eager PyTorch before anything is timed.

Contenders are timed in one process, in a new order every round; medians. Rows are added to the CSV as soon as a problem
is done, and pictures are drawn from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import torch

from longtail.experiments.command_line import Parser, positive_int

from . import gpu, plot, report, results, suite
from .measure import TOLERANCE, Mismatch

ON_CPU = (
    *(suite.CPU, suite.SOFT, suite.STATISTICS, suite.TAIL, suite.SIGMOID, suite.MULTI_LABEL, suite.IMAGES),
    *(suite.THREADS, suite.PAGES, suite.OVERHEAD, suite.MEMORY),
)
PLANS = {plan.section: (plan,) for plan in ON_CPU} | {"few": (suite.FEW_ROWS, suite.FEW_IMAGES), "gpu": gpu.PLANS}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}


def _shape(text: str) -> suite.Shape:
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split(",")]
    if len(sizes) not in (2, 4) or min(sizes) < 1 or sizes[1] < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,C or N,C,H,W with N, H, W >= 1 and C >= 2")
    return tuple(sizes)


def add_options(parser: Parser) -> None:
    parser.add_argument(
        "--shape",
        type=_shape,
        nargs="+",
        action="extend",
        metavar="N,C[,H,W]",
        help="instead of the section's shapes of that kind",
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", action="extend", help="instead of the section's dtypes")
    parser.add_argument("--rounds", type=positive_int, help="at most so many; slow contenders have fewer, at least 3")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-pictures", action="store_true", help="write the CSV alone")
    parser.add_argument(
        "--output", type=results.csv_file, metavar="FILE", help="the CSV (default: cpu.csv or gpu.csv in bench/results)"
    )
    if parser.get_default("section") == suite.OVERHEAD.section:
        parser.add_argument(
            "--pytest-benchmark",
            action="store_true",
            help="one contender after another, by pytest-benchmark: prints its table and writes no rows",
        )


def chosen(arguments: argparse.Namespace) -> list[suite.Plan]:
    """The plans to run, with the command line's changes."""
    changes = {
        "dtypes": tuple(DTYPES[name] for name in arguments.dtype or ()),
        "rounds": arguments.rounds,
    }
    given = {name: value for name, value in changes.items() if value}
    plans = []
    for plan in PLANS[arguments.section]:
        shapes = tuple(arguments.shape or plan.shapes)
        shapes = tuple(shape for shape in shapes if len(shape) == len(plan.shapes[0]))
        if shapes:
            compiled = plan.compiled and not arguments.no_compile
            plans.append(dataclasses.replace(plan, shapes=shapes, compiled=compiled, **given))
    return plans


def output_of(plan: suite.Plan) -> Path:
    """The CSV, unless another is named."""
    return results.FOLDER / f"{plan.device if plan.device == 'cpu' else 'gpu'}.csv"


def run_plan(plan: suite.Plan, output: Path | None, pictures: bool) -> list[results.Row]:
    """Runs a plan; the rows of a problem are written as soon as it is done."""
    path = output or output_of(plan)
    found = []
    for rows in report.rows_with_progress(plan):
        results.write(path, rows)
        found += rows
    for written in (path, *(plot.draw(path) if pictures else ())):
        print(f"wrote {written}")
    return found


def run(arguments: argparse.Namespace, parser: Parser) -> None:
    if vars(arguments).get("pytest_benchmark"):
        calls = Path(__file__).with_name("overhead.py")
        parser.exit(subprocess.run((sys.executable, "-m", "pytest", str(calls), "--benchmark-enable")).returncode)
    rows: list[results.Row] = []
    plans = chosen(arguments)
    if not plans:
        parser.error(f"section {arguments.section} has no problems of that many dimensions")
    if arguments.section == "gpu" and not torch.cuda.is_available():
        print("gpu: no CUDA device")
        return
    for plan in plans:
        try:
            rows += run_plan(plan, arguments.output, not arguments.no_pictures)
        except Mismatch as error:
            parser.exit(1, f"{parser.prog}: nothing written for this problem: {error}\n")
    report.print_report(rows)
