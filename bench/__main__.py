"""``python -m bench``: compares, times, and writes CSV and pictures. See ``--help``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from longtail.experiments.command_line import Parser, positive_int

from . import gpu, plot, report, results, suite
from .measure import TOLERANCE, Mismatch

ON_CPU = (suite.CPU, suite.SIGMOID, suite.IMAGES, suite.OVERHEAD)
PLANS = {plan.section: (plan,) for plan in (*ON_CPU, suite.MEMORY)} | {"gpu": gpu.PLANS}
DEFAULT = (*ON_CPU, *gpu.PLANS)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}


def _shape(text: str) -> suite.Shape:
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split(",")]
    if len(sizes) not in (2, 4) or min(sizes) < 1 or sizes[1] < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,C or N,C,H,W with N, H, W >= 1 and C >= 2")
    return tuple(sizes)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bench", description="Times longtail against PyTorch, after comparing the results.")
    parser.add_argument(
        "section",
        nargs="?",
        choices=["all", *PLANS],
        default="all",
        help="default: cpu, sigmoid, images, overhead, and gpu if there is one",
    )
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
    parser.add_argument(
        "--output", type=results.csv_file, metavar="FILE", help="the CSV (default: cpu.csv or gpu.csv in bench/results)"
    )
    return parser


def chosen(arguments: argparse.Namespace) -> list[suite.Plan]:
    """The plans to run, with the command line's changes."""
    changes = {
        "dtypes": tuple(DTYPES[name] for name in arguments.dtype or ()),
        "rounds": arguments.rounds,
    }
    given = {name: value for name, value in changes.items() if value}
    plans = []
    for plan in DEFAULT if arguments.section == "all" else PLANS[arguments.section]:
        shapes = tuple(arguments.shape or plan.shapes)
        shapes = tuple(shape for shape in shapes if len(shape) == len(plan.shapes[0]))
        if shapes:
            compiled = plan.compiled and not arguments.no_compile
            plans.append(dataclasses.replace(plan, shapes=shapes, compiled=compiled, **given))
    return plans


def run(plan: suite.Plan, output: Path | None) -> list[results.Row]:
    """Runs a section; the rows of a problem are written as soon as it is done."""
    path = output or results.FOLDER / f"{plan.device if plan.device == 'cpu' else 'gpu'}.csv"
    found = []
    for rows in report.rows_with_progress(plan):
        results.write(path, rows)
        found += rows
    for written in (path, *plot.draw(path)):
        print(f"wrote {written}")
    return found


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.section == "all" and (arguments.shape or arguments.dtype or arguments.rounds):
        parser.error(f"--shape, --dtype and --rounds need a section: {', '.join(PLANS)}")
    rows: list[results.Row] = []
    plans = chosen(arguments)
    if not plans:
        parser.error(f"section {arguments.section} has no problems of that many dimensions")
    if not torch.cuda.is_available() and any(plan.device == "cuda" for plan in plans):
        print("gpu: no CUDA device")
        plans = [plan for plan in plans if plan.device != "cuda"]
    for plan in plans:
        try:
            rows += run(plan, arguments.output)
        except Mismatch as error:
            parser.exit(1, f"bench: nothing written for this problem: {error}\n")
    report.print_report(rows)


if __name__ == "__main__":
    main()
