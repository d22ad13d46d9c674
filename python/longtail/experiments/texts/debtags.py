"""Packages: names and one-line descriptions of Debian packages to their tags, several each."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ...files import read_whole
from .corpus import Corpus, several_labels

COMMAND = ("apt-cache", "dumpavail")


def load(file: Path | None = None) -> Corpus:
    """Packages with tags; those of one source package are one group.

    Args:
        file: what ``apt-cache dumpavail`` has printed; None: it is called.

    Raises:
        ValueError: there is no tagged package.
        OSError: the file cannot be read, or there is no such command.
    """
    text = (read_whole(file) if file else _available()).decode("utf-8", "replace")
    packages = []
    for fields in map(_fields, text.split("\n\n")):
        tags = sorted({tag.strip() for tag in fields.get("Tag", "").split(",")} - {""})
        if tags:
            name = fields.get("Package", "")
            source = fields.get("Source", name).split(" ")[0]
            summary = fields.get("Description", "").partition("\n")[0]
            packages.append((f"{name} {summary}", tags, source))
    if not packages:
        place = repr(str(file)) if file else f"the output of {' '.join(COMMAND)} (apt-get update fetches what it shows)"
        raise ValueError(f"{place} has no package with a Tag field")
    return several_labels(packages, " ".join(COMMAND))


def _available() -> bytes:
    return subprocess.run(COMMAND, capture_output=True, check=False).stdout


def _fields(paragraph: str) -> dict[str, str]:
    """Of a paragraph of control data: names and values, whose further lines begin with a space."""
    return dict(_pairs(paragraph))


def _pairs(paragraph: str) -> Iterator[tuple[str, str]]:
    for match in re.finditer(r"^([^\s:]+):[ \t]*(.*(?:\n[ \t].*)*)", paragraph, re.MULTILINE):
        yield match.group(1), match.group(2)
