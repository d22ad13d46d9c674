"""``python -m longtail experiment``: the options, and what runs with them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ..class_balance import class_counts
from ..files import check_writable, one_line
from .cifar import METHODS
from .cifar_data import DATASETS
from .command_line import Parser, existing_folder, imbalance_factor, positive_int, seed, writable_folder
from .output import Row, missing_packages, number_text, write_csv

Finished: TypeAlias = "tuple[list[Row], Any]"
"""The rows of a run, and the module that reports them."""


def add_command(commands: Any) -> None:
    """Adds ``experiment`` to the commands of a parser."""
    experiment = commands.add_parser("experiment", help="evidence on real data: trains, compares, writes CSV and PNG")
    names = experiment.add_subparsers(dest="experiment", required=True, metavar="{digits,tokens,cifar}")
    _add_digits(names)
    _add_tokens(names)
    _add_cifar(names)


def _common(names: Any, name: str, help: str, files: str = "") -> Parser:
    files = files or name
    parser: Parser = names.add_parser(name, help=help, description=help)
    parser.add_argument(
        *("--output", "-o"),
        type=writable_folder,
        default=Path(),
        metavar="FOLDER",
        help=f"where experiment_{files}.csv and .png are written (default: the current folder)",
    )
    return parser


def _add_digits(names: Any) -> None:
    parser = _common(names, "digits", "every method on long-tailed handwritten digits, tested against cross-entropy")
    parser.add_argument(
        "--imbalance-factor",
        type=imbalance_factor,
        nargs="+",
        action="extend",
        metavar="R",
        help="default: 10 20 50 (quick: 50)",
    )
    parser.add_argument("--seeds", type=positive_int, metavar="N", help="default: 10 (quick: 2)")
    parser.add_argument("--epochs", type=positive_int, metavar="N", help="default: 50 (quick: 2)")
    parser.add_argument("--jobs", type=positive_int, default=2, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small run that shows that everything works")


def _add_tokens(names: Any) -> None:
    parser = _common(
        names,
        "tokens",
        "a language model over Python's standard library: quality, speed and memory",
        "tokens[_seed<N>]",
    )
    parser.add_argument("--steps", type=positive_int, metavar="N", help="of each model (default: 500, quick: 4)")
    parser.add_argument("--vocabulary", type=positive_int, metavar="N", help="default: 32768 (quick: 1024)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of weights and order (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a small run that shows that everything works")


def _add_cifar(names: Any) -> None:
    parser = _common(
        *(names, "cifar", "the papers' setting, ResNet-32 on long-tailed CIFAR; not yet run in full"),
        "<dataset>_<factor>[_seed<N>]",
    )
    parser.add_argument(
        *("--data", "-d"),
        type=existing_folder,
        required=True,
        metavar="FOLDER",
        help="holds the CIFAR files, binary or pickles",
    )
    parser.add_argument("--dataset", choices=list(DATASETS), default="cifar10", help="default: %(default)s")
    parser.add_argument(
        *("--loss", "-l"),
        nargs="+",
        action="extend",
        choices=list(METHODS),
        metavar="NAME",
        help=f"of: {', '.join(METHODS)} (default: all)",
    )
    parser.add_argument(
        "--imbalance-factor", type=imbalance_factor, default=100.0, metavar="R", help="default: %(default)g"
    )
    parser.add_argument("--epochs", type=positive_int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a device")
    parser.epilog = "A run that was stopped goes on from the checkpoints (.pt) in the output folder."


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Runs an experiment, prints its report and writes its files."""
    prog = f"longtail experiment {arguments.experiment}"
    missing = missing_packages("experiments")
    if missing:
        parser.exit(1, f"{prog}: needs {', '.join(missing)}: pip install {' '.join(missing)}\n")
    csv_path = _csv_path(arguments)
    try:
        for path in (csv_path, csv_path.with_suffix(".png")):
            check_writable(path)
        rows, report = RUNNERS[arguments.experiment](arguments)
    except KeyboardInterrupt:
        kept = "its checkpoints are kept, the same command goes on from them"
        parser.exit(130, f"{prog}: interrupted: {kept if arguments.experiment == 'cifar' else 'no result is kept'}\n")
    except AssertionError as error:
        parser.exit(1, f"{prog}: nothing written: {error}\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{prog}: error: {error}\n")
    failed = _write(csv_path, rows, report)
    try:
        report.print_report(rows)
        if not failed:
            print(one_line(f"wrote {csv_path} and {csv_path.with_suffix('.png')}"))
    finally:  # also where nobody reads the table
        if failed:
            parser.exit(2, f"{prog}: error: {failed}\n")


def _run_digits(arguments: argparse.Namespace) -> Finished:
    from . import digits, digits_report
    from .output import progress_bar

    plan = digits.Plan(**_chosen(arguments, ("seeds", "epochs", "jobs"), {"seeds": 2, "epochs": 2}))
    factors = tuple(dict.fromkeys(arguments.imbalance_factor or ((50.0,) if arguments.quick else ())))
    if factors:
        plan = plan._replace(imbalance_factors=factors)
    digits.check(plan)
    with progress_bar(len(plan.tasks())) as advance:
        rows = digits.summarize(plan, digits.run(plan, advance))
    return rows, digits_report


def _run_tokens(arguments: argparse.Namespace) -> Finished:
    from . import tokens, tokens_data, tokens_model, tokens_report
    from .output import progress_bar

    plan = {"steps": 500, "vocabulary": 32768}
    plan |= _chosen(arguments, ("steps", "vocabulary"), {"steps": 4, "vocabulary": 1024})
    steps, folder = plan["steps"], tokens_data.standard_library()
    corpus = tokens_data.load_corpus(plan["vocabulary"], folder, every=20 if arguments.quick else 1)
    models = len(tokens_model.cross_entropies()) + len(
        tokens_model.variants(class_counts(corpus.train, len(corpus.vocabulary)))
    )
    with progress_bar(models * steps) as advance:
        together = tokens.train_together(corpus, steps, arguments.seed, advance)
        others = tokens.train_variants(corpus, steps, arguments.seed, advance)
    sequences = 32 if arguments.quick else tokens.HELD_OUT_SEQUENCES
    return tokens.rows_of(corpus, together, others, arguments.seed, sequences), tokens_report


def _run_cifar(arguments: argparse.Namespace) -> Finished:
    from . import cifar, cifar_data, cifar_report
    from .output import progress_bar

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = cifar.Plan(arguments.dataset, arguments.imbalance_factor, arguments.epochs, arguments.seed, device)
    images = cifar_data.load_images(arguments.data, plan.dataset)
    if images.incomplete:
        print(one_line(f"note: not the published files: {images.incomplete}"), file=sys.stderr)
    names = list(dict.fromkeys(arguments.loss or METHODS))
    cifar.check(plan, names, images, arguments.output)
    with progress_bar(len(names) * plan.epochs) as advance:
        rows = [cifar.row_of(cifar.train(plan, name, images, arguments.output, advance)) for name in names]
    return rows, cifar_report


def _chosen(arguments: argparse.Namespace, names: tuple[str, ...], quick: dict[str, int]) -> dict[str, Any]:
    """The options that were given, and under ``--quick`` the small values of the others."""
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return {**quick, **given} if arguments.quick else given


def _csv_path(arguments: argparse.Namespace) -> Path:
    """The same for the same settings; the usual seed is not named."""
    name = arguments.experiment
    if name == "cifar":
        name = f"{arguments.dataset}_{number_text(arguments.imbalance_factor)}"
    if getattr(arguments, "seed", 0):
        name += f"_seed{arguments.seed}"
    folder: Path = arguments.output
    return folder / f"experiment_{name}.csv"


def _write(csv_path: Path, rows: list[Row], report: Any) -> str:
    """Writes CSV and PNG, each whatever becomes of the other; what could not be written, in words."""
    failed = []
    for write, path in ((write_csv, csv_path), (report.draw, csv_path.with_suffix(".png"))):
        try:
            write(rows, path)
        except OSError as error:
            failed.append(str(error))
    return "; ".join(failed)


RUNNERS: dict[str, Callable[[argparse.Namespace], Finished]] = {
    "digits": _run_digits,
    "tokens": _run_tokens,
    "cifar": _run_cifar,
}
