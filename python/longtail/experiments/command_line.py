"""What the commands share: a parser with errors of one line, and the kinds of their options."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from pathlib import Path
from typing import NoReturn

from ..files import check_folder, check_writable, one_line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage text."""
        self.exit(2, f"{self.prog}: error: {message}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Leaves with one line, whatever the message quotes."""
        super().exit(status, f"{one_line(message)}\n" if message else None)


def show_everything() -> None:
    """Characters that the terminal's encoding lacks are printed as escapes, instead of ending the command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def print_nothing_more() -> None:
    """After an error of standard output: what it still holds would fail once more at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 19 or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def imbalance_factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 1 <= factor < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1 (largest over smallest class)")
    return factor


def png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    output_folder(str(path.parent))
    try:
        if os.path.isdir(path.parent):  # else it is made
            check_writable(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def existing_folder(text: str) -> Path:
    if not os.path.isdir(text):  # False, too, for a name that is too long or may not be looked at
        raise argparse.ArgumentTypeError(f"the folder {text!r} does not exist")
    return Path(text)


def existing_file(text: str) -> Path:
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"the file {text!r} does not exist")
    return Path(text)


def output_folder(text: str) -> Path:
    """A folder that is there, or can be made."""
    try:
        check_folder(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)
