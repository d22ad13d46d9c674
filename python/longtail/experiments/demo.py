"""``longtail demo``: its options, and what becomes of a run on either of the data."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch

from ..files import make_folder
from ..ops import backends, dispatch
from . import demo_digits, demo_digits_report, demo_icd, demo_icd_report
from .command import IMBALANCE_FACTOR
from .command_line import imbalance_factor, png, positive_int
from .output import require_packages


class Kind(NamedTuple):
    """One of the data: what loads and runs, what reports, and the extras that they need."""

    module: Any
    report: Any
    extras: tuple[str, ...]


KINDS = {
    "icd": Kind(demo_icd, demo_icd_report, ("demo", "icd")),
    "digits": Kind(demo_digits, demo_digits_report, ("demo",)),
}
"""The usual one first."""


def add_command(commands: Any) -> None:
    """Adds ``demo`` to the commands of a parser."""
    text = "train a small model on long-tailed data with several losses, and compare them"
    trial = commands.add_parser(
        *("demo",),
        help=text,
        description=text,
        epilog="Ctrl-C: the table of the seeds that every loss has finished is printed; no picture is drawn.",
    )
    trial.add_argument(
        *("--data", "-d"),
        choices=list(KINDS),
        default=next(iter(KINDS)),
        help="what to train on: icd, descriptions of diagnoses (ICD-10-CM) in 1,918 categories, most of them rare; "
        "digits, images of ten classes (default: %(default)s)",
    )
    names = {kind: list(KINDS[kind].module.LOSSES) for kind in KINDS}
    of_each = "; ".join(f"with {kind} {', '.join(losses)}" for kind, losses in names.items())
    trial.add_argument(
        *("--loss", "-l"),
        nargs="+",
        action="extend",
        choices=list(dict.fromkeys(name for losses in names.values() for name in losses)),
        metavar="NAME",
        help=f"losses to compare, one or more: {of_each} (default: all)",
    )
    text = f"{IMBALANCE_FACTOR}; of digits alone ({_defaults('imbalance_factor')})"
    trial.add_argument("--imbalance-factor", type=imbalance_factor, metavar="R", help=text)
    text = f"times that each loss is trained, on other data and weights each time ({_defaults('seeds')})"
    trial.add_argument("--seeds", type=positive_int, metavar="N", help=text)
    text = f"passes of each training over its data ({_defaults('epochs')})"
    trial.add_argument("--epochs", type=positive_int, metavar="N", help=text)
    text = "the picture, a PNG file; its folder is made where it is missing (default: %(default)s)"
    trial.add_argument(*("--output", "-o"), type=png, default="longtail_demo.png", metavar="FILE", help=text)


def _defaults(field: str) -> str:
    found = {name: kind.module.Plan._field_defaults.get(field) for name, kind in KINDS.items()}
    return f"default: {', '.join(f'{value:g} with {name}' for name, value in found.items() if value is not None)}"


def make_plan(arguments: argparse.Namespace) -> Any:
    """Of the options that were given.

    Raises:
        ValueError: an option or a loss is not of the chosen data.
    """
    module = KINDS[arguments.data].module
    given = {name: getattr(arguments, name) for name in ("imbalance_factor", "seeds", "epochs")}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in module.Plan._fields:
            raise ValueError(f"argument --{name.replace('_', '-')}: does not go with --data {arguments.data}")
    losses = list(dict.fromkeys(arguments.loss or module.LOSSES))
    for loss in losses:
        if loss not in module.LOSSES:
            known = ", ".join(module.LOSSES)
            raise ValueError(
                f"argument --loss: {loss!r} does not go with --data {arguments.data} (choose from {known})"
            )
    return module.Plan(losses, **given)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Trains, prints the report and draws the picture."""
    module, report, extras = KINDS[arguments.data]
    try:
        plan = make_plan(arguments)
        require_packages(extras, "longtail demo", parser)
        name = dispatch.selected(torch.device("cpu"))
        backend = f"backend {name} ({backends.backends()[name].detail})"
        data = module.load(plan)
        make_folder(arguments.output.parent)
    except (OSError, ValueError) as error:
        parser.exit(2, f"longtail demo: error: {error}\n")
    torch.set_num_threads(1)  # models this small gain little from more, and crawl on a busy machine
    try:
        results = report.run_with_progress(plan, data)
    except AssertionError as error:
        parser.exit(1, f"longtail demo: {error}")
    except ChildProcessError as error:
        parser.exit(2, f"longtail demo: error: {error}\n")
    done = len(results[0].scores)
    if done < plan.seeds:
        report.print_report(plan, data, results, backend)
        report.print_end(plan, results, None)
        parser.exit(130, f"longtail demo: interrupted: the table is of {done} of {plan.seeds} seeds, no picture drawn")
    failed = ""
    try:
        report.draw(plan, data, results, arguments.output)
    except OSError as error:
        failed = f"longtail demo: error: {error}"
    try:
        report.print_report(plan, data, results, backend)
        report.print_end(plan, results, None if failed else arguments.output)
    finally:  # also where nobody reads the table
        if failed:
            parser.exit(2, failed)
