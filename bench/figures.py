"""The frame of all pictures: size, title above, terms and machine below."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image

from longtail.files import write_whole

from . import palette, words
from .palette import TextRow

WIDTH = 9.0
"""Inches. At the 900 pixels that a README shows, a point is 1.4 pixels."""

DPI = 150
SHADES = 8
"""Of each colour in a PNG, up to white: few make it small."""

GREY = "#555555"
LINE = 140
"""Characters of a line below a picture."""

LINE_INCHES = 0.15


def _shades() -> Image.Image:
    """The colours of a PNG: each contender's, and black, on their way to white."""
    image = Image.new("P", (1, 1))
    image.putpalette(
        [
            round(255 * (1 - (1 - part) * (SHADES - i) / SHADES))
            for colour in (*palette.COLOURS.values(), GREY, "black")
            for i in range(SHADES)
            for part in to_rgb(colour)
        ]
        + [255, 255, 255]
    )
    return image


def panels(rows: int, columns: int, height: float, **sharing: Any) -> tuple[Any, Any]:
    """A figure, without the lines below so many inches high, and its axes [rows, columns]."""
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **sharing)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure, axes


def title(axis: Any, text: str, rows: Sequence[TextRow]) -> None:
    """Of a panel: what it shows, and the commits of its rows."""
    axis.set_title(text, loc="left", fontsize=10, pad=17)
    axis.annotate(
        words.commits(rows),
        (0, 1),
        (0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=GREY,
    )


def save(
    figure: Any,
    path: Path,
    what: str,
    rows: Sequence[TextRow],
    terms: Iterable[str],
    legend: Mapping[str, Any] | None = None,
) -> Path:
    """Adds title, legend, terms and machine, and writes a PNG."""
    lines = [line for text in (*terms, words.machine(rows)) for line in textwrap.wrap(text, LINE)]
    figure.set_figheight(figure.get_figheight() + LINE_INCHES * len(lines))
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8.5, color=GREY)
    bold = {"size": 12, "weight": "bold"}
    if legend:
        place = {"loc": "outside upper left", "ncols": len(legend), "frameon": False, "fontsize": 9}
        heading = {"title": what, "title_fontproperties": bold, "alignment": "left"}
        figure.legend(legend.values(), legend.keys(), columnspacing=1.2, **place, **heading)
    else:
        figure.suptitle(what, x=0.01, ha="left", fontproperties=bold)
    drawn, content = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    plt.close(figure)
    small = Image.open(drawn).convert("RGB").quantize(palette=_shades(), dither=Image.Dither.NONE)
    small.save(content, "png", optimize=True)
    write_whole(path, content.getvalue())
    return path
