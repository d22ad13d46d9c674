"""Diagnoses: descriptions of ICD-10-CM codes to the 1,918 categories, which form a tree with blocks and chapters."""

from __future__ import annotations

from collections.abc import Iterator

from ..provenance import version_of
from .corpus import Corpus, one_label

PACKAGE = "simple-icd-10-cm"  # MIT; the classification is of the United States government, in the public domain
STEM = 6  # characters, as in "S52.50": what follows is a side, an encounter or a degree, in phrases that repeat


def load() -> Corpus:
    """Descriptions and inclusion notes; those of codes with a common stem of five characters are one group."""
    import simple_icd_10_cm as icd

    def labelled() -> Iterator[tuple[str, str, str]]:
        for code in icd.get_all_codes():
            if not (icd.is_category(code) or icd.is_subcategory(code)) or len(code) > len("S52.501"):
                continue  # the seventh character says which encounter it is
            for text in (icd.get_description(code), *icd.get_inclusion_term(code)):
                yield text, code[:3], code[:STEM]

    def path_of(category: str) -> list[str]:
        return list(reversed(icd.get_ancestors(category)))

    return one_label(labelled(), f"{PACKAGE} {version_of(PACKAGE)}", path_of)
