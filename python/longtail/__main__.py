"""The command line: ``python -m longtail info`` and ``python -m longtail demo``."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
import sys
from pathlib import Path
from typing import NoReturn

import torch

from . import __version__, demo, demo_report, dispatch


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage text."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _imbalance_factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 1 <= factor < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1 (largest over smallest class)")
    return factor


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written to")
    return path


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="longtail", description="Fused losses for long-tailed and large-vocabulary training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,demo}")
    commands.add_parser("info", help="versions, devices, backends, and why a backend does not run")
    trial = commands.add_parser(
        "demo",
        help="train a small network on long-tailed digits with several losses, and compare them",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    trial.add_argument(
        *("--loss", "-l"),
        nargs="+",
        action="extend",
        choices=list(demo.LOSSES),
        metavar="NAME",
        help=f"losses to compare, of: {', '.join(demo.LOSSES)} (default: all)",
        default=argparse.SUPPRESS,
    )
    trial.add_argument(
        "--imbalance-factor", type=_imbalance_factor, default=50.0, metavar="R", help="largest over smallest class"
    )
    trial.add_argument(
        "--seeds", type=_positive_int, default=5, metavar="N", help="how many times each loss is trained"
    )
    trial.add_argument("--epochs", type=_positive_int, default=40, metavar="N", help="passes over the training images")
    trial.add_argument(
        "--output", type=_png, default="longtail_demo.png", metavar="FILE", help="the picture, a PNG file"
    )
    return parser


def run_demo(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    missing = demo_report.missing_extras()
    if missing:
        parser.exit(1, f"longtail demo: needs {', '.join(missing)}: pip install longtail[demo]\n")
    losses = list(dict.fromkeys(getattr(arguments, "loss", demo.LOSSES)))
    plan = demo.Plan(losses, arguments.imbalance_factor, arguments.seeds, arguments.epochs)
    try:
        splits = demo.load_splits(plan)
        name = dispatch.selected(torch.device("cpu"))
        backend = f"backend {name} ({dispatch.backends()[name].detail})"
    except ValueError as error:
        parser.exit(2, f"longtail demo: error: {error}\n")
    torch.set_num_threads(1)  # a network this small gains little from more, and crawls on a busy machine
    results = demo_report.run_with_progress(plan, splits)
    demo_report.print_report(plan, splits, results, backend)
    demo_report.draw(plan, splits, results, arguments.output)
    print(f"Picture: accuracy per class in {arguments.output}")


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor_name() -> str:
    """The processor's name; platform.processor() is empty on most Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def info_lines() -> list[str]:
    """What ``longtail info`` prints.

    Raises:
        ValueError: ``LONGTAIL_CPU_ISA`` or ``LONGTAIL_BACKEND`` name something that does not run here.
    """
    devices, kinds = ["cpu"], ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        devices.append(f"cuda:{i} ({torch.cuda.get_device_name(i)}, sm_{major}{minor})")
    facts = {
        "longtail": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'not built in'})",
        "triton": version_of("triton"),
        "system": platform.platform(),
        "processor": processor_name(),
        "CPU kernels": dispatch.cpu_isa() or "none",
        "torch's CPU": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "devices": ", ".join(devices),
        "in use": ", ".join(f"{dispatch.selected(torch.device(kind))} for {kind} tensors" for kind in kinds),
    }
    lines = [f"{name:<12} {value}" for name, value in facts.items()]
    lines.append("backends")
    for name, backend in dispatch.backends().items():
        lines.append(f"  {name:<10} {'yes' if backend.available else 'no ':<4} {backend.detail}")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "demo":
        run_demo(arguments, parser)
        return
    try:
        print("\n".join(info_lines()))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
