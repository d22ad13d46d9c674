"""The section ``pages``: what the pages of a fresh gradient cost.

The operating system clears each page of a new gradient when it is first written. The same times are taken in processes
whose environment changes that: huge pages (THP_MEM_ALLOC_ENABLE=1, which torch reads), and freed memory that malloc
keeps and hands out again (MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_, which glibc reads).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys

from longtail.experiments.command_line import Parser

from . import losses, plot, report, results, suite
from .measure import Mismatch

SETTINGS: dict[str, dict[str, str]] = {
    "fresh": {},
    "huge": {"THP_MEM_ALLOC_ENABLE": "1"},
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}
"""Pages by name, with their environment; "fresh" as a process has them that sets nothing."""


def environment(pages: str) -> dict[str, str]:
    """This process's, with the variables of these pages alone."""
    of_any = {name for variables in SETTINGS.values() for name in variables}
    return {name: value for name, value in os.environ.items() if name not in of_any} | SETTINGS[pages]


def add_options(parser: Parser) -> None:
    losses.add_options(parser)
    parser.add_argument("--pages", choices=SETTINGS, help="measure in this process, whose environment is set already")


def _command(arguments: argparse.Namespace, pages: str) -> list[str]:
    words = [sys.executable, "-m", "bench", arguments.section, "--no-pictures", "--pages", pages]
    for shape in arguments.shape or ():
        words += ["--shape", ",".join(map(str, shape))]
    for dtype in arguments.dtype or ():
        words += ["--dtype", dtype]
    if arguments.rounds:
        words += ["--rounds", str(arguments.rounds)]
    return [*words, "--output", str(arguments.output or losses.output_of(suite.PAGES))]


def run(arguments: argparse.Namespace, parser: Parser) -> None:
    path = arguments.output or losses.output_of(suite.PAGES)
    if arguments.pages is None:
        for pages in SETTINGS:
            status = subprocess.run(_command(arguments, pages), env=environment(pages)).returncode
            if status:
                parser.exit(status, f"{parser.prog}: {pages} pages failed\n")
        for picture in () if arguments.no_pictures else plot.draw(path):
            print(f"wrote {picture}")
        return
    rows: list[results.Row] = []
    try:
        for plan in losses.chosen(arguments):
            for found in report.rows_with_progress(plan):
                named = [
                    dataclasses.replace(row, contender=f"{row.contender}, {arguments.pages} pages") for row in found
                ]
                results.write(path, named)
                rows += named
    except Mismatch as error:
        parser.exit(1, f"{parser.prog}: nothing written for this problem: {error}\n")
    report.print_report(rows)
