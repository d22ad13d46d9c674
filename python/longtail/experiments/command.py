"""``python -m longtail experiment``: the options, and what runs with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..command_line import Parser, imbalance_factor, positive_int, writable_folder
from .output import missing_packages


def add_command(commands: Any) -> None:
    """Adds ``experiment`` to the commands of a parser."""
    experiment = commands.add_parser("experiment", help="evidence on real data: trains, compares, writes CSV and PNG")
    names = experiment.add_subparsers(dest="experiment", required=True, metavar="{digits}")
    _add_digits(names)


def _common(names: Any, name: str, help: str) -> Parser:
    parser: Parser = names.add_parser(name, help=help, description=help)
    parser.add_argument(
        *("--output", "-o"),
        type=writable_folder,
        default=Path(),
        metavar="FOLDER",
        help=f"where experiment_{name}.csv and .png are written (default: the current folder)",
    )
    return parser


def _add_digits(names: Any) -> None:
    parser = _common(names, "digits", "every method on long-tailed handwritten digits, tested against cross-entropy")
    parser.add_argument(
        "--imbalance-factor", type=imbalance_factor, nargs="+", metavar="R", help="default: 10 20 50 (quick: 50)"
    )
    parser.add_argument("--seeds", type=positive_int, metavar="N", help="default: 10 (quick: 2)")
    parser.add_argument("--epochs", type=positive_int, metavar="N", help="default: 50 (quick: 2)")
    parser.add_argument("--jobs", type=positive_int, default=2, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small run that shows that everything works")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Runs an experiment, prints its report and writes its files."""
    prog = f"longtail experiment {arguments.experiment}"
    missing = missing_packages()
    if missing:
        parser.exit(1, f"{prog}: needs {', '.join(missing)}: pip install longtail[experiments]\n")
    try:
        RUNNERS[arguments.experiment](arguments)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{prog}: error: {error}\n")


def _run_digits(arguments: argparse.Namespace) -> None:
    from . import digits, digits_report
    from .output import progress_bar

    plan = digits.Plan(**_chosen(arguments, ("seeds", "epochs", "jobs"), {"seeds": 2, "epochs": 2}))
    factors = tuple(dict.fromkeys(arguments.imbalance_factor or ((50.0,) if arguments.quick else ())))
    if factors:
        plan = plan._replace(imbalance_factors=factors)
    digits.check(plan)
    with progress_bar(len(plan.tasks())) as advance:
        rows = digits.summarize(plan, digits.run(plan, advance))
    _finish(arguments, rows, digits_report)


def _chosen(arguments: argparse.Namespace, names: tuple[str, ...], quick: dict[str, int]) -> dict[str, Any]:
    """The options that were given, and under ``--quick`` the small values of the others."""
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return {**quick, **given} if arguments.quick else given


def _finish(arguments: argparse.Namespace, rows: Any, report: Any) -> None:
    """Writes the rows first: a table that fails to print takes no result with it."""
    from .output import write_csv

    csv_path = arguments.output / f"experiment_{arguments.experiment}.csv"
    write_csv(csv_path, rows)
    report.print_report(rows)
    report.draw(rows, csv_path.with_suffix(".png"))
    print(f"wrote {csv_path} and {csv_path.with_suffix('.png')}")


RUNNERS: dict[str, Callable[[argparse.Namespace], None]] = {"digits": _run_digits}
