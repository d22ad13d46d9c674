"""One colour for each contender, the same in all pictures."""

from __future__ import annotations

from collections.abc import Iterable

TextRow = dict[str, str]

COLOURS = {
    "copy": "#000000",
    "eager": "#D55E00",
    "eager module": "#882255",
    "compiled": "#E69F00",
    "longtail backward": "#0072B2",
    "longtail forward": "#56B4E9",
    "longtail inplace": "#009E73",
    "longtail module": "#332288",
    "liger": "#CC79A7",
    "quack": "#661100",
    "timm": "#DDCC77",
}
"""Okabe and Ito's, which the colour-blind tell apart; for the modules, QuACK and timm some of Tol's muted scheme."""


def contender(row: TextRow) -> str:
    """The key of a row in ``COLOURS``: longtail's functions count by gradient mode; the pages are left out."""
    name = row["contender"].partition(",")[0]
    return f"{name} {row['gradient']}" if name == "longtail" else name


def colour(row: TextRow) -> str:
    return COLOURS[contender(row)]


def in_order(rows: Iterable[TextRow]) -> list[str]:
    """The contenders of the rows, in the order of ``COLOURS``."""
    there = {contender(row) for row in rows}
    return [name for name in COLOURS if name in there]
