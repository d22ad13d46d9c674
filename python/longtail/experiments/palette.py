"""One colour for each method in every picture of the demo and the experiments."""

from __future__ import annotations

COLOURS = {
    "cross-entropy": "#000000",
    "sigmoid": "#7F7F7F",
    "softmax focal": "#56B4E9",
    "sigmoid focal": "#0072B2",
    "class-balanced softmax": "#E69F00",
    "class-balanced sigmoid": "#8C5A00",
    "class-balanced softmax focal": "#D55E00",
    "class-balanced sigmoid focal": "#7A1F1F",
    "logit adjustment": "#009E73",
    "complement cross-entropy": "#CC79A7",
    "complement objective training": "#7B3294",
    "vector scaling": "#00C49A",
    "CDT": "#7FD6B8",
    "IMMAX": "#B5651D",
    "Seesaw": "#A00050",
    "label over-smoothing": "#5B7F95",
    "LDAM-DRW": "#9A9A00",
    "class-balanced softmax focal + complement": "#F0E442",
    "post-hoc logit adjustment": "#4DB38F",
    "Poly-1": "#B8860B",
    "generalized cross-entropy": "#8B6FB0",
    "hierarchical cross-entropy": "#FF7F6E",
    "binary cross-entropy": "#1A1A1A",
    "positive weight": "#E6A817",
    "asymmetric": "#C71585",
    "distribution-balanced": "#2E5FA3",
    "ZLPR": "#3CB371",
    "two-way": "#A0522D",
}
"""By family. Okabe and Ito's colours (2008), which colour-blind readers tell apart; a darker shade, told apart by its
lightness, where a method is the sigmoid form of another."""


def colour_of(method: str) -> str:
    """The colour of a method by its name, such as ``softmax focal, gamma 2``: hyperparameters change nothing."""
    return COLOURS[method.split(",")[0]]
