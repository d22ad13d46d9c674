"""The three experiments: their data, their model, and how it is trained.

Learning rates and epochs were chosen for the control alone, cross-entropy or binary cross-entropy, on splits of
``TUNING_SEEDS``, which the results do not use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import debtags, icd, places
from .corpus import Corpus
from .features import NGrams

TUNING_SEEDS = range(1000, 1002)
WORDS = NGrams("word", 1, 2, 2**16)


class Setting(NamedTuple):
    """One experiment."""

    title: str
    load: Callable[..., Corpus]
    ngrams: tuple[NGrams, ...]
    width: int  # of the vector of a text
    held_out: float  # share of the groups that are tested on
    batch_size: int
    learning_rate: float
    epochs: int
    quick: int  # every so many-th text of a quick run


SETTINGS = {
    "icd": Setting(
        title="Diagnoses (ICD-10-CM) to categories",
        load=icd.load,
        ngrams=(WORDS,),
        width=64,
        held_out=0.3,
        batch_size=256,
        learning_rate=0.04,
        epochs=10,
        quick=4,
    ),
    "debtags": Setting(
        title="Debian packages to their tags",
        load=debtags.load,
        ngrams=(WORDS, NGrams("char_wb", 3, 5, 2**16)),
        width=64,
        held_out=0.3,
        batch_size=256,
        learning_rate=0.02,
        epochs=10,
        quick=10,
    ),
    "places": Setting(
        title="Places (GeoNames) to regions",
        load=places.load,
        ngrams=(NGrams("char_wb", 2, 4, 2**17),),
        width=64,
        held_out=0.2,
        batch_size=1024,
        learning_rate=0.06,
        epochs=3,
        quick=20,
    ),
}
