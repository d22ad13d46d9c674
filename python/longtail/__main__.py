"""The command line, ``longtail`` or ``python -m longtail``: ``info``, ``demo`` and ``experiment``."""

from __future__ import annotations

import argparse
import platform
import sys
from typing import Any

import torch

from .experiments import command as experiments
from .experiments import demo, demo_report
from .experiments.command_line import Parser, imbalance_factor, png, positive_int, print_nothing_more, show_everything
from .experiments.output import require_packages
from .experiments.provenance import processor_name, version_of
from .files import make_folder, one_line
from .ops import backends, cpu, dispatch
from .version import __version__


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="longtail", description="Fused losses for long-tailed and large-vocabulary training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,demo,experiment}")
    commands.add_parser("info", help="versions, devices, backends, and why a backend does not run")
    add_demo(commands)
    experiments.add_command(commands)
    return parser


def add_demo(commands: Any) -> None:
    text = "train a small network on long-tailed digits with several losses, and compare them"
    trial = commands.add_parser(
        *("demo",),
        help=text,
        description=text,
        epilog="Ctrl-C: the table of the seeds that every loss has finished is printed; no picture is drawn.",
    )
    trial.add_argument(
        *("--loss", "-l"),
        nargs="+",
        action="extend",
        choices=list(demo.LOSSES),
        metavar="NAME",
        help=f"losses to compare, one or more of {', '.join(demo.LOSSES)} (default: all)",
    )
    text = f"{experiments.IMBALANCE_FACTOR} (default: %(default)g)"
    trial.add_argument("--imbalance-factor", type=imbalance_factor, default=50.0, metavar="R", help=text)
    text = "times that each loss is trained, on other images and weights each time (default: %(default)s)"
    trial.add_argument("--seeds", type=positive_int, default=5, metavar="N", help=text)
    text = "passes of each training over its images (default: %(default)s)"
    trial.add_argument("--epochs", type=positive_int, default=40, metavar="N", help=text)
    text = "the picture, a PNG file; its folder is made where it is missing (default: %(default)s)"
    trial.add_argument(*("--output", "-o"), type=png, default="longtail_demo.png", metavar="FILE", help=text)


def run_demo(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    require_packages(["demo"], "longtail demo", parser)
    losses = list(dict.fromkeys(arguments.loss or demo.LOSSES))
    plan = demo.Plan(losses, arguments.imbalance_factor, arguments.seeds, arguments.epochs)
    try:
        splits = demo.load_splits(plan)
        name = dispatch.selected(torch.device("cpu"))
        backend = f"backend {name} ({backends.backends()[name].detail})"
        make_folder(arguments.output.parent)
    except (OSError, ValueError) as error:
        parser.exit(2, f"longtail demo: error: {error}\n")
    torch.set_num_threads(1)  # a network this small gains little from more, and crawls on a busy machine
    try:
        results = demo_report.run_with_progress(plan, splits)
    except AssertionError as error:
        parser.exit(1, f"longtail demo: {error}")
    done = len(results[0].scores)
    if done < plan.seeds:
        demo_report.print_report(plan, splits, results, backend)
        parser.exit(130, f"longtail demo: interrupted: the table is of {done} of {plan.seeds} seeds, no picture drawn")
    failed = ""
    try:
        demo_report.draw(plan, splits, results, arguments.output)
    except OSError as error:
        failed = f"longtail demo: error: {error}"
    try:
        demo_report.print_report(plan, splits, results, backend)
    finally:  # also where nobody reads the table
        if failed:
            parser.exit(2, failed)
    print(one_line(f"Picture: accuracy per class in {arguments.output}"))


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
        "CPU kernels": cpu.isa() or "none",
        "torch's CPU": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "devices": ", ".join(devices),
        "in use": ", ".join(f"{dispatch.selected(torch.device(kind))} for {kind} tensors" for kind in kinds),
    }
    lines = [f"{name:<12} {value}" for name, value in facts.items()]
    lines.append("backends")
    for name, backend in backends.backends().items():
        lines.append(f"  {name:<10} {'yes' if backend.available else 'no ':<4} {backend.detail}")
    return lines


def main(argv: list[str] | None = None) -> None:
    show_everything()
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        _run(arguments, parser)
        print(end="", flush=True)
    except KeyboardInterrupt:
        parser.exit(130, f"longtail {arguments.command}: interrupted\n")
    except OSError as error:  # of what is printed: those of files have left already
        print_nothing_more()
        gone = isinstance(error, BrokenPipeError)  # whoever reads has read enough, as in "longtail info | head -1"
        parser.exit(1, None if gone else f"longtail {arguments.command}: error: {error}")


def _run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.command == "demo":
        run_demo(arguments, parser)
        return
    if arguments.command == "experiment":
        experiments.run(arguments, parser)
        return
    try:
        print("\n".join(info_lines()))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
