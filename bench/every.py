"""The section ``all``.

Each section runs in a process of its own; the first that fails ends the run. Without a GPU ``gpu`` only says so.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from longtail.experiments.command_line import Parser

LOSSES = ("cpu", "statistics", "tail", "sigmoid", "multi_label", "soft", "images", "few", "threads", "overhead", "gpu")
"""Those of ``losses.py``."""

COMMANDS = (
    *((name,) for name in (*LOSSES, "pages", "growth", "linear")),
    ("linear", "--dtype", "bfloat16"),
    *((name,) for name in ("step", "parallel")),
    ("overhead", "--pytest-benchmark"),
    ("goals",),
)


def add_options(parser: Parser) -> None:
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")


def run(arguments: argparse.Namespace, parser: Parser) -> None:
    for words in COMMANDS:
        changed = ("--no-compile",) if arguments.no_compile and words[0] in LOSSES else ()
        status = subprocess.run((sys.executable, "-m", "bench", *words, *changed)).returncode
        if status:
            parser.exit(status, f"{parser.prog}: {words[0]} failed")
