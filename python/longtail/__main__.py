"""The command line, ``longtail`` or ``python -m longtail``: ``info``, ``demo`` and ``experiment``."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from .experiments import command as experiments
from .experiments import demo
from .experiments.command_line import Parser, print_nothing_more, show_everything
from .experiments.provenance import processor_name, version_of
from .ops import backends, cpu, dispatch
from .version import __version__


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="longtail", description="Fused losses for long-tailed and large-vocabulary training.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,demo,experiment}")
    commands.add_parser("info", help="versions, devices, backends, and why a backend does not run")
    demo.add_command(commands)
    experiments.add_command(commands)
    return parser


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
        demo.run(arguments, parser)
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
